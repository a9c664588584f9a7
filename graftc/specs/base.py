"""The base class of every method's spec, and of the overrides that change its values at some sites."""

from __future__ import annotations

import keyword
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import GetJsonSchemaHandler, field_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from graftc.specs.base_model import Items, SpecModel
from graftc.specs.claims import Claims
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import quoted
from graftc.specs.limits import NAME
from graftc.specs.overrides import Override
from graftc.specs.peft import PeftFormat
from graftc.specs.roles import ROLES
from graftc.specs.schema import AdaptationName, needs_one_of
from graftc.specs.spec_errors import refuse
from graftc.specs.target import AsTarget, Target

__all__ = [
    "OWNERS",
    "RESERVED_NAMES",
    "Invoked",
    "Items",
    "MethodSpec",
    "NamedSpec",
    "Override",
    "SpecModel",
    "VirtualRun",
    "Where",
    "check_name",
    "start_input",
]

Where: TypeAlias = Literal["front", "after_bos", "suffix"] | int
"""The position of virtual tokens: before all tokens of a row, after its first, after its last real one; or after the
first token with this id, and after the last real one in a row without it."""


@dataclass(frozen=True)
class VirtualRun:
    """A run of virtual tokens, inserted together among the tokens of a text.

    Attributes:
        length: their number.
        where: their position in each row.
    """

    length: int
    where: Where


_NAME = r"[A-Za-z_][A-Za-z0-9_]*"


class NamedSpec(SpecModel):
    """Base of the entries of a spec that own tensors under a name."""

    name: AdaptationName | None = None

    @field_validator("name")
    @classmethod
    def _name_is_usable(cls, value: str | None) -> str | None:
        if value is not None and (error := check_name(value)) is not None:
            refuse((), error)
        return value


class MethodSpec(NamedSpec):
    """Base of every method's spec.

    A subclass sets ``method: Literal["tag"] = "tag"``, the class variables ``claims`` and ``paper``, its
    hyper-parameters with docstrings, and, where its placement is part of its definition, a default for
    ``target``. A field ``overrides: Items[SomeOverride] = ()`` makes its values vary by site.
    """

    claims: ClassVar[Claims]
    """The method's claims, which the contract tests check."""

    mechanism: ClassVar[str | None] = None
    """For a preset, which sets defaults of another method and has no code of its own: the tag of that method."""

    one_of: ClassVar[tuple[str, ...]] = ()
    """Fields of which exactly one must be set; examples show the first."""

    sizes: ClassVar[tuple[str, ...]] = (
        "rank",
        "bottleneck",
        "reduction",
        "length",
        "equivalent_rank",
        "entries",
        "fraction",
        "density",
        "n_of_m",
    )
    """Fields that define the size of an adaptation at a site; a field that is set takes precedence over a default, and
    an earlier field over a later one."""

    paper: ClassVar[str] = ""
    """The paper to cite: authors, year and title."""

    peft: ClassVar[PeftFormat | None] = None
    """The method's format in PEFT's checkpoints; None if PEFT does not have the method."""

    name: AdaptationName | None = None
    """Unique name of the adaptation; prefixes the tensors it owns. Default: the method's tag."""

    method: str
    """The method's tag."""

    target: Target
    """The sites of the model to adapt."""

    dtype: Literal["float32", "base"] = "float32"
    """Element type of the adaptation's tensors on a base in 16 bits. `float32`: they are cast where they are used, so
    that no small step of an optimiser is lost. `base`: the base's own, but for what a method computes in float32 either
    way, such as DoRA's magnitudes and the deltas of sparse methods. Wider bases have theirs."""

    @field_validator("target", mode="before")
    @classmethod
    def _target_is_a_mapping(cls, value: Any) -> Any:
        if isinstance(value, AsTarget):
            try:
                return value.to_target(cls.tag())
            except GraftError as error:
                refuse((), error)
        if isinstance(value, str):
            better = f"{{{'role' if value in ROLES else 'modules'}: {value}}}"
            message = f"target must be a mapping, not {quoted(value)}"
            refuse((), message, hint=f"did you mean {better}?", fix=(value, better))
        return value

    @field_validator("target")
    @classmethod
    def _target_says_where(cls, value: Target) -> Target:
        """Complete a target that selects no sites with the method's default, which the user's fields narrow."""
        if value.has_selector:
            return value
        default = cls.model_fields["target"].default
        if isinstance(default, Target) and default.has_selector:
            return default.model_copy(update={f: getattr(value, f) for f in value.model_fields_set})
        refuse((), "a target needs role, modules or regex")

    def for_site(
        self,
        module: str,
        roles: Collection[str] = (),
        layer: int | None = None,
        *,
        depth: int | None = None,
        parameter: str = "",
    ) -> Self:
        """Return the spec that applies to one site: with the values of the first override that matches it.

        Args:
            module: dotted path of the site's module.
            roles: every role that it matches, including prefixed forms.
            layer: its layer from 0, None outside layers.
            depth: the number of layers in its stack; needed for negative layers.
            parameter: name of its parameter, if the module has several.

        Raises:
            GraftError: GC002 if the override's values do not fit the adaptation's other values.
        """
        for override in self.override_list():
            if override.matches(module, roles, layer, depth, parameter=parameter):
                changes = override.changes()
                kept = {f: getattr(self, f) for f in self.model_fields_set - set(self.displaced_by(changes))}
                return type(self).model_validate(kept | changes)
        return self

    def displaced_by(self, changes: Mapping[str, object]) -> Collection[str]:
        """Return the fields that an override's values replace, in addition to those with the same names."""
        return ()

    def override_list(self) -> Sequence[Override]:
        """Return the overrides in order; empty for a method without overrides."""
        overrides: Sequence[Override] = getattr(self, "overrides", ())
        return overrides

    def stated_size(self) -> tuple[str, Any] | None:
        """Return the name and value of the field of `sizes` that defines the adaptation's size; None if none is set."""
        names = [name for name in self.sizes if getattr(self, name, None) is not None]
        names.sort(key=lambda name: name not in self.model_fields_set)
        return (names[0], getattr(self, names[0])) if names else None

    def usual_optimiser(self) -> str:
        """Return the name of the optimiser to assume in memory plans where the user names none."""
        return "adamw"

    def virtual_tokens(self) -> Sequence[VirtualRun]:
        """Return the virtual tokens that the method inserts among the tokens of a text; most methods insert none."""
        return ()

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        written = super().__get_pydantic_json_schema__(schema, handler)
        default = cls.model_fields["target"].default
        if not (isinstance(default, Target) and default.has_selector):
            target = handler.resolve_ref_schema(written)["properties"]["target"]
            target["allOf"] = [needs_one_of(("role", "modules", "regex"))]
        return written

    @classmethod
    def tag(cls) -> str | None:
        """Return the method's tag; None for an abstract base."""
        default = cls.model_fields["method"].default
        return default if isinstance(default, str) else None


def check_name(name: str) -> GraftError | None:
    """Return the error for an invalid adaptation name (GC002, or GC009 if it is too long), or None."""
    if len(name) > NAME:
        return GraftError("GC009", f"name {quoted(name, 40)} is too long", hint=f"a name has at most {NAME} characters")
    if not re.fullmatch(_NAME, name):
        message = f"name {quoted(name)} must consist of letters, digits and underscores, and not start with a digit"
        better = re.sub(r"\W", "_", name, flags=re.ASCII).strip("_")
        fix = (name, better) if re.fullmatch(_NAME, better) and not keyword.iskeyword(better) else None
        return GraftError("GC002", message, hint=f"for example '{better}'" if fix else None, fix=fix)
    if keyword.iskeyword(name) or name in RESERVED_NAMES or name in OWNERS.values() or name.startswith("__"):
        hint = f"for example '{name}_1'"
        return GraftError("GC002", f"name '{name}' is reserved", hint=hint, fix=(name, f"{name}_1"))
    return None


_MODULE_ATTRIBUTES = """
    T_destination add_module apply bfloat16 buffers call_super_init children compile cpu cuda double
    dump_patches eval extra_repr float forward get_buffer get_extra_state get_parameter
    get_submodule half ipu load_state_dict modules mtia named_buffers named_children named_modules
    named_parameters parameters register_backward_hook register_buffer register_forward_hook
    register_forward_pre_hook register_full_backward_hook register_full_backward_pre_hook
    register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module
    register_parameter register_state_dict_post_hook register_state_dict_pre_hook requires_grad_
    set_extra_state set_submodule share_memory smart_apply state_dict to to_empty train training type xpu
    zero_grad _apply _backward_hooks _backward_pre_hooks _buffers _call_impl _compiled_call_impl
    _forward_hooks _forward_hooks_always_called _forward_hooks_with_kwargs _forward_pre_hooks
    _forward_pre_hooks_with_kwargs _get_backward_hooks _get_backward_pre_hooks _get_name
    _is_full_backward_hook _load_from_state_dict _load_state_dict_post_hooks
    _load_state_dict_pre_hooks _maybe_warn_non_full_backward_hook _modules _named_members
    _non_persistent_buffers_set _parameters _register_load_state_dict_pre_hook
    _register_state_dict_hook _replicate_for_data_parallel _save_to_state_dict _slow_forward
    _state_dict_hooks _state_dict_pre_hooks _version _wrapped_call_impl
"""

RESERVED_NAMES: frozenset[str] = frozenset(_MODULE_ATTRIBUTES.split())
"""Attributes of ``torch.nn.Module``, including ``smart_apply`` of transformers, which a child module would hide."""

OWNERS: dict[str, str] = {"train": "trained", "tokens": "tokens"}
"""Fields of a spec that own tensors without being adaptations, and the names of these owners."""


class Invoked:
    """Mixin for the spec of a method that acts on a row only from an invocation, a sequence of token ids, on.

    Its graphs have an input for the positions, and keys and values of earlier tokens are the base's.
    """

    if TYPE_CHECKING:
        name: str | None
        invocation: Sequence[int]


def start_input(owner: str) -> str:
    """Return the name of the input with the position of each row's first adapted token.

    Args:
        owner: the adaptation, or the bank or average of parameters that it is a member of.
    """
    return f"{owner}_start"
