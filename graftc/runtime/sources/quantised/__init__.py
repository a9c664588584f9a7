"""Folders of quantised models: their codes are read from safetensors, without the libraries that wrote them."""

PACKED_FORMATS = ("awq", "bitsandbytes", "compressed-tensors", "fp8", "gptq", "hqq", "mxfp4", "mxfp8")
"""Formats that are read, by what a config has as ``quant_method``. `load` has what reads each."""
