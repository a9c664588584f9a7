"""What a full training step costs in time and in memory: full fine-tuning, LoRA by peft and graftc, sparse deltas."""

import os

# torch's profiler, which counts allocations, announces itself at every start; read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "9")
