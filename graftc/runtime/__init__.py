"""Everything that a compiled model does: running, training, merging, exporting, saving and loading.

`compiled` has the class that users work with; `offered` lists the classes that implement its methods.
"""
