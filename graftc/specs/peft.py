"""Tables that describe the format of methods in PEFT's checkpoints, one per method, next to its spec. Torch-free.

A table is data: `graftc.runtime.interop.peft` reads and writes according to it, and has no code for single methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

Form: TypeAlias = Literal["down", "up", "vector", "column", "scale", "same", "rows", "places"]
"""The form in which PEFT stores a tensor that here is ``[..., rank, in]`` (`down`), ``[..., out, rank]`` (`up`) or
``[n]``.

`down` and `up`: with the kernel's axes for a convolution; joined into one matrix for experts. `vector`: ``[n]``, or
``[1, n, 1, 1]`` for a convolution. `column`: ``[n, 1]``, or ``[1, n]`` for a convolution. `scale`: ``[n, 1]`` at an
output, ``[1, n]`` at an input. `rows`: as here, in the order of the config's list. `places`: the rows and columns of
matrix entries, integers ``[2, n]``, which here are flat indices ``[n]`` in ascending order. `same`: as here."""


@dataclass(frozen=True)
class PeftPart:
    """A tensor of a method.

    Attributes:
        key: the part of the key that follows the module's path: ``lora_A.weight``.
        form: how the tensor is stored.
        table: the key at an embedding table; None means `key`.
        rank: the rank axis of our tensor, which is padded with zeros up to the full rank; None if no axis is padded.
        nested: the key when the method is used beside another one.
        axes: the numbers of axes that the tensor may have in a file; with any other number, PEFT computes a different
            product. None: any number.
        group: for a tensor that modules of one kind (`PeftFormat.kind`) share and that a file repeats for each of them,
            the field of the config with the number of consecutive modules that share it; empty if all of them do. None:
            each module has its own.
    """

    key: str
    form: Form = "same"
    table: str | None = None
    rank: int | None = None
    nested: str | None = None
    axes: tuple[int, ...] | None = None
    group: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key that the tensor may have."""
        return tuple(dict.fromkeys(key for key in (self.key, self.table, self.nested) if key is not None))


@dataclass(frozen=True)
class PeftList:
    """A list of modules in PEFT's config that sets one of our fields to one of two values.

    Attributes:
        field: our field.
        otherwise, listed: its values at modules that are not in the list, and at those that are.
        value: a function of the spec at a site and the site's roles that returns which of the two values applies there.
    """

    field: str
    otherwise: Any
    listed: Any
    value: Callable[[Any, Sequence[str]], Any]


@dataclass(frozen=True)
class PeftFormat:
    """The format of a method in PEFT's files.

    Attributes:
        types: PEFT's names for it; the first one is written.
        parts: tensors at a site, by our part.
        shared: tensors of the adaptation as a whole, by our part; if `drawn` is set, a file may omit them, since they
            can be drawn again.
        drawn: the field of the config that records whether `shared` is in the file.
        derived: parts that follow from the base and the config, and are in no file.
        joined: the one tensor that contains all parts of all sites side by side, and the axis along which they are
            joined.
        when: the fields, and their values, that identify a config of this type as this method.
        marker: a field that only this method's configs set.
        fields: fields of the config that correspond to fields of the spec: theirs, then ours.
        values: for such fields, our values by theirs; other values are refused.
        starts: for fields of the config that determine initial values, the equivalent fields of the spec, by value;
            other values are refused when a config is used as a spec.
        unnamed: by field of the config, the values to write for our values that PEFT has no name for and that leave no
            trace in trained tensors.
        patterns: fields of the config that override one of our fields for some modules: theirs, then ours.
        probe: attributes of PEFT's config, and the values with which PEFT is asked what the config adapts, if its own
            may be impossible without patterns, or for a model whose tensors have no values.
        lists: lists of modules in the config, by field.
        constant: fields of the spec that have the same value in every checkpoint.
        absent: the values that omitted fields of a config imply if they differ from our defaults, by field of the spec.
        fixed: fields of the config for which only this value is supported; others are refused.
        ignored: fields of the config that do not affect the trained function.
        training: fields of the spec that concern training or initial values, so that a file need not contain them.
        written: fields of the config that are written but not read, computed from the spec.
        document: fields of the config that correspond to fields of the whole spec, by the same name.
        turned: whether the config records that weights are stored as ``[in, out]``.
        parameters: whether the config may name parameters of modules; if so, without dropout on their input.
        layers: the classes of modules that PEFT adapts with this type; empty for all that it adapts with any type.
        kernels: the convolutions at which PEFT computes the same: all of them; those without groups; of those, the ones
            without dilation whose kernel, stride and padding are the same along both axes; or, of these, the ones whose
            kernel has a single point.
        kind: a function of a module's path; modules with the same result, and weights of the same size, are of one
            kind. PEFT's kinds are the entries of `target_modules`. None if no tensor has a `group`.
    """

    types: tuple[str, ...]
    parts: Mapping[str, PeftPart] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    drawn: str | None = None
    derived: frozenset[str] = frozenset()
    joined: tuple[str, int] | None = None
    when: Mapping[str, Any] = field(default_factory=dict)
    marker: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    starts: Mapping[str, Mapping[Any, Mapping[str, Any]]] = field(default_factory=dict)
    unnamed: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    patterns: Mapping[str, str] = field(default_factory=dict)
    probe: Mapping[str, Any] = field(default_factory=dict)
    lists: Mapping[str, PeftList] = field(default_factory=dict)
    constant: Mapping[str, Any] = field(default_factory=dict)
    absent: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    training: frozenset[str] = frozenset()
    written: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    document: frozenset[str] = frozenset()
    turned: bool = False
    parameters: bool = False
    layers: frozenset[str] = frozenset()
    kernels: Literal["any", "ungrouped", "square", "point"] = "any"
    kind: Callable[[str], str] | None = None

    @property
    def known(self) -> frozenset[str]:
        """Every field of the config that the table mentions."""
        named = (self.when, self.fields, self.patterns, self.lists, self.fixed)
        own = frozenset(name for names in named for name in names)
        return own | self.document | self.ignored | ({self.drawn} if self.drawn else frozenset())


LORA_FIXED: Mapping[str, Any] = MappingProxyType(
    {
        "megatron_config": None,
        "megatron_core": "megatron.core",
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
"""Options of PEFT's LoRA that change the function of the tensors, with the values that switch them off."""

LORA_IGNORED: frozenset[str] = frozenset(
    {"loftq_config", "eva_config", "qalora_group_size", "runtime_config", "ensure_weight_tying"}
)
"""Options of PEFT's LoRA that concern training or initial values."""

LORA_STARTS: Mapping[Any, Any] = MappingProxyType(
    {True: "kaiming", False: "kaiming", "eva": "kaiming", "orthogonal": "kaiming", "gaussian": "gaussian"}
    | {"pissa": "pissa", "olora": "olora"}
)
"""Our initialisers for LoRA, by PEFT's. Those that leave the base unchanged leave no trace in trained tensors."""

AS_USUAL: Mapping[Any, Mapping[str, Any]] = MappingProxyType({True: {}})
"""The only supported value of a switch for PEFT's initial values, which selects those of the method itself."""

NO_DROPOUT: Mapping[Any, Mapping[str, Any]] = MappingProxyType({0: {}})
"""The only supported value of a kind of dropout that does not exist here."""
