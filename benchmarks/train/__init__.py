"""What a training step costs: graftc and its peers on one model, over the same tensors and batches."""

import os

# torch's profiler, which counts allocations, announces itself at every start; read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "9")
