"""The layouts as data: how each program names maps, and how it stores the maps of experts.

Taken from peft 0.21, vLLM 0.26 (`lora_model.py`, `model_manager.py`), SGLang (`lora.py`, PR 21466), unsloth-zoo before
PR 1269, tinker-cookbook 125e52e (`weights/_adapter.py`) and torchtune 0.6 (`convert_weights.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeAlias

from graftc.specs.errors.diagnostics import GraftError, alternatives

ExpertForm: TypeAlias = Literal["flat", "flat_by_expert", "each", "stacked"]
"""How the factors of experts are stored.

`flat`: one matrix for the gate and up projections together, and one for the down projection; the expert index varies
slowest in ``A`` and fastest in ``B``. `flat_by_expert`: the same, but experts vary slowest in ``B`` too. `each`: a
matrix per expert and projection, ``experts.3.gate_proj``. `stacked`: a tensor per projection with experts as its first
axis, ``experts.w1``; the axis of a factor that all experts share has size 1."""


@dataclass(frozen=True)
class AdapterLayout:
    """How one program lays out a LoRA adapter.

    Attributes:
        name: name of the layout on the command line.
        about: description for users, which names the program.
        experts: how experts are stored; None if the layout has none.
        names: path segments that are named differently: transformers' names, mapped to the layout's. Only whole
            segments match.
        prefix: prefix of every path.
        factors: the names of ``A`` and ``B``.
        rotary: whether the rows of queries and keys are stored in rotation pairs, as in Meta's weights.
        uniform: whether all maps have the same rank and the same scale, which the config defines.
        tables: whether the layout can store adapters for embedding tables.
    """

    name: str
    about: str
    experts: ExpertForm | None = "flat"
    names: Mapping[str, str] = field(default_factory=dict)
    prefix: str = "base_model.model."
    factors: tuple[str, str] = ("lora_A", "lora_B")
    rotary: bool = False
    uniform: bool = False
    tables: bool = True


STACKED: Mapping[str, str] = MappingProxyType({"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"})
"""The names of the experts' projections in `stacked`."""

_TORCHTUNE: Mapping[str, str] = MappingProxyType(
    {
        "model.layers": "layers",
        "self_attn.o_proj": "attn.output_proj",
        "self_attn": "attn",
        "mlp.gate_proj": "mlp.w1",
        "mlp.down_proj": "mlp.w2",
        "mlp.up_proj": "mlp.w3",
        "lm_head": "output",
    }
)

_EVERY = (
    AdapterLayout("peft", "PEFT's own; vLLM's for models whose experts it fuses"),
    AdapterLayout("vllm", "vLLM's with a matrix per expert, which SGLang reads too", experts="each", uniform=True),
    AdapterLayout("sglang", "SGLang's with a tensor per projection of experts", experts="stacked", uniform=True),
    AdapterLayout(
        "tinker",
        "the layout of Tinker's checkpoints",
        experts="stacked",
        names=MappingProxyType({"lm_head": "model.unembed_tokens"}),
        uniform=True,
        tables=False,
    ),
    AdapterLayout(
        "unsloth", "PEFT's keys as Unsloth read them for experts before September 2026", experts="flat_by_expert"
    ),
    AdapterLayout(
        "torchtune",
        "torchtune's names and its order of rotated rows",
        experts=None,
        names=_TORCHTUNE,
        prefix="",
        factors=("lora_a", "lora_b"),
        rotary=True,
        uniform=True,
        tables=False,
    ),
)

LAYOUTS: Mapping[str, AdapterLayout] = MappingProxyType({layout.name: layout for layout in _EVERY})
"""All layouts, by name."""


def layout_of(name: str) -> AdapterLayout:
    """Return the layout with a given name.

    Raises:
        GraftError: GC069 for an unknown layout.
    """
    layout = LAYOUTS.get(name)
    if layout is None:
        raise GraftError("GC069", f"there is no layout {name!r}", hint=alternatives(name, LAYOUTS, "layouts"))
    return layout
