"""What a compiled model is and does: running, training, merging, exporting, saving and loading.

`compiled` has the class that users work with; `offered` lists which object implements which of its methods.
"""
