"""Folders of quantised models: their codes read from safetensors, without the libraries that wrote them."""
