"""Reference tensors from AdapterHub's `adapters`: the base, its inputs, adapters under our names, and outputs.

``tests/data/README.md`` says how they were created, and ``tests/reference/adapterhub.py`` what each case computes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import graftc
from graftc.runtime.compiled import Compiled
from graftc.testing import largest_difference
from tests.kit.places import ROOT

DATA = ROOT / "tests" / "data"
ARCHITECTURES = ("bert", "roberta", "gpt2")
TOLERANCE = 1e-5

_PLACES = {"attention.output": "attn", "attention_adapters": "attn", "output": "ffn", "output_adapters": "ffn"}
_PLACE = re.compile(rf"(?P<layer>.+\.\d+)\.(?P<place>{'|'.join(_PLACES)})\.adapters\.(?P<adapter>\w+)\.(?P<part>.+)")


@dataclass(frozen=True)
class Reference:
    """The contents of one file of reference tensors.

    Attributes:
        about: the file's metadata: ``model``, ``cases`` and ``versions``.
        tensors: all tensors by name.
    """

    about: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors below ``prefix/``, by the rest of their names."""
        return {n.removeprefix(f"{prefix}/"): t for n, t in self.tensors.items() if n.startswith(f"{prefix}/")}

    def base(self, attention: str = "eager") -> nn.Module:
        """Return a new plain model in eval mode; ``attention`` is the implementation of its attentions."""
        about = self.about["model"]
        config = getattr(transformers, about["config"])(**about["arguments"], attn_implementation=attention)
        model: nn.Module = getattr(transformers, about["class"])(config).eval()
        model.load_state_dict(self.under("base"))
        return model

    def inputs(self) -> dict[str, Any]:
        """Return the batch, and the flag that makes the model return its last hidden state."""
        return {**self.under("inputs"), "output_hidden_states": True}

    def adapters(self, case: str, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Return the adapters of a case under our names.

        Args:
            case: the name of the case.
            names: our adaptation's name for each adapter.
        """
        renamed: dict[str, Tensor] = {}
        stored = self.under(f"{case}/adapter")
        for name, tensor in stored.items():
            match = _PLACE.fullmatch(name)
            if match is not None:
                prefix = name.removesuffix(match["part"])
                part = _part(match["part"], normed=f"{prefix}adapter_down.1.weight" in stored)
                layer, place, adapter = match["layer"], _PLACES[match["place"]], names[match["adapter"]]
                renamed[f"{layer}.graftc.{adapter}.{place}.{part}"] = tensor
        return renamed

    def prefixes(self, case: str) -> list[dict[str, Tensor]]:
        """Return keys and values of a flat prefix for each layer, ``[length, width]``.

        AdapterHub has those of all layers in one vector, positions first.
        """
        (flat,) = (t for n, t in self.under(f"{case}/adapter").items() if n.endswith("control_trans"))
        about = self.about["model"]["arguments"]
        tables = flat.view(-1, about["num_hidden_layers"], 2, about["hidden_size"]).movedim(0, 2)
        return [dict(zip(("keys", "values"), layer, strict=True)) for layer in tables]

    def differences(self, case: str, model: nn.Module) -> Iterator[tuple[str, float]]:
        """Yield the name of each output and how far ``model`` is from a case (``unadapted``: without an adapter)."""
        with torch.no_grad():
            returned = model(**self.inputs())
        outputs = {"logits": returned["logits"], "last_hidden_state": returned["hidden_states"][-1]}
        for name, tensor in outputs.items():
            yield name, largest_difference([tensor], [self.tensors[f"{case}/{name}"]])


def _part(name: str, *, normed: bool) -> str:
    """Return our name for an adapter's tensor; AdapterHub's first norm is item 0 of the first projection's module."""
    module, _, kind = name.rpartition(".")
    ours = {"adapter_down.0": "norm" if normed else "down", "adapter_down.1": "down", "adapter_up": "up"}
    part = {**ours, "adapter_norm_after": "norm_after", "gate": "gate"}.get(module)
    if part is None:
        return {"scaling": "scale"}[name]
    return part if kind == "weight" and "norm" not in part else f"{part}_{kind}"


@cache
def reference(arch: str) -> Reference:
    """Return the file of an architecture."""
    path = DATA / f"adapterhub_{arch}.safetensors"
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
    return Reference(about, load_file(path))


def with_their_tensors(arch: str, case: str, *entries: Mapping[str, Any], **spec: Any) -> Compiled:
    """The base of ``arch`` with the adapters of a case, in eval mode.

    Args:
        arch: one of `ARCHITECTURES`.
        case: the name of the case.
        entries: our adaptations for the adapters a, b and c, in this order.
        spec: other keys of the spec.

    Raises:
        AssertionError: if the two do not have the same tensors.
    """
    compiled = graftc.compile({"adapt": [dict(e) for e in entries], **spec}, reference(arch).base()).eval()
    names = {letter: entry.get("name", entry["method"]) for letter, entry in zip("abc", entries, strict=False)}
    theirs, ours = reference(arch).adapters(case, names), compiled.adapter_state_dict()
    assert {n: t.shape for n, t in theirs.items()} == {n: t.shape for n, t in ours.items()}
    compiled.load_adapter_state_dict(theirs)
    return compiled
