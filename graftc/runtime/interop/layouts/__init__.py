"""LoRA folders in other programs' layouts: what each key stores, and how experts and fused maps are stored.

`plain` is the common intermediate form, `layout` has the table of layouts, `folder` reads and writes them, `fusing`
joins and splits maps, `reference` independently defines what each layout means, and `convert` converts between layouts
and checks the result against `reference`.
"""
