"""Imports for the server of `tests.kit.warm`: all that commands import except graftc and what reads the environment."""

from __future__ import annotations

import numpy
import onnx
import safetensors.torch
import torch.export
import torch.onnx
import transformers
import transformers.models.bert.modeling_bert

__all__ = ["numpy", "onnx", "safetensors", "torch", "transformers"]
