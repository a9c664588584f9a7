"""LoRA folders in the layouts of other programs: which key stores what, and how experts and fused maps are stored.

`plain` is the common intermediate form, `layout` has the table of layouts, `folder` reads and writes them, `fusing`
joins and splits maps, `reference` describes independently what each layout means, and `convert` checks one against the
other.
"""
