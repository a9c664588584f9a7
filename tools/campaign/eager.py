"""The eager model with adaptations in effect: finds the weight of every adapter tensor, and applies `reference`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from graftc.compat import pytree
from graftc.specs.io import load_spec
from tools.campaign.activations import ADAPTERS, PREFIXES, Acting, acting
from tools.campaign.blocks import Part, Rows
from tools.campaign.models import untied
from tools.campaign.reference import FORMULAS, STAND_INS, SUMS, Fields, NoReferenceError, Tensors, Weight

_PART = ".graftc."


@dataclass
class _Place:
    """The tensors of one adaptation at one place."""

    module: str
    part: str
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Eager:
    """A frozen eager model whose weights follow from adapter tensors.

    Args:
        built: the module; it is never changed, and copied if the spec unties modules.
        spec: the spec that it is adapted with.

    Raises:
        NoReferenceError: when an adaptation's method has no formula.
    """

    def __init__(self, built: nn.Module, spec: Mapping[str, Any]) -> None:
        self.built = built = untied(built, spec["untie"]) if spec.get("untie") else built
        loaded = load_spec(dict(spec))
        self.entries: list[tuple[str, str, Fields]] = [(str(e.name), e.method, e.model_dump()) for e in loaded.adapt]
        if spec.get("train"):
            self.entries.append(("trained", "trained", {}))
        # What stands in for a tensor of the base does so for everything that is built on the base.
        self.entries.sort(key=lambda entry: entry[1] in FORMULAS)
        self._modules = dict(built.named_modules(remove_duplicate=False))
        self._stored = {**dict(built.named_parameters(remove_duplicate=False)), **dict(built.named_buffers())}
        for _, method, _ in self.entries:
            if method not in FORMULAS and method not in STAND_INS | SUMS | PREFIXES | ADAPTERS:
                raise NoReferenceError(method)

    @property
    def methods(self) -> set[str]:
        """The methods of the spec; ``trained`` stands for its ``train`` list."""
        return {method for _, method, _ in self.entries}

    def weights(self, tensors: Tensors, without: frozenset[str] = frozenset()) -> dict[str, Tensor]:
        """Return the changed tensors by their names in the eager model's state dict.

        Args:
            tensors: the adapter tensors by full name.
            without: names of adaptations to leave out.

        Raises:
            NoReferenceError: when a tensor does not belong to a weight that is known here.
        """
        state: dict[str, Tensor] = {}
        for name, method, fields in self.entries:
            if name in without or method in PREFIXES | ADAPTERS:
                continue
            shared: dict[str, Tensor] = {}
            places = _places(tensors, name, shared)
            for place in places:
                if method in STAND_INS:
                    self._stand_in(place, fields, state)
                elif method in SUMS:
                    self._add(place, method, fields, state)
                else:
                    self._change(place, method, fields, {**shared, **place.tensors}, state)
        return state

    def call(self, tensors: Tensors, inputs: Mapping[str, Tensor], without: frozenset[str] = frozenset()) -> Any:
        """Return the eager model's outputs with the adaptations in effect."""
        weights = self.weights(tensors, without)
        with acting(self.built, self._acting(tensors, without)):
            return functional_call(self.built, weights, (), dict(inputs), tie_weights=False)

    def _acting(self, tensors: Tensors, without: frozenset[str]) -> list[Acting]:
        """Return what acts on values; an adapter at a map that something else adapts has no reference."""
        activations, maps = [], []
        for name, method, fields in self.entries:
            places = [] if name in without else _places(tensors, name, {})
            if method in PREFIXES | ADAPTERS:
                activations += [Acting(method, fields, place.module, place.tensors) for place in places]
            else:
                maps += [place.module for place in places]
        if any(each.method in ADAPTERS and each.path in maps for each in activations):
            raise NoReferenceError("an adapter at a map that is adapted")
        return activations

    def adapted(self, tensors: Tensors) -> set[tuple[str, str, Rows | None]]:
        """Return the name of every weight that a formula changes, with the adaptation and the rows."""
        weights = set()
        for name, method, _ in self.entries:
            if method in FORMULAS:
                for place in _places(tensors, name, {}):
                    weight = self._weight(place)
                    weights.add((name, weight.name, weight.rows))
        return weights

    # --- one place ----------------------------------------------------------------------------------------------

    def _change(self, place: _Place, method: str, fields: Fields, tensors: Tensors, state: dict[str, Tensor]) -> None:
        if set(place.tensors) == {"bias"}:  # biases that LoRA trains where it adapts no weight
            self._replace(f"{place.module}.bias".lstrip("."), tensors["bias"], state)
            return
        weight = self._weight(place)
        stored = self._now(weight.name, state)
        bias_name = f"{weight.name.rpartition('.')[0]}.bias".lstrip(".")
        bias = self._now(bias_name, state) if weight.layout != "experts" and bias_name in self._stored else None
        index = weight.index(stored)
        seen = weight.seen(stored).index_select(-2, index)
        own = bias.index_select(0, index) if bias is not None else None
        if "bias" in place.tensors:
            own = place.tensors["bias"]
        changed, moved = FORMULAS[method](fields, tensors, seen, own)
        state[weight.name] = weight.put(stored, changed)
        if bias is not None and moved is not None:
            state[bias_name] = bias.index_copy(0, index, moved)

    def _stand_in(self, place: _Place, fields: Fields, state: dict[str, Tensor]) -> None:
        for part, value in place.tensors.items():
            if part.endswith(("_seed", "_indices")):
                continue
            if part == "added":
                raise NoReferenceError("a bias where the model has none")
            name = self._named(place.module, part)
            if part == "bias" and place.part:
                stored = self._now(name, state)
                index = self._weight(place).index(self._stored[name.removesuffix("bias") + "weight"])
                self._replace(name, stored.index_copy(0, index, value), state)
                continue
            if value.shape == self._stored[name].shape and not place.part and "rows" not in fields:
                self._replace(name, value, state)
                continue
            weight = self._weight(place)
            if weight.name != name:
                raise NoReferenceError(f"rows of {name}")
            stored = self._now(name, state)
            index = weight.index(stored)
            if fields.get("rows") is not None:
                index = index[_row_numbers(fields, len(index))]
            if weight.layout == "columns" and not isinstance(self._modules[place.module], nn.Embedding):
                value = value.mT
            elif weight.layout == "kernel":
                value = value.flatten(1)
            elif isinstance(self._modules[place.module], nn.Embedding):
                self._replace(name, stored.index_copy(0, _row_numbers(fields, len(stored)), value), state)
                continue
            whole = weight.seen(stored).index_copy(-2, index, value)
            self._replace(name, whole.mT if weight.layout == "columns" else whole.reshape(stored.shape), state)

    def _add(self, place: _Place, method: str, fields: Fields, state: dict[str, Tensor]) -> None:
        if place.part:
            raise NoReferenceError(f"{method} at rows of a weight")
        t = place.tensors
        parts = [n.removesuffix("_delta") for n in t if n.endswith("_delta")]
        for part in parts:
            name = self._named(place.module, part)
            stored = self._now(name, state)
            flat = stored.flatten().index_add(0, t[f"{part}_indices"].long(), t[f"{part}_delta"].to(stored.dtype))
            self._replace(name, flat.view(stored.shape), state)
        if method == "diff_pruning":
            low, high = fields["stretch"]

            def gate(alpha: Tensor) -> Tensor:
                opened: Tensor = torch.sigmoid(alpha) * (high - low) + low
                return opened.clamp(0, 1)

            for part in [n.removesuffix("_w") for n in t if n.endswith("_w")]:
                name = self._named(place.module, part)
                own = gate(t[f"{part}_alpha"]) * t[f"{part}_w"]
                if fields["structured"]:
                    own = own * gate(t[f"{part}_group"])
                stored = self._now(name, state)
                self._replace(name, stored + own.view(stored.shape), state)

    # --- names --------------------------------------------------------------------------------------------------

    def _now(self, name: str, state: Mapping[str, Tensor]) -> Tensor:
        return state[name] if name in state else self._stored[name]

    def _named(self, module: str, part: str) -> str:
        """Return the name of a module's tensor; ``part`` may be what another module calls it that shares it."""
        name = f"{module}.{part}".lstrip(".")
        if name in self._stored:
            return name
        for own, tensor in self._modules[module].named_parameters(recurse=False):
            if any(other is tensor and known.endswith(f".{part}") for known, other in self._stored.items()):
                return f"{module}.{own}"
        raise NoReferenceError(f"a tensor called {name}")

    def _replace(self, name: str, value: Tensor, state: dict[str, Tensor]) -> None:
        """Let a value stand in for a tensor under all of its names: whoever reads it reads the trained one."""
        for other, tensor in self._stored.items():
            if tensor is self._stored[name]:
                state[other] = value

    def _weight(self, place: _Place) -> Weight:
        """Return the weight that an adapter tensor belongs to."""
        module = self._modules.get(place.module)
        if module is None:
            raise NoReferenceError(f"a place called {place.module}")
        name = f"{place.module}.weight".lstrip(".")
        parameter, _, part = place.part.rpartition(".")
        if isinstance(module, Part) and parameter:
            known = {path: rows for role, (path, rows) in module.roles.items() if role.endswith(f".{part}")}
            if parameter not in known:
                raise NoReferenceError(f"the part {place.part} of {place.module}")
            return Weight(f"{place.module}.{parameter}", "rows", known[parameter])
        if isinstance(module, Part) or type(module).__name__.endswith("Experts"):
            return _expert(module, place)
        layout = _layout(module)
        return Weight(name, layout, self._rows(place) if place.part else None)

    def _rows(self, place: _Place) -> Rows | None:
        parent, _, child = place.module.rpartition(".")
        owner = self._modules[parent]
        roles = owner.roles if isinstance(owner, Part) else _library_roles(owner, child)
        known = [rows for role, (path, rows) in roles.items() if role.endswith(f".{place.part}") and path == child]
        if not known:
            raise NoReferenceError(f"the part {place.part} of {place.module}")
        return known[0]


def _row_numbers(fields: Fields, count: int) -> Tensor:
    """Return the numbers of the rows that a spec lists, of so many."""
    return torch.tensor(sorted({int(row) % count for row in fields["rows"]}))


def _places(tensors: Tensors, adaptation: str, shared: dict[str, Tensor]) -> list[_Place]:
    """Return the places of an adaptation; what all of them share goes to ``shared``."""
    places: dict[tuple[str, str], _Place] = {}
    for name, value in tensors.items():
        module, _, rest = (
            ("", "", name.removeprefix("graftc.")) if name.startswith("graftc.") else name.partition(_PART)
        )
        own, _, path = rest.partition(".")
        if own != adaptation:
            continue
        middle, _, part = path.rpartition(".")
        if not module and not middle:
            shared[part] = value
            continue
        places.setdefault((module, middle), _Place(module, middle)).tensors[part] = value
    return list(places.values())


def _layout(module: nn.Module) -> str:
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return "kernel"
    if isinstance(module, Conv1D | nn.Embedding):
        return "columns"
    if isinstance(module, nn.Linear) or isinstance(getattr(module, "weight", None), Tensor):
        return "rows"
    raise NoReferenceError(f"a weight of {type(module).__name__}")


def _expert(module: nn.Module, place: _Place) -> Weight:
    layout = module.stacked.get(place.part) if isinstance(module, Part) else "rows"
    if layout is None or not isinstance(getattr(module, place.part, None), Tensor):
        raise NoReferenceError(f"the part {place.part} of {place.module}")
    return Weight(f"{place.module}.{place.part}", layout)


def _library_roles(owner: nn.Module, child: str) -> dict[str, tuple[str, Rows | None]]:
    """Return the rows of GPT-2's and GPT-NeoX's fused projections, as their code splits them."""
    weight = owner.get_submodule(child)
    if child == "c_attn" and isinstance(weight, Conv1D):
        width = weight.weight.shape[0]
        return {f"attn.{p}": (child, ((i * width, (i + 1) * width),)) for i, p in enumerate("qkv")}
    if child == "query_key_value":
        heads: Any = owner.config.num_attention_heads  # type: ignore[union-attr]
        size = weight.weight.shape[0] // (3 * heads)  # type: ignore[index]
        return {
            f"attn.{p}": (child, tuple(((3 * h + i) * size, (3 * h + i + 1) * size) for h in range(heads)))
            for i, p in enumerate("qkv")
        }
    return {}


def leaves(outputs: Any) -> list[Tensor]:
    """Return the floating-point tensors of outputs, without a cache."""
    if isinstance(outputs, Mapping):
        outputs = [value for name, value in outputs.items() if name not in ("cache", "past_key_values")]
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
