"""The cost of a training step: graftc and its peers on one model, over the same tensors and batches."""

import os

# Silences the message that torch's profiler, which counts allocations, prints at every start; read on import of torch.
os.environ.setdefault("KINETO_LOG_LEVEL", "9")
