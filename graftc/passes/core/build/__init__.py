"""The Builder, the only code that changes a graph, by subject: tensors, linear maps, attentions ...

Methods call it; compositions override its seams and nothing else.
"""
