"""LoRA folders in the layouts of other programs: which key holds what, and how experts and fused maps are stored.

`plain` is the form in between, `layout` has the table of layouts, `folder` reads and writes them, `fusing` joins and
splits maps, `reference` says once more, and otherwise, what each layout means, and `convert` checks one by the other.
"""
