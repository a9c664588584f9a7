"""Files of tensors that anybody may have written: which ones may be read and are a folder's weights, their headers, and
their tensors."""
