"""MAM adapters: a prefix and parallel adapters (He et al. 2022, arXiv:2110.04366)."""

from __future__ import annotations

from graftc.passes.methods.bases.composed import PartsMethod
from graftc.specs.methods.mam import MAM


class MAMMethod(PartsMethod[MAM]):
    """`PartsMethod` with a prefix and parallel adapters."""
