"""Load folders of quantised models: codes are read from safetensors, without the libraries that wrote them."""

PACKED_FORMATS = ("awq", "bitsandbytes", "compressed-tensors", "fp8", "gptq", "hqq", "mxfp4", "mxfp8")
"""The supported formats, by their ``quant_method`` in a config. `load` maps each to its reader."""
