"""The cost of a whole training step in time and memory: full fine-tuning, LoRA in peft and graftc, sparse deltas."""

import os

# Silences the message that torch's profiler, which counts allocations, prints at every start; read on import of torch.
os.environ.setdefault("KINETO_LOG_LEVEL", "9")
