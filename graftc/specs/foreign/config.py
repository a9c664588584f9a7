"""Read ``adapter_config.json`` strictly as data, and compare it with the methods' tables.

A field is a hyperparameter of the method, a module pattern, or one of two kinds of option: those that do not affect the
trained tensors' function are ignored, and those that do are refused unless they are off. Fields that name code, such as
the base's class, are ignored: nothing is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from graftc.specs.base import MethodSpec
from graftc.specs.errors.diagnostics import GraftError, Place, correction
from graftc.specs.errors.text import quoted, reason_in, shown, some
from graftc.specs.peft import PeftFormat
from graftc.specs.regexes import RegexMatcher
from graftc.specs.registry import method_specs
from graftc.specs.regular_files import read_regular
from graftc.specs.strict_json import read_json

CONFIG = "adapter_config.json"
MOST = 16 * 2**20
"""The maximum file size in bytes: AdaLoRA writes a flag for each rank of each layer."""

_VALUES = 2**20
_INERT = frozenset({"inference_mode", "peft_version", "revision", "base_model_name_or_path"})
"""Fields of every type that describe an adapter's origin."""


_Fields = TypeVar("_Fields", bound=BaseModel)
_Rank = Annotated[int, Field(gt=0)]


class LoraFields(BaseModel):
    """The types of LoRA's own fields that engines compute with. A null rank or alpha has the right type."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)

    r: _Rank | None = None
    lora_alpha: float | None = None
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    use_qalora: bool | None = None
    lora_bias: bool | None = None
    ensure_weight_tying: bool | None = None
    bias: str = "none"
    init_lora_weights: bool | str | None = None


_Range = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2, strict=False)]


class DocumentFields(BaseModel):
    """The types of fields that concern more than the adaptation; see `PeftFormat.document`."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="ignore", strict=True, frozen=True)

    layer_replication: Annotated[list[_Range], Field(strict=False)] | None = None


class AdapterConfig(BaseModel):
    """The common fields of all types; a type's own fields are in `model_extra`, checked against its table."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    peft_type: str
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool | None = None
    peft_version: str | None = None
    auto_mapping: dict[str, Any] | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    fan_in_fan_out: bool | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    token_dim: int | None = None

    _matcher: RegexMatcher = PrivateAttr(default_factory=RegexMatcher)

    @property
    def matcher(self) -> RegexMatcher:
        """The matcher for its regular expressions, which share one time limit."""
        return self._matcher

    @property
    def own(self) -> Mapping[str, Any]:
        """The fields that are specific to its type."""
        return self.model_extra or {}

    @property
    def is_prompt(self) -> bool:
        """Whether it adds virtual tokens instead of adapting modules."""
        return self.format[1].joined is not None

    @cached_property
    def format(self) -> tuple[type[MethodSpec], PeftFormat]:
        """The equivalent method and its table.

        Raises:
            GraftError: GC112 for a type that has no equivalent method.
        """
        kinds = formats().get(self.peft_type, ())
        fitting = [
            (spec_class, table)
            for spec_class, table in kinds
            if all((self.own.get(name) or False) == value for name, value in table.when.items())
            and (table.marker is None or self.own.get(table.marker))
        ]
        if fitting:
            return min(fitting, key=lambda pair: pair[1].marker is None)
        for name in (name for _, table in kinds for name in table.when if name in self.own):
            what = f"{name}: {shown(self.own[name])} has no equivalent here"
            raise GraftError("GC112", what, place=Place(CONFIG, path=name), hint="set it to true, false or null")
        what = f"PEFT's type {quoted(self.peft_type)} is not supported"
        raise GraftError("GC112", what, hint=f"the supported types are {', '.join(sorted(formats()))}")

    def value(self, field: str, default: Any = None) -> Any:
        """Return the value of a field, whether common or specific to the type."""
        return getattr(self, field) if field in type(self).model_fields else self.own.get(field, default)


def formats() -> dict[str, list[tuple[type[MethodSpec], PeftFormat]]]:
    """Return the methods that peft also has, with their tables, by peft's type."""
    methods: dict[str, list[tuple[type[MethodSpec], PeftFormat]]] = {}
    for entry in method_specs().values():
        table = vars(entry.spec_class).get("peft")
        if isinstance(table, PeftFormat):
            for kind in table.types:
                methods.setdefault(kind, []).append((entry.spec_class, table))
    return methods


def beside() -> tuple[type[MethodSpec], PeftFormat, str]:
    """Return the method whose tensors may accompany another method's, its table, and its key in the other's config."""
    pairs = (pair for kinds in formats().values() for pair in kinds)
    return next(
        (spec_class, table, part.nested)
        for spec_class, table in pairs
        for part in table.parts.values()
        if part.nested is not None
    )


def config_bytes(path: Path) -> bytes:
    """Return the bytes of a config file.

    Raises:
        GraftError: GC111 if it cannot be read, or exceeds the maximum size.
    """
    try:
        return read_regular(path, MOST)
    except OSError as error:
        reason = error.strerror or str(error)
        raise GraftError("GC111", f"the file cannot be read: {reason}", place=Place(str(path))) from None


def read_config(raw: bytes | Mapping[str, Any], where: str, *, whole: bool = False) -> AdapterConfig:
    """Read a config from its file's bytes, or from plain data, and require that graftc knows every field.

    Args:
        raw: JSON or a mapping.
        where: the file's path, for errors.
        whole: whether the caller makes a whole spec, so that fields that concern more than the adaptation are allowed.

    Raises:
        GraftError: GC111 if it is not a config or has an unknown field; GC112 for a type or an option that has no
            equivalent here.
    """
    config = parsed_config(raw, where)
    _check_fields(config, where, whole)
    if whole:
        _typed(DocumentFields, config.own, where)
    return config


def parsed_config(raw: bytes | Mapping[str, Any], where: str) -> AdapterConfig:
    """Read a config of any type and with any options.

    Args:
        raw: JSON or a mapping.
        where: the file's path, for errors.

    Raises:
        GraftError: GC111 if it is not a config.
    """
    try:
        data = read_json(raw, MOST, values=_VALUES) if isinstance(raw, bytes) else dict(raw)
    except ValueError as error:
        raise GraftError("GC111", f"it is not valid JSON: {error}", place=Place(where)) from None
    if not isinstance(data, dict) or not isinstance(data.get("peft_type"), str):
        hint = "a PEFT config is a mapping with a peft_type"
        raise GraftError("GC111", "peft_type is missing", place=Place(where), hint=hint)
    return _typed(AdapterConfig, data, where)


def lora_fields(config: Mapping[str, Any], where: str) -> LoraFields:
    """Read the fields of LoRA from the contents of a config.

    Raises:
        GraftError: GC111 for a field of the wrong type, a rank that is not positive, and an alpha that is not finite.
    """
    return _typed(LoraFields, config, where)


def _typed(fields: type[_Fields], data: Mapping[str, Any], where: str) -> _Fields:
    try:
        return fields.model_validate(data)
    except ValidationError as error:
        details = [_explained(problem) for problem in error.errors(include_url=False, include_context=False)]
        raise GraftError("GC111", details[0], place=Place(where), details=details[1:]) from None


def _explained(problem: Mapping[str, Any]) -> str:
    path = ".".join(str(step) for step in problem["loc"])
    return f"{path} is {shown(problem.get('input'))}: {reason_in(problem['msg'])}"


def _check_fields(config: AdapterConfig, where: str, whole: bool) -> None:
    _, table = config.format
    known = table.known | _INERT | set(AdapterConfig.model_fields)
    unknown = sorted(config.own.keys() - known)
    if unknown:
        hint, _ = correction(unknown[0], known, "remove it if it does not affect the adapter's function")
        message = f"unknown fields for {config.peft_type}: {some(unknown)}"
        raise GraftError("GC111", message, place=Place(where, path=unknown[0]), hint=hint)
    numbers = (name for name in _NUMBERS if name in table.fields and name in config.own)
    if empty := [name for name in numbers if config.own[name] is None]:
        message = f"{empty[0]} is null, which PEFT cannot compute with"
        raise GraftError("GC111", message, place=Place(where, path=empty[0]))
    fixed = {**table.fixed, **({} if whole else dict.fromkeys(table.document))}
    refused = [
        (name, config.value(name)) for name, value in fixed.items() if not _same(config.value(name, value), value)
    ]
    if refused:
        wrong, *others = [f"{name}: {shown(value)} has no equivalent here" for name, value in refused]
        hint = f"this release reads checkpoints with {refused[0][0]}: {fixed[refused[0][0]]!r}".replace("None", "null")
        raise GraftError("GC112", wrong, place=Place(where, path=refused[0][0]), details=others, hint=hint)


_NUMBERS = ("r", "lora_alpha", "alpha", "init_r", "num_virtual_tokens")
"""Fields from which PEFT computes sizes and scales."""


def _same(given: Any, value: Any) -> bool:
    """Return whether an option has its supported value.

    Null means that the option is not set; an option that must be off may have any empty value.
    """
    return given is None or given == value or (not value and not given)


def matching(pattern_keys: Sequence[str], module: str, matcher: RegexMatcher) -> str | None:
    """Return the first key of peft's `rank_pattern` or `alpha_pattern` that matches a module, or None.

    Keys are regular expressions for the end of a path; plain names are compared literally.
    """
    for key in pattern_keys:
        plain = key.replace(".", "").replace("_", "").replace("-", "").isalnum()
        if module == key or (plain and module.endswith(f".{key}")):
            return key
        if not plain and matcher.matching(rf"(.*\.)?({key})", [module]):
            return key
    return None
