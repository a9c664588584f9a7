"""Import a peft folder into a compiled model.

The file's keys determine which modules are adapted. The spec's targets resolve to exactly these modules, its values
come from the config, and the tensors are copied pair by pair. All mismatches are reported at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftc.compiler.capture.interface import Flags
from graftc.compiler.capture.signature import Axis
from graftc.compiler.compilation import Compilation
from graftc.compiler.inspect.snapshot import adapter_tensors
from graftc.compiler.missing_weights import check_fresh
from graftc.compiler.pipeline import StartingPoint, compile_model
from graftc.compiler.resolve.replicate import replicated
from graftc.compiler.roles.structure import Structure
from graftc.runtime.interop.peft.base import (
    behind_an_encoder,
    document_of,
    outermost,
    paths_of,
    rows_in,
    shapes_of,
    spec_of_entries,
)
from graftc.runtime.interop.peft.checks import (
    SHOWN,
    check_contents,
    check_convolutions,
    check_copies,
    token_keys,
)
from graftc.runtime.interop.peft.entries import entry_of
from graftc.runtime.interop.peft.expert_layouts import pairs_in
from graftc.runtime.interop.peft.folder import PeftAdapter, PeftModule, finite, read_peft, table_form
from graftc.runtime.interop.peft.forms import filled
from graftc.runtime.interop.peft.pairs import Pair, is_adapted, is_projection
from graftc.runtime.interop.peft.targets import is_saved
from graftc.runtime.interop.peft.tied import once, trained_apart, trained_together
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError, warn
from graftc.specs.errors.text import quoted, some
from graftc.specs.foreign.fields import fields_of


def imported(
    path: Path,
    model: nn.Module,
    axes: Sequence[Axis] | None,
    flags: Flags,
    *,
    name: str | None,
    cache: bool,
    structure: Callable[[], Structure],
) -> Compilation:
    """Compile a model with a folder's adapter, for `graftc.import_peft`.

    Args:
        path, model, name, cache: as for `graftc.import_peft`.
        axes, flags: the axes and flags to capture the model with.
        structure: function that returns the model's roles.
    """
    read = read_peft(path, name, shapes=shapes_of(model), whole=True)
    document = document_of(read.config)
    base = replicated(model, ranges) if (ranges := document.get("layer_replication")) else model
    adapter = once(read, base, structure)
    check_model(adapter, base)
    spec = spec_for(adapter, base, structure).model_copy(update=document)
    try:
        compilation = compile_model(spec, model, axes, flags=flags, start=StartingPoint(use_cache=cache))
    except GraftError as error:
        raise _not_possible(adapter, base, error) from None
    check_fresh(compilation)
    _fill(adapter, compilation)
    return compilation


def _not_possible(adapter: PeftAdapter, model: nn.Module, error: GraftError) -> GraftError:
    """Return the error for a model that cannot be compiled with the adapter.

    It reports that the adapter is for another base only if peft cannot adapt the modules that the model has there.
    """
    where = error.place.path if error.place is not None else ""
    if not where.startswith(("adapt[", "train", "untie")):
        return error
    message = f"the adapter cannot be applied to {type(model).__name__}: {error.message}"
    modules = dict(model.named_modules(remove_duplicate=False))
    own = [module for module in adapter.modules if not module.named and table_form(module, "weight") != "same"]
    if strange := [module.path for module in own if not is_adapted(modules[module.path])]:
        what = f"the adapter is for a base other than {type(model).__name__}: PEFT cannot adapt {strange[0]}"
        return GraftError("GC114", what, place=adapter.place, details=[*strange[1:SHOWN], error])
    table = adapter.config.format[1]
    words = {ours: theirs for theirs, ours in table.fields.items()} | {"across_groups": "target_modules"}
    field = words.get(where.rpartition(".")[2], "target_modules")
    if not where.startswith("adapt[0]"):
        field = "trainable_token_indices" if where.startswith("adapt[") else "modules_to_save"
    return GraftError("GC112", message, place=adapter.in_config(field), hint=error.hint, details=[error])


def check_model(adapter: PeftAdapter, model: nn.Module) -> None:
    """Check the file against the config and the model, before anything is compiled.

    Raises:
        GraftError: GC113 if the config and the file name different modules, GC114 if the model lacks modules, or if
            base values in the file differ from the model's.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = parameters | dict(model.named_buffers(remove_duplicate=False))
    absent = [m.path for m in adapter.modules if m.path not in modules]
    absent += [name for name in adapter.trained if name not in tensors]
    inside = [m for m in adapter.modules if m.around and m.path in modules]
    if strange := [m.path for m in inside if not is_projection(m.path, modules)]:
        message = f"the file adapts {strange[0]} inside another adapted module"
        raise GraftError("GC113", message, place=adapter.place, details=strange[1:SHOWN])
    if absent:
        count = f"{len(absent)} modules or tensors" if len(absent) > 1 else "a module or tensor"
        message = f"the adapter is for {count} that {type(model).__name__} does not have: {some(absent, 3)}"
        raise GraftError("GC114", message, place=adapter.place, details=absent[3:SHOWN])
    check_contents(adapter, paths_of(model), parameters)
    adapted = ((m.path, modules[m.path]) for m in adapter.modules)
    check_convolutions(adapter.config, adapter.in_config("target_modules"), adapted)

    def read(name: str) -> Tensor | None:
        tensor = tensors[name].detach()
        return None if tensor.is_meta else tensor

    check_copies(adapter, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, read)


def spec_for(adapter: PeftAdapter, model: nn.Module, structure: Callable[[], Structure]) -> Spec:
    """Return the spec whose targets are exactly the modules that a checkpoint adapts in a model.

    Raises:
        GraftError: GC112 for content that no spec can express.
    """
    tokens = token_keys(adapter)
    own = [m for m in adapter.modules if not tokens & set(m.keys.values())]
    rows = [m for m in adapter.modules if tokens & set(m.keys.values())]
    entry = _virtual(adapter, model, structure) if adapter.config.is_prompt else _adaptation(adapter, own, model)
    beside = [{"method": m.spec.method, "rows": rows_in(m.spec), "target": {"modules": m.target}} for m in rows]
    saved = [path for path in paths_of(model) if is_saved(adapter.config, path)]
    trained = {path: [name for name in adapter.trained if name.startswith(f"{path}.")] for path in saved}
    full = [path for path, names in trained.items() if names]
    if adapter.config.value("bias") == "all" and any(name.endswith(".bias") for path in full for name in trained[path]):
        message = "bias: all has no equivalent here if modules in modules_to_save train their biases as well"
        raise GraftError("GC112", message, place=adapter.in_config("bias"))
    train = outermost(dict.fromkeys((*full, *trained_together(adapter, model))))
    return spec_of_entries([entry, *beside], train, trained_apart(adapter, model), model)


def _adaptation(adapter: PeftAdapter, modules: Sequence[PeftModule], model: nn.Module) -> dict[str, Any]:
    """Return the spec's entry, with the most common values and with overrides for sites that differ."""
    if not modules:
        raise GraftError("GC113", "the file does not adapt any module", place=adapter.place)
    shapes = shapes_of(model)
    entry = entry_of(adapter.config, modules, paths_of(model), shapes)
    if "across_groups" in type(modules[0].spec).model_fields:
        entry["across_groups"] = any(_meets_groups(adapter, module, shapes) for module in modules)
    return entry


def _meets_groups(adapter: PeftAdapter, module: PeftModule, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether a factor reads all channels of a convolution whose kernels read only those of one group."""
    own, shape = adapter.shapes.get(module.keys.get("A", ""), ()), shapes.get(module.name, ())
    return len(own) == len(shape) > 2 and not module.named and own[1] > shape[1]


def _virtual(adapter: PeftAdapter, model: nn.Module, structure: Callable[[], Structure]) -> dict[str, Any]:
    """Return the spec entry for virtual tokens.

    In an encoder-decoder model, peft puts a prefix in the decoder's self-attention, and a prompt in front of the
    encoder's text: it reads only the first half of a table with rows for both stacks.
    """
    entry = fields_of(adapter.config)
    key = adapter.keys.joined
    if key is None:
        raise GraftError("GC113", "the file has no virtual tokens", place=adapter.place)
    shape, length = adapter.shapes[key], entry.get("length")
    if len(shape) != 2 or not isinstance(length, int) or shape[0] not in (length, 2 * length):
        message = f"{key} is {list(shape)}, which is not a table of {length} virtual tokens"
        raise GraftError("GC113", message, place=adapter.place)
    _, table = adapter.config.format
    if table.joined == (key, 1) and adapter.config.task_type == "SEQ_2_SEQ_LM":
        entry["target"] = behind_an_encoder(model, structure)
    return entry


def _fill(adapter: PeftAdapter, compilation: Compilation) -> None:
    """Copy the tensors into the model once all of them are known to fit.

    Raises:
        GraftError: GC113 if tensors are missing or not finite, GC114 if there are only tensors of another model; both
            list every mismatch.
    """
    every = pairs_in(adapter, compilation)
    pairs, repeated = [p for p in every if not p.again], [p for p in every if p.repeats]
    store = compilation.store
    wanted = {pair.key: pair for pair in pairs}
    present = set(adapter.shapes) - set(adapter.copies.values()) - set(adapter.keys.unused)
    present -= {key for _, key in (*adapter.keys.again, *adapter.doubles)}
    lacking = [key for key, pair in wanted.items() if key not in present and not _drawn(adapter, pair)]
    lacking += [pair.key for pair in repeated if pair.key not in present]
    damaged = [f"{key}: not in the file" for key in lacking]
    damaged += [f"{p.key} differs from {p.repeats}, but {p.part!r} is shared" for p in repeated if _differs(adapter, p)]
    present -= {pair.key for pair in repeated}
    of_others = [f"{key}: nothing in the model uses it" for key in sorted(present - wanted.keys())]
    values: list[tuple[str, Tensor]] = []
    rounded: list[str] = []
    for pair in pairs:
        if pair.key not in present:
            continue
        own, theirs = store.get(pair.tensor), adapter.tensor(pair.key)
        value = _value(adapter, pair, own, theirs, of_others)
        if value is None:
            continue
        if not finite(theirs):
            damaged.append(f"{pair.key}: has values that are not finite")
        elif not own.is_meta and not torch.equal(value.to(own.dtype).to(value.dtype), value):
            rounded.append(pair.key)
        values.append((pair.tensor, value))
    of_others += _left_over(adapter, compilation, pairs)
    damaged += _unfilled(compilation, pairs)
    if problems := damaged + of_others:
        message = f"{len(problems)} tensors do not fit" if len(problems) > 1 else problems[0]
        details = problems[:SHOWN] if len(problems) > 1 else []
        raise GraftError("GC113" if damaged else "GC114", message, place=adapter.place, details=details)
    if rounded:
        warn("GC116", f"{len(rounded)} adapter tensors were rounded to a narrower dtype, such as {rounded[0]}")
    with torch.no_grad():
        for name, value in values:
            store.get(name).copy_(value)


def _differs(adapter: PeftAdapter, pair: Pair) -> bool:
    """Return whether a tensor that modules share has other values at one of them."""
    if not {pair.key, pair.repeats} <= adapter.shapes.keys():
        return False
    return not torch.equal(adapter.tensor(pair.key), adapter.tensor(pair.repeats))


def _drawn(adapter: PeftAdapter, pair: Pair) -> bool:
    """Return whether a tensor is missing from the file because it is drawn from a seed."""
    _, table = adapter.config.format
    return pair.shared and table.drawn is not None and adapter.config.value(table.drawn) is False


def _value(adapter: PeftAdapter, pair: Pair, own: Tensor, theirs: Tensor, problems: list[str]) -> Tensor | None:
    order = next((m.shaped.order for m in adapter.modules if pair.key in m.keys.values()), None)
    reason = ""
    try:
        value = pair.read(theirs, own, order)
    except ValueError as error:
        value, reason = None, str(error)
    if value is not None and pair.rank is not None:
        value = filled(value, pair.rank, own.shape[pair.rank])
    if value is None or value.shape != own.shape:
        wanted = list(pair.write(own.detach()).shape)
        if reason and list(theirs.shape) == wanted:
            problems.append(f"{pair.key}: {reason}")
        else:
            problems.append(f"{pair.key} is {list(theirs.shape)}, but the model needs {wanted}")
        return None
    return value


def _left_over(adapter: PeftAdapter, compilation: Compilation, pairs: Sequence[Pair]) -> list[str]:
    """Return a message for each tensor that several parts share and whose size differs from the parts' total size."""
    problems = []
    for key in {pair.key for pair in pairs if pair.start is not None} & adapter.shapes.keys():
        own = [pair for pair in pairs if pair.key == key]
        axis, shape = own[0].axis, adapter.shapes[key]
        size = sum(compilation.store.get(pair.tensor).shape[axis] for pair in own)
        if shape[axis] != size and not (axis == 0 and shape[0] == 2 * size):
            wanted = [size if number == axis else length for number, length in enumerate(shape)]
            problems.append(f"{key} is {list(shape)}, but the model needs {wanted}")
    return problems


def _unfilled(compilation: Compilation, pairs: Sequence[Pair]) -> list[str]:
    """Return a message for each trained tensor that no pair fills."""
    filled = {pair.tensor for pair in pairs}
    rest = [n for n, t in adapter_tensors(compilation.store) if n not in filled and t.requires_grad]
    return [f"{quoted(name)}: no tensor in the file fills it" for name in rest]
