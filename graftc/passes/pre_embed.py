"""PreEmbed (Hu et al. 2021, arXiv:2106.09685, section 5.1)."""

from __future__ import annotations

from graftc.passes.prompt import VirtualTokenMethod
from graftc.specs.pre_embed import PreEmbed


class PreEmbedMethod(VirtualTokenMethod[PreEmbed]):
    """`VirtualTokenMethod` with one run in front of the text and one within it."""

    spec_class = PreEmbed
