"""How a method is written in peft's checkpoints: one table for each method, beside its spec. Torch-free.

A table is data. `graftc.runtime.interop.peft` reads and writes by it, and knows no method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

__all__ = ["Form", "PeftFormat", "PeftList", "PeftPart"]

Form: TypeAlias = Literal["down", "up", "vector", "column", "scale", "same", "rows"]
"""How peft stores a tensor that is here ``[..., rank, in]`` (`down`), ``[..., out, rank]`` (`up`) or ``[n]``.

`down` and `up`: a convolution's have its kernel, those of experts are joined to one matrix. `vector`: ``[n]``, of a
convolution ``[1, n, 1, 1]``. `column`: ``[n, 1]``. `scale`: ``[n, 1]`` at an output, ``[1, n]`` at an input. `rows`: as
here, in the order of the config's list. `same`: as here."""


@dataclass(frozen=True)
class PeftPart:
    """A tensor of a method.

    Attributes:
        key: what stands behind the module's path: ``lora_A.weight``.
        form: how the tensor is stored.
        table: the key at an embedding table; None is `key`.
        rank: which axis of our tensor counts a rank up to which zeros fill it; None where it is whole.
        nested: the key where the method stands beside another one.
        axes: how many axes the tensor may have in a file; of others, peft makes another product. None: any number.
    """

    key: str
    form: Form = "same"
    table: str | None = None
    rank: int | None = None
    nested: str | None = None
    axes: tuple[int, ...] | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key that it may have."""
        return tuple(dict.fromkeys(key for key in (self.key, self.table, self.nested) if key is not None))


@dataclass(frozen=True)
class PeftList:
    """A list of modules in peft's config that gives a field of ours one of two values.

    Attributes:
        field: the field of ours.
        otherwise, listed: its values at modules that are not in the list, and at those that are.
        value: which of the two it is at a site: from the spec there and the site's roles.
    """

    field: str
    otherwise: Any
    listed: Any
    value: Callable[[Any, Sequence[str]], Any]


@dataclass(frozen=True)
class PeftFormat:
    """A method in peft's files.

    Attributes:
        types: peft's names of it; the first is written.
        parts: tensors at a site, by our part.
        shared: tensors of the adaptation as a whole, by our part; they may be absent if `drawn` says from what they
            are drawn again.
        drawn: the field of the config that says whether `shared` is in the file.
        derived: parts that follow from the base and the config, and are in no file.
        joined: the one tensor that holds all parts of all sites side by side, and the axis along which it does.
        when: what a config of this type says if it is this method: field and value.
        fields: fields of the config that are fields of the spec: theirs, then ours.
        values: of such fields, what their values are here; others are refused.
        starts: of fields of the config that say how training starts, what each value is here, as fields of the spec;
            others are refused where the config stands for a spec.
        unnamed: by field of the config, what is written for values of ours that peft has no word for, and of which
            nothing remains in what has been trained.
        patterns: fields of the config with other values of a field of ours for some modules: theirs, then ours.
        lists: lists of modules in the config, by field.
        constant: fields of the spec that a checkpoint always has.
        absent: what a config means that leaves a field out, where that is not our default: by field of the spec.
        fixed: fields of the config that have only this value here; others are refused.
        ignored: fields of the config that change nothing about what has been trained.
        training: fields of the spec that are about training or initial values, so that a file need not have them.
        written: fields of the config that are written and not read, from the spec.
        turned: whether the config says that weights are stored as ``[in, out]``.
        parameters: whether the config may name parameters of modules; without dropout of what they read.
    """

    types: tuple[str, ...]
    parts: Mapping[str, PeftPart] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    drawn: str | None = None
    derived: frozenset[str] = frozenset()
    joined: tuple[str, int] | None = None
    when: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    starts: Mapping[str, Mapping[Any, Mapping[str, Any]]] = field(default_factory=dict)
    unnamed: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    patterns: Mapping[str, str] = field(default_factory=dict)
    lists: Mapping[str, PeftList] = field(default_factory=dict)
    constant: Mapping[str, Any] = field(default_factory=dict)
    absent: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    training: frozenset[str] = frozenset()
    written: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    turned: bool = False
    parameters: bool = False

    @property
    def known(self) -> frozenset[str]:
        """Every field of the config that the table says something about."""
        named = (self.when, self.fields, self.patterns, self.lists, self.fixed)
        own = frozenset(name for names in named for name in names)
        return own | self.ignored | ({self.drawn} if self.drawn else frozenset())


LORA_FIXED: Mapping[str, Any] = MappingProxyType(
    {
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "layer_replication": None,
        "lora_bias": False,
        "alora_invocation_tokens": None,
        "use_qalora": False,
        "use_bdlora": None,
        "arrow_config": None,
        "kasa_config": None,
        "velora_config": None,
        "monteclora_config": None,
        "corda_config": None,
        "lora_ga_config": None,
    }
)
"""Options of peft's LoRA, and what says that they are off: each of them makes another function of the tensors."""

LORA_IGNORED: frozenset[str] = frozenset(
    {"loftq_config", "eva_config", "qalora_group_size", "runtime_config", "ensure_weight_tying"}
)
"""Options of peft's LoRA that are about training or initial values."""

LORA_STARTS: Mapping[Any, Any] = MappingProxyType(
    {True: "kaiming", False: "kaiming", "eva": "kaiming", "orthogonal": "kaiming", "gaussian": "gaussian"}
    | {"pissa": "pissa", "olora": "olora"}
)
"""Initialisers of peft's LoRA. Of those that leave the base as it is, nothing remains in what has been trained."""

AS_USUAL: Mapping[Any, Mapping[str, Any]] = MappingProxyType({True: {}})
"""What a switch of peft's initial values has to say: that they are the method's own."""

NO_DROPOUT: Mapping[Any, Mapping[str, Any]] = MappingProxyType({0: {}})
"""What a kind of dropout has to say that there is none of here."""
