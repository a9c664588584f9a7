"""Translate peft configs to specs for a given model, with the modules, heads and rows that peft itself would adapt.

A config may leave these to peft: default targets for the model type, ``all-linear``, heads for the task, layers that
another version of transformers fuses. peft adapts a copy of the model without storage, and the spec names what it
adapted.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import nn

from graftc.compat.modules import buffers_of, parameters_of
from graftc.compat.peft import merged_projections
from graftc.compiler.quantised_sources.convert import arrived
from graftc.compiler.resolve.replicate import replicated
from graftc.compiler.roles.structure import Structure
from graftc.runtime.interop.peft.base import (
    behind_an_encoder,
    document_of,
    outermost,
    paths_of,
    shapes_of,
    spec_of_entries,
)
from graftc.runtime.interop.peft.checks import check_convolutions
from graftc.runtime.interop.peft.entries import entry_of
from graftc.runtime.interop.peft.folder import ADDED, PeftModule
from graftc.runtime.interop.peft.groups import shared_unlike
from graftc.runtime.interop.peft.targets import ALL_LINEAR
from graftc.runtime.interop.peft.tied import apart_of
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError, Place, first_line, nearest, warn
from graftc.specs.errors.text import quoted, some
from graftc.specs.foreign import translated
from graftc.specs.foreign.config import AdapterConfig, beside, matching, read_config
from graftc.specs.foreign.fields import method_at, rows_of, table_rows
from graftc.specs.foreign.starts import starts_of
from graftc.specs.foreign.translate import as_data

_ADAPTER = "default"


@dataclass(frozen=True)
class _Adapted:
    """The parts of a model that peft adapts.

    Attributes:
        config: the config as completed by peft.
        modules, parameters: names of the adapted modules and parameters.
        heads: paths of modules that train in full.
        by_task: the heads that the task adds to those named in the config.
        tables: paths of tables with additional trained rows.
    """

    config: AdapterConfig
    modules: Sequence[str]
    parameters: Sequence[str]
    heads: Sequence[str]
    by_task: Sequence[str]
    tables: Sequence[str]


def spec_of(source: object, where: str, model: nn.Module, structure: Callable[[], Structure]) -> Spec:
    """Return the spec that adapts the same parts of a model as `peft.get_peft_model`.

    A config given as data does not require peft, but without peft it must name its modules.

    Args:
        source: a config, as an object or as data, or a mapping from a single name to its config.
        where: the config's path, for errors.
        model: the model, which is not changed.
        structure: function that returns the model's roles.

    Raises:
        GraftError: GC073 for several configs, GC111 for one that cannot be read, GC112 for one that peft rejects for
            this model or that has no equivalent in graftc.
    """
    data = as_data(source)
    config = read_config(data, where, whole=True)
    if document := document_of(config):
        rest = {**data, **dict.fromkeys(document)}
        deeper = replicated(model, document["layer_replication"])
        return spec_of(rest, where, deeper, structure).model_copy(update=document)
    starts = starts_of(config, where)
    try:
        import peft
    except ImportError:
        return Spec.model_validate(translated(source, where))
    if config.is_prompt:
        adapted = _adapted(peft, source, data, model, where)
        return _spec([{**translated(source, where)["adapt"][0], **_stack(config, model, structure)}], adapted, model)
    try:
        adapted = _adapted(peft, source, data, model, where)
    except GraftError:
        _check_names(config.target_modules, model, where)
        raise
    if isinstance(config.target_modules, list):
        _check_names([name for name in config.target_modules if name in _named(adapted.config)], model, where)
    at = ((path, model.get_submodule(path)) for path in adapted.modules)
    check_convolutions(adapted.config, Place(where, path="target_modules"), at)
    modules = [own for path in adapted.modules for own in _inside(_at(adapted.config, path), model)]
    _check_sharing(config, adapted, model, where)
    for name in adapted.parameters:
        path, _, parameter = name.rpartition(".")
        modules.append(_at(adapted.config, path, parameter))
    entry = {**entry_of(adapted.config, modules, paths_of(model), shapes_of(model)), **starts}
    rows = [
        {"method": beside()[0].tag(), "rows": rows_of(adapted.config, path)[0], "target": {"modules": path}}
        for path in adapted.tables
    ]
    return _spec([entry, *rows], adapted, model)


def _spec(adapt: Sequence[Mapping[str, Any]], adapted: _Adapted, model: nn.Module) -> Spec:
    """Return a spec that has the given entries and trains the heads that peft trains.

    Warn about heads that the task adds.
    """
    added = [path for path in adapted.heads if path in adapted.by_task]
    if added:
        message = f"task_type: {adapted.config.task_type} trains {some(added)} in full, as in PEFT"
        warn("GC117", message, hint="leave task_type out to train the adaptation alone")
    apart: list[str] = []
    if not adapted.config.value("ensure_weight_tying", False):
        heads = tuple(f"{path}." for path in adapted.heads)
        apart = apart_of({name for name in shapes_of(model) if name.startswith(heads)}, model)
    return spec_of_entries(adapt, adapted.heads, apart, model)


def _stack(config: AdapterConfig, model: nn.Module, structure: Callable[[], Structure]) -> dict[str, Any]:
    """Return the target of virtual keys in an encoder-decoder model; empty for other models.

    peft puts these keys in the decoder's self-attention.
    """
    if config.format[1].joined != ("prompt_embeddings", 1) or config.task_type != "SEQ_2_SEQ_LM":
        return {}
    target = behind_an_encoder(model, structure)
    return {"target": target} if target["exclude"] else {}


def _refused(field: str, what: str, where: str, hint: str | None = None) -> GraftError:
    return GraftError("GC112", what, place=Place(where, path=field), hint=hint)


_PLAIN = re.compile(r"[\w.-]*")


def _without_patterns(
    peft: ModuleType, theirs: Any, config: AdapterConfig, model: nn.Module, where: str
) -> set[str] | None:
    """Replace peft's regular expressions with names, because peft matches them without a time limit.

    Args:
        peft: the library.
        theirs: peft's config, which is changed in place.
        config: the same config, as read by graftc.
        model: the base.
        where: the config's path, for errors.

    Returns:
        The paths that the expression in `target_modules` matches; None if it is not an expression, or if peft compares
        the last segments of paths.

    Raises:
        GraftError: GC008 for an expression that takes too long, GC002 for an invalid one, GC112 for one in a field
            that accepts only names.
    """
    for field in ("modules_to_save", "layers_pattern"):
        given = config.value(field)
        for word in [given] if isinstance(given, str) else given or ():
            if not _PLAIN.fullmatch(word):
                raise _refused(field, f"{field} has the regular expression {quoted(word)}", where, "list plain names")
    paths, matched = paths_of(model), None
    if isinstance(config.target_modules, str) and config.target_modules.lower() != ALL_LINEAR:
        if old := _older_names(peft, config, model):
            selected = _last_segments(config, model, old)
        else:
            selected = matched = set(config.matcher.matching(config.target_modules, paths))
        theirs.target_modules = sorted(selected) or ["no module"]
    if isinstance(config.exclude_modules, str):
        theirs.exclude_modules = sorted(config.matcher.matching(config.exclude_modules, paths))
    for field in config.format[1].patterns:
        if config.value(field):
            setattr(theirs, field, {})
    for attribute, value in config.format[1].probe.items():
        setattr(theirs, attribute, value)
    return matched


def _last_segments(config: AdapterConfig, model: nn.Module, old: Mapping[str, str]) -> set[str]:
    """Return the names that peft derives from a regular expression when it converts the names of experts.

    They are the last segments of the matching modules, parameters and older names; peft then searches every layer for
    them.

    Args:
        config: the config that has the expression as its `target_modules`.
        model: the base.
        old: the older names, as returned by `_older_names`.
    """
    paths, pattern = paths_of(model), str(config.target_modules)
    parameters = [name.rpartition(".") for name, _ in model.named_parameters()]
    keys = [*paths, *("".join(name) for name in parameters)]
    keys += [f"{around}.{name}" for name, new in old.items() for around, _, own in parameters if own == new]
    without = config.exclude_modules or []
    out = (
        set(config.matcher.matching(without, keys))
        if isinstance(without, str)
        else {key for key in keys if any(f".{key}".endswith(f".{word}") for word in without)}
    )
    return {key.rpartition(".")[2] for key in config.matcher.matching(pattern, keys) if key not in out}


def _older_names(peft: ModuleType, config: AdapterConfig, model: nn.Module) -> Mapping[str, str]:
    """Return the names of a model's projections in transformers 4, each mapped to that of the weight containing it now.

    The result is empty if peft does not convert configs for the model. peft has several tables; a model's table is the
    one whose names peft converts.
    """
    tables = merged_projections() if config.peft_type == "LORA" else []
    if not tables:
        return {}
    from peft.utils import transformers_weight_conversion as conversion

    convert: Any = getattr(conversion, "convert_peft_config_for_transformers", None)
    for table in tables if convert is not None else ():
        probe = peft.LoraConfig(target_modules=sorted(table))
        with contextlib.suppress(ValueError):  # raised if the model has only some of these names
            convert(probe, model=model, conversions=None)
            if table.keys().isdisjoint(probe.target_modules):
                return table
    return {}


def _with_patterns(complete: dict[str, Any], config: AdapterConfig, targets: Sequence[str], where: str) -> None:
    """Restore the config's ranks and scales for individual modules, ahead of those that peft has added.

    Raises:
        GraftError: GC011 for a pattern that matches no adapted module.
    """
    for field in config.format[1].patterns:
        given = config.value(field)
        if not isinstance(given, Mapping):
            continue
        complete[field] = {**given, **(complete[field] or {})}
        for key in given:
            if not any(matching([key], name, config.matcher) for name in targets):
                message = f"{field}: {quoted(key)} matches none of the {len(targets)} adapted modules"
                raise GraftError("GC011", message, place=Place(where, path=field), hint="remove it, or correct it")


def _adapted(peft: ModuleType, source: object, data: Mapping[str, Any], model: nn.Module, where: str) -> _Adapted:
    """Let peft adapt a copy of the model without storage, and return what it adapted.

    Raises:
        GraftError: GC112, with peft's own message if peft rejects the config.
    """
    try:
        theirs = copy.deepcopy(source) if isinstance(source, peft.PeftConfig) else peft.get_peft_config(dict(data))
    except (TypeError, ValueError) as error:
        raise _refused("", f"PEFT cannot read it: {first_line(error)}", where) from None
    if hasattr(theirs, "init_lora_weights"):
        theirs.init_lora_weights = True  # initialisation by decomposition needs values
    config = read_config(data, where)
    matched = _without_patterns(peft, theirs, config, model, where)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            peft_model = peft.get_peft_model(_without_storage(arrived(model)), theirs, _ADAPTER, low_cpu_mem_usage=True)
        except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError) as error:
            message = f"PEFT cannot adapt {type(model).__name__} with it: {first_line(error)}"
            raise _refused("", message, where, "target_modules: name modules of the model, or use all-linear") from None
    tuner, base = (
        (None, peft_model.base_model)
        if theirs.is_prompt_learning
        else (peft_model.base_model, peft_model.base_model.model)
    )
    modules, parameters = (
        (tuner.targeted_module_names, tuner.targeted_parameter_names) if tuner is not None else ([], [])
    )
    if getattr(theirs, "target_modules_to_tie", None):
        message = "PEFT uses one pair of factors for the embeddings and the head that is tied to them"
        hint = "train them in full (modules_to_save), or some of their rows (trainable_token_indices)"
        raise _refused("ensure_weight_tying", f"{message}, which has no equivalent here", where, hint)
    if matched is not None:  # peft also matches listed names as suffixes of longer names
        modules = [name for name in modules if name in matched]
    complete = {field.name: getattr(theirs, field.name) for field in dataclasses.fields(theirs)}
    complete |= {field: config.value(field, complete[field]) for field in config.format[1].probe if field in complete}
    _with_patterns(complete, config, [*modules, *parameters], where)
    heads, tables = _beside(peft, base)
    named = data.get("modules_to_save") or ()
    return _Adapted(
        config=read_config(as_data(complete), where),
        modules=modules,
        parameters=parameters,
        heads=heads,
        by_task=[path for path in heads if not any(path.endswith(word) for word in named)],
        tables=tables,
    )


def _without_storage(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose tensors have shapes but no values; ties are preserved."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*parameters_of(module).values(), *buffers_of(module).values()):
            if isinstance(tensor, nn.Parameter):
                memo[id(tensor)] = nn.Parameter(torch.empty_like(tensor, device="meta"), tensor.requires_grad)
            elif tensor is not None:
                memo[id(tensor)] = torch.empty_like(tensor, device="meta")
    return copy.deepcopy(model, memo)


def _beside(peft: ModuleType, model: nn.Module) -> tuple[list[str], list[str]]:
    """Return the paths of modules that train in full and of tables with trained rows, as peft's wrappers mark them."""
    full: list[str] = []
    tables: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, peft.utils.other.ModulesToSaveWrapper):
            full.append(path)
        elif isinstance(module, peft.utils.other.TrainableTokensWrapper) and module.token_adapter.tied_adapter is None:
            tables.append(path)
    return outermost(full), tables


def _at(config: AdapterConfig, path: str, parameter: str | None = None) -> PeftModule:
    """Return a module, or one of its parameters, with the spec that applies to it."""
    spec = method_at(config, path if parameter is None else f"{path}.{parameter}")
    if "rows" in type(spec).model_fields:
        spec = table_rows(rows_of(config, path)[0], path)
    return PeftModule(path, parameter or "weight", spec, named=parameter not in (None, "weight"))


def _inside(own: PeftModule, model: nn.Module) -> list[PeftModule]:
    """Return a module, and any module inside it that peft adapts along with it.

    The only such module is the output projection of torch's `nn.MultiheadAttention`, whose update peft adds twice.
    """
    if not isinstance(model.get_submodule(own.path), nn.MultiheadAttention):
        return [own]
    path, alpha = f"{own.path}.out_proj", getattr(own.spec, "alpha", 1)
    return [own, replace(own, path=path, spec=own.spec.model_copy(update={"alpha": ADDED * alpha}))]


def _check_sharing(config: AdapterConfig, adapted: _Adapted, model: nn.Module, where: str) -> None:
    """Raise if peft shares tensors among other modules than graftc does.

    Raises:
        GraftError: GC112.
    """
    named = config.target_modules
    by_pattern = isinstance(named, str) and named.lower() != ALL_LINEAR  # which peft has been given as names
    own = config if by_pattern else adapted.config
    modules = [path for path in paths_of(model) if path in set(adapted.modules)]
    if part := shared_unlike(own, config.format[1], modules, shapes_of(model)):
        message = f"PEFT shares {part!r} among the modules that one entry of target_modules selects"
        hint = "list the last segments of the modules' paths, such as q_proj, one entry for each kind"
        raise _refused("target_modules", f"{message}, and here modules with one name share it", where, hint)


def _named(config: AdapterConfig) -> Sequence[str]:
    """Return the names in `target_modules` that peft looked for; it has replaced the others with parameters."""
    return config.target_modules if isinstance(config.target_modules, list) else ()


def _check_names(named: Sequence[str] | str | None, model: nn.Module, where: str) -> None:
    """Raise if a name in `target_modules` matches no module; peft would ignore it.

    Raises:
        GraftError: GC011.
    """
    paths = [f".{path}" for path in paths_of(model)]
    for name in named if isinstance(named, list) else ():
        if not any(path.endswith(f".{name}") for path in paths):
            close = nearest(name, dict.fromkeys(path.rpartition(".")[2] for path in paths))
            hint = f"did you mean {some(close)}?" if close else "graftc.roles(model) lists the modules"
            message = f"no module of {type(model).__name__} is named {quoted(name)}"
            raise GraftError("GC011", message, place=Place(where, path="target_modules"), hint=hint)
