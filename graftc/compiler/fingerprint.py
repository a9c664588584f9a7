"""The fingerprint of a base: its config, and names, shapes, dtypes and sampled values of its tensors."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from graftc.passes.core.store import Store

SAMPLES = 64


def fingerprint(store: Store, config: Any = None, *, full: bool = False) -> str:
    """A digest of the base.

    Args:
        store: its tensors.
        config: the model's config, if it has one.
        full: digest every value instead of `SAMPLES` evenly spaced ones per tensor.
    """
    digest = hashlib.sha256()
    to_dict = getattr(config, "to_dict", None)
    if to_dict is not None:
        settings = {k: v for k, v in to_dict().items() if not k.startswith("_") and k != "transformers_version"}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(item for item in store.base() if item[0] not in store.constants):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
        if tensor.device.type != "meta" and tensor.numel():
            flat = tensor.detach().reshape(-1)
            if not full:
                step = max(1, flat.numel() // SAMPLES)
                flat = flat[::step][:SAMPLES]
            digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
