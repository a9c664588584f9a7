"""Files of tensors that anybody may have written: which ones a folder's weights are, their headers, their tensors."""
