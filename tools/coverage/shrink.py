"""Shrinking of a default config by the names and values of its fields, for any model.

Counts of layers, heads and experts, widths, vocabularies, positions and image sizes become small. Equal values stay
equal, and multiples stay multiples if a model needs them (heads times head size). Sub-configs are shrunken with the
same plan, so that widths that have to agree between them do.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import ResNetConfig

from tools.coverage import fields

VOCABULARY = 128
POSITIONS = 64


@dataclass(frozen=True)
class Plan:
    """The sizes to shrink to.

    Attributes:
        width: the hidden size; 0 leaves all widths and heads unchanged.
        heads: the number of attention heads of the hidden size.
        layers: the number of layers in a stack; more if there are more different kinds of layers.
        image: the height and width of images; 0 leaves them unchanged.
        fraction: the divisor of lists of widths (one per stage).
        repeats: the number of layers of every kind that are kept.
    """

    width: int = 64
    heads: int = 4
    layers: int = 2
    image: int = 32
    fraction: int = 4
    repeats: int = 1


PLANS = (
    Plan(),
    Plan(image=64),
    Plan(width=128, heads=8),
    Plan(fraction=1, image=64),
    Plan(fraction=1, image=0),
    Plan(width=0, fraction=1),
    Plan(width=0, fraction=1, image=0),
    Plan(layers=4, image=64, repeats=2),
    Plan(heads=1, image=64),
)
"""The plans, tried in this order until a model builds and runs."""


def shrink(config: Any, plan: Plan = PLANS[0]) -> Any:
    """Return a small config of the same class.

    Args:
        config: a transformers config; it is not changed.
        plan: the sizes to shrink to.

    Raises:
        Exception: the config's class refuses the values.
    """
    return _shrink(config, plan, _widths(config))


def _axes_of_rotation(cls: type) -> list[int]:
    """Return the default shares of an image's axes in a head's rotary dimensions; empty if there are none."""
    models = cls.__module__.replace(".configuration_", ".modeling_")
    spec = importlib.util.find_spec(models) if models != cls.__module__ else None
    if spec is None or spec.origin is None:
        return []
    text = Path(spec.origin).read_text(encoding="utf-8")
    known = re.search(r"mrope_section\W+\[(\d+(?:, \d+)+)\]", text)
    if known:
        return [int(part) for part in known[1].split(", ")]
    return [1, 1, 1] if "mrope_section" in text else []


def _parts(shares: Sequence[int], total: int) -> list[int]:
    """Split a total into integers in about the ratio of ``shares``; equal shares after the first stay equal."""
    rest = [max(1, total * share // sum(shares)) for share in shares[1:]]
    return [total - sum(rest), *rest]


def _is_config(value: Any) -> bool:
    return hasattr(value, "model_type") and hasattr(value, "to_dict")


def _shrink(config: Any, plan: Plan, widths: frozenset[int]) -> Any:
    values = {name: value for name, value in vars(config).items() if name in _accepted(config)}
    if type(values.get("backbone_config")).__name__ == "TimmBackboneConfig":  # its networks have only one size
        values["backbone_config"] = ResNetConfig.from_dict({"out_features": ["stage2", "stage3", "stage4"]})
    values |= {name: cls() for name, cls in _towers(config).items() if name in values and values[name] is None}
    changes: dict[str, Any] = {n: _shrink(v, plan, widths) for n, v in values.items() if _is_config(v)}
    scale = _Scale(config, plan, widths)
    for name, value in values.items():
        if not _is_config(value):
            new = scale.value(name, value)
            if new is not value:
                changes[name] = new
    changes |= scale.heads_fit(values, changes)
    changes |= scale.missing(values, changes)
    # A value that a config has set on its sub-config is not a default of the sub-config's class.
    result = type(config)(**{name: value for name, value in values.items() if isinstance(value, bool)} | changes)
    if count := len(vars(config).get("_out_indices") or ()):
        result.out_indices = list(range(len(result.stage_names)))[-count:]
    for name in vars(config).keys() - vars(result).keys():
        # Fields that the enclosing config has set on this one.
        setattr(result, name, scale.value(name, vars(config)[name]))
    return result


def _towers(config: Any) -> dict[str, type]:
    """Return the classes of the vision configs that a config may have; a model without one takes only texts."""
    known = getattr(type(config), "sub_configs", {})
    return {
        name: cls for name, cls in known.items() if name == "vision_config" and hasattr(cls, "__dataclass_fields__")
    }


def _accepted(config: Any) -> set[str]:
    """Return the fields that the config's class takes as arguments; it computes the others from them."""
    known = getattr(type(config), "__dataclass_fields__", {})
    return {name for name, field in known.items() if field.init}


def _widths(config: Any) -> frozenset[int]:
    """Return the hidden sizes of a config and its sub-configs."""
    sizes = {_first_int(config, "hidden_size"), _first_int(config, "d_model")} - {0}
    for value in vars(config).values():
        if _is_config(value):
            sizes |= _widths(value)
    return frozenset(sizes)


class _Scale:
    """Rules that compute new values for the fields of one config."""

    def __init__(self, config: Any, plan: Plan, widths: frozenset[int]) -> None:
        self.plan, self.widths = plan, widths
        self.width = _first_int(config, "hidden_size", "d_model", "n_embd", "embed_dim", "dim")
        self.heads = _first_int(config, "num_attention_heads", "n_head", "encoder_attention_heads", "num_heads")
        self.ratio = plan.width / self.width if plan.width and self.width else 1.0
        size = _first_int(config, "head_dim") or (self.width // self.heads if self.width and self.heads else 0)
        self.head_divisor = max(1, min(8, size // (plan.width // plan.heads))) if plan.width else 1
        layers = _first_int(config, "num_hidden_layers", "n_layer", "num_layers", "encoder_layers")
        self.old_layers = layers
        self.kept = _kept_layers(config, layers, max(plan.layers, _pattern(config, layers)), plan.repeats)
        self._ids = iter(range(VOCABULARY - 1, 8, -1))
        self._axes = _axes_of_rotation(type(config))

    def value(self, name: str, value: Any) -> Any:
        """Return the new value of a field; the same object if it does not change."""
        if isinstance(value, bool) or value is None:
            return value
        if isinstance(value, int):
            return self._integer(name, value)
        if isinstance(value, list | tuple):
            return self._sequence(name, value)
        if isinstance(value, Mapping) and name == "rope_parameters":
            return self._rope(value)
        return value

    def _integer(self, name: str, value: int) -> int:
        for pattern, rule in self._rules():
            if pattern.search(name):
                return rule(name, value)
        if self.plan.width and fields.WIDTHS.search(name) and not fields.NOT_WIDTHS.search(name):
            return self._scaled(value)
        return value

    def _rules(self) -> tuple[tuple[re.Pattern[str], Callable[[str, int], int]], ...]:
        plan = self.plan
        return (
            (fields.TOKENS, lambda n, v: v if v < VOCABULARY - 100 else next(self._ids)),
            (fields.VOCABULARIES, lambda n, v: VOCABULARY if v > VOCABULARY else v),
            (fields.INTERVALS, lambda n, v: min(v, plan.layers)),
            (re.compile(r"^(first_k_dense_replace|num_dense_layers)$"), lambda n, v: min(v, 1)),
            (re.compile(r"^num_kv_shared_layers$|nextn_predict"), lambda n, v: 0),
            (re.compile(r"_period$"), lambda n, v: min(v, 2)),
            (re.compile(r"_(layer_)?offset$"), lambda n, v: v if "vocab" in n else min(v, 1)),
            (fields.LAYERS, lambda n, v: min(v, len(self.kept))),
            (fields.EXPERTS, lambda n, v: min(v, 4)),
            (fields.TOP_EXPERTS, lambda n, v: min(v, 2)),
            (re.compile(r"^n_group$|^num_expert_group$"), lambda n, v: min(v, 2)),
            (re.compile(r"^topk_group$"), lambda n, v: 1),
            (fields.HEADS, lambda n, v: self._head_count(v)),
            (fields.HEAD_SIZES, lambda n, v: max(8, v // self.head_divisor // 4 * 4) if v >= 16 else v),
            (fields.POSITION_COUNTS, lambda n, v: min(v, POSITIONS)),
            (fields.WINDOWS, lambda n, v: min(v, 8)),
            (fields.INDEXED, lambda n, v: min(v, 16)),
            (fields.TOKENS_OF_IMAGES, lambda n, v: min(v, 4)),
            (fields.OF_THE_TEXT, lambda n, v: plan.width or v),
            (re.compile(r"^embed_dim$"), lambda n, v: -(-self._scaled(v) // 32) * 32 if plan.width and v >= 64 else v),
            (re.compile(r"^(image|crop)_size$"), lambda n, v: plan.image or v),
            (re.compile(r"^num_conv_pos_embeddings$"), lambda n, v: min(v, 16)),
            (re.compile(r"^context_size$"), lambda n, v: min(v, POSITIONS)),
            (re.compile(r"_per_block$"), lambda n, v: min(v, plan.layers)),
            (re.compile(r"^num_filters$"), lambda n, v: min(v, 4)),
            (re.compile(r"^upsample_groups$"), lambda n, v: min(v, plan.width or v)),
        )  # fmt: skip

    def _head_count(self, value: int) -> int:
        if not self.plan.width or value <= 2:
            return value
        if value < self.heads:
            return max(1, self.plan.heads // 2)
        return self.plan.heads

    def _scaled(self, value: int) -> int:
        if value in self.widths or value == self.width:
            return self.plan.width
        return max(8, round(value * self.ratio / 8) * 8) if value >= 16 else value

    def _sequence(self, name: str, value: Sequence[Any]) -> Any:
        length = len(value)
        if name == "attention_types":
            return [[kinds, max(1, len(self.kept) // len(kinds))] for kinds, _ in value]
        if self.old_layers and length == self.old_layers and length > len(self.kept):
            return [self._item(name, value[i]) for i in self.kept]
        if name == "backbone_out_indices" and self.old_layers:
            return list(range(len(self.kept)))[-length:]
        if (
            not fields.PINPOINTS.search(name)
            and not all(isinstance(item, int) and not isinstance(item, bool) for item in value)
        ) or not value:
            return value
        if re.search(r"(indices|indexes|idxs|ids|_layers)$", name) and self.old_layers and "token" not in name:
            inside = [i for i in value if i < len(self.kept)]
            return inside or [len(self.kept) - 1]
        if fields.TOKENS.search(name):
            return [self._integer(name, item) for item in value]
        if fields.FEATURE_LAYERS.search(name):
            return list(dict.fromkeys(max(-len(self.kept) or -1, min(item, self.plan.layers - 1)) for item in value))
        if re.search(r"^(depths?|num_block_repeats|stage_num_blocks|stage_numb_of_layers)$", name):
            return [min(item, self.plan.layers) for item in value]
        if name == "axial_pos_shape":
            return [4] * length
        if name == "axial_pos_embds_dim" and self.plan.width:
            return [self.plan.width // length] * length
        if name == "image_grid_pinpoints" and self.plan.image:
            least = min(min(size) for size in value)
            return [[side * self.plan.image // least for side in size] for size in value]
        if name in ("image_size", "crop_size") and self.plan.image:
            return [self.plan.image] * length
        if self.plan.fraction > 1 and fields.WIDTHS.search(name) and not fields.NOT_WIDTHS.search(name):
            return [max(8, item // self.plan.fraction) for item in value]
        return value

    def _item(self, name: str, item: Any) -> Any:
        return self._integer(name, item) if isinstance(item, int) and not isinstance(item, bool) else item

    def _rope(self, value: Mapping[str, Any]) -> dict[str, Any]:
        changed: dict[str, Any] = {}
        for key, item in value.items():
            if isinstance(item, Mapping):
                changed[key] = self._rope(item)
            elif key == "mrope_section":
                changed[key] = [max(1, part // self.head_divisor) for part in item]
            elif key == "original_max_position_embeddings" and isinstance(item, int):
                changed[key] = min(item, POSITIONS // 2)
            else:
                changed[key] = item
        return changed

    def heads_fit(self, values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, int]:
        """Return new head sizes that keep the product with the number of heads the same multiple of the width."""
        fitted: dict[str, int] = {}
        if not self.plan.width or not self.width:
            return fitted
        for count, size in _pairs(values):
            product, new_count = values[count] * values[size], changes.get(count, values[count])
            if product % self.width == 0:
                total = product // self.width * self.plan.width
                if total % new_count == 0:
                    fitted[size] = total // new_count
        return fitted

    def missing(self, values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """Return values for fields without a default that models need nevertheless."""
        heads = self._head_count(self.heads) if self.heads else 0
        defaults = {
            "vocab_size": VOCABULARY,
            "pad_token_id": 0,
            "head_dim": (self.plan.width or self.width) // heads if heads else 0,
            "num_key_value_heads": heads,
            "num_experts_per_tok": 2,
            "top_k_experts": 2,
            "num_experts": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "moe_intermediate_size": 32,
        }
        added: dict[str, Any] = {n: v for n, v in defaults.items() if n in values and values[n] is None}
        per_stage = values.get("num_heads")
        if self.plan.width and isinstance(per_stage, list | tuple) and isinstance(values.get("embed_dim"), int):
            added["embed_dim"] = 8 * per_stage[0]
        if not heads:
            added = {n: v for n, v in added.items() if n not in ("head_dim", "num_key_value_heads")}
        added |= {n: next(self._ids) for n in values if values[n] is None and fields.PLACES.search(n)}
        if "mlp_layer_types" in values and values["mlp_layer_types"] is None:
            added["mlp_layer_types"] = ["dense", *["sparse"] * (len(self.kept) - 1)]
        if values.get("sliding_window", 0) is None and "sliding_attention" in (values.get("layer_types") or ()):
            added["sliding_window"] = 8
        rope = changes.get("rope_parameters", values.get("rope_parameters"))
        if self.plan.width and heads and isinstance(rope, Mapping) and self._axes and "mrope_section" not in rope:
            size = changes.get("head_dim", values.get("head_dim")) or self.plan.width // heads
            added["rope_parameters"] = {
                **rope,
                "partial_rotary_factor": 1.0,
                "mrope_section": _parts(self._axes, size // 2),
            }
        if "layer_types" in values and values["layer_types"] is None:
            added["layer_types"] = ["full_attention"] * len(self.kept)
        elif values.get("layer_types") and values.get("rope_parameters") == {}:
            added["rope_parameters"] = {
                kind: {"rope_type": "default", "rope_theta": 1e4} for kind in dict.fromkeys(values["layer_types"])
            }
        return added


def _pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the names of head counts and head sizes that belong together."""
    candidates = (
        ("num_attention_heads", "head_dim"), ("num_attention_heads", "kv_channels"), ("num_heads", "d_kv"),
        ("n_head", "d_head"), ("mamba_n_heads", "mamba_d_head"), ("mamba_num_heads", "mamba_head_dim"),
        ("num_heads", "head_dim"), ("n_mamba_heads", "mamba_headdim"),
    )  # fmt: skip
    return [(a, b) for a, b in candidates if isinstance(values.get(a), int) and isinstance(values.get(b), int)]


def _pattern(config: Any, layers: int) -> int:
    """Return the length of a pattern of kinds of layers that repeats over the stack; 0 if there is none."""
    patterns = [v for v in vars(config).values() if isinstance(v, list | tuple) and 1 < len(v) < min(layers, 7)]
    return max((len(v) for v in patterns if all(isinstance(i, str) for i in v) and len(set(v)) > 1), default=0)


def _kept_layers(config: Any, layers: int, least: int, repeats: int) -> list[int]:
    """Return the layers to keep: the first ``repeats`` of every kind, and further ones up to ``least``."""
    if layers <= least:
        return list(range(max(layers, 1)))
    per_layer = [v for v in vars(config).values() if isinstance(v, list | tuple) and len(v) == layers]
    kinds: dict[str, list[int]] = {}
    for index in range(layers):
        kinds.setdefault(repr([value[index] for value in per_layer]), []).append(index)
    kept = sorted(index for indices in list(kinds.values())[:6] for index in indices[:repeats])
    kept += [i for i in range(layers) if i not in kept][: max(0, least - len(kept))]
    return sorted(kept)


def _first_int(config: Any, *names: str) -> int:
    """Return the first of these fields that is an integer, with aliases resolved; 0 if there is none."""
    for name in names:
        value = vars(config).get(getattr(config, "attribute_map", {}).get(name, name))
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return 0
