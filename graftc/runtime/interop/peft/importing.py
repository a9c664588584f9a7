"""Import of a peft folder into a compiled model.

The keys of the file say which modules are adapted. The spec's targets are made to resolve to exactly those, its values
come from the config, and the tensors are copied pair by pair; everything that does not fit is reported at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from graftc.compiler.capture.interface import Flags
from graftc.compiler.capture.signature import Axis
from graftc.compiler.compilation import Compilation
from graftc.compiler.inspect.snapshot import adapter_tensors
from graftc.compiler.missing_weights import check_fresh
from graftc.compiler.pipeline import StartingPoint, compile_model
from graftc.compiler.roles.structure import Structure
from graftc.runtime.interop.peft.checks import SHOWN, check_contents, check_copies, token_keys
from graftc.runtime.interop.peft.entries import entry_of
from graftc.runtime.interop.peft.expert_layouts import pairs_in
from graftc.runtime.interop.peft.folder import PeftAdapter, PeftModule, finite, read_peft, table_form
from graftc.runtime.interop.peft.forms import filled
from graftc.runtime.interop.peft.pairs import Pair, is_adapted, is_projection
from graftc.runtime.interop.peft.targets import globs, is_saved
from graftc.runtime.interop.peft.tied import once, trained_apart, trained_together
from graftc.specs.claims import SiteKind
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError, Place, warn
from graftc.specs.errors.text import quoted, some
from graftc.specs.foreign.config import CONFIG
from graftc.specs.foreign.fields import fields_of

__all__ = ["imported", "spec_for"]


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
    """Compile a model with the adapter of a folder, for `graftc.import_peft`.

    Args:
        path, model, name, cache: as for `graftc.import_peft`.
        axes, flags: the axes and flags that the model is captured with.
        structure: function that finds the model's roles.
    """
    adapter = once(read_peft(path, name, shapes=_shapes(model)), model, structure)
    _check_model(adapter, model)
    spec = spec_for(adapter, model, structure)
    try:
        compilation = compile_model(spec, model, axes, flags=flags, start=StartingPoint(use_cache=cache))
    except GraftError as error:
        raise _not_possible(adapter, model, error) from None
    check_fresh(compilation)
    _fill(adapter, compilation)
    return compilation


def _not_possible(adapter: PeftAdapter, model: nn.Module, error: GraftError) -> GraftError:
    """Return the error for a model that cannot be compiled with the adapter.

    It says that the adapter is for another base only if the model has modules in these places that peft does not adapt.
    """
    where = error.place.path if error.place is not None else ""
    if not where.startswith(("adapt[", "train", "untie")):
        return error
    message = f"the adapter cannot be put into {type(model).__name__}: {error.message}"
    modules = dict(model.named_modules(remove_duplicate=False))
    own = [module for module in adapter.modules if not module.named and table_form(module, "weight") != "same"]
    if strange := [module.path for module in own if not is_adapted(modules[module.path])]:
        what = f"the adapter is for another base than {type(model).__name__}: {strange[0]} is not a layer PEFT adapts"
        return GraftError("GC114", what, place=adapter.place, details=[*strange[1:SHOWN], error])
    table = adapter.config.format[1]
    words = {ours: theirs for theirs, ours in table.fields.items()} | {"across_groups": "target_modules"}
    field = words.get(where.rpartition(".")[2], "target_modules")
    if not where.startswith("adapt[0]"):
        field = "trainable_token_indices" if where.startswith("adapt[") else "modules_to_save"
    place = Place(str(adapter.folder / CONFIG), path=field)
    return GraftError("GC112", message, place=place, hint=error.hint, details=[error])


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def _paths(model: nn.Module) -> list[str]:
    return [path for path, _ in model.named_modules(remove_duplicate=False) if path]


def _check_model(adapter: PeftAdapter, model: nn.Module) -> None:
    """Check the file against the config and the model, before anything is compiled.

    Raises:
        GraftError: GC114 for modules that the model does not have, GC113 if config and file name different modules or
            the file contains other values of the base.
    """
    paths = _paths(model)
    known = set(paths)
    absent = [m.path for m in adapter.modules if m.path not in known]
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    absent += [name for name in adapter.trained if name not in tensors]
    modules = dict(model.named_modules(remove_duplicate=False))
    inside = [m for m in adapter.modules if m.around and m.path in known]
    if strange := [m.path for m in inside if not is_projection(m.path, modules)]:
        message = f"the file adapts {strange[0]} inside of another adapted module"
        raise GraftError("GC113", message, place=adapter.place, details=strange[1:SHOWN])
    if absent:
        count = f"{len(absent)} modules or tensors" if len(absent) > 1 else "a module or tensor"
        message = f"the adapter is for {count} that {type(model).__name__} does not have: {some(absent, 3)}"
        raise GraftError("GC114", message, place=adapter.place, details=absent[3:SHOWN])
    check_contents(adapter, paths, dict(model.named_parameters(remove_duplicate=False)))

    def read(name: str) -> Tensor | None:
        tensor = tensors[name].detach()
        return None if tensor.is_meta else tensor

    check_copies(adapter, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, read)


def spec_for(adapter: PeftAdapter, model: nn.Module, structure: Callable[[], Structure]) -> Spec:
    """Return the spec whose targets are exactly what a checkpoint adapts in a model.

    Raises:
        GraftError: GC112 for content that no spec can express.
    """
    tokens = token_keys(adapter)
    own = [m for m in adapter.modules if not tokens & set(m.keys.values())]
    rows = [m for m in adapter.modules if tokens & set(m.keys.values())]
    paths = _paths(model)
    if adapter.config.is_prompt:
        adapt = [_virtual(adapter, model, structure)]
    else:
        adapt = [_adaptation(adapter, own, paths, _shapes(model))]
    adapt += [{"method": m.spec.method, "rows": list(_rows(m)), "target": {"modules": m.target}} for m in rows]
    full = [path for path in paths if is_saved(adapter.config, path)]
    full = [path for path in full if any(name.startswith(f"{path}.") for name in adapter.trained)]
    if adapter.config.value("bias") == "all" and any(_biased(adapter, path) for path in full):
        message = "bias: all beside modules_to_save whose biases train as well has no equivalent here"
        raise GraftError("GC112", message, place=Place(str(adapter.folder / CONFIG), path="bias"))
    full = list(dict.fromkeys((*full, *trained_together(adapter, model))))
    train = [path for path in full if not any(path.startswith(f"{other}.") for other in full)]
    apart = trained_apart(adapter, model)
    more = {"train": globs(train, paths)} if train else {}
    more |= {"untie": globs(apart, paths)} if apart else {}
    return Spec.model_validate({"version": 1, "adapt": adapt, **more})


def _biased(adapter: PeftAdapter, path: str) -> bool:
    return any(name.startswith(f"{path}.") and name.endswith(".bias") for name in adapter.trained)


def _rows(module: PeftModule) -> Sequence[int]:
    return cast("Any", module.spec).rows or ()


def _adaptation(
    adapter: PeftAdapter, modules: Sequence[PeftModule], paths: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Return the entry of the spec: the values of most sites, and overrides for the others."""
    if not modules:
        raise GraftError("GC113", "the file adapts no module", place=adapter.place)
    entry = entry_of(adapter.config, modules, paths, shapes)
    if "across_groups" in type(modules[0].spec).model_fields:
        entry["across_groups"] = any(_meets_groups(adapter, module, shapes) for module in modules)
    if "rows" in entry:
        entry["rows"] = list(_rows(modules[0]))
    return entry


def _meets_groups(adapter: PeftAdapter, module: PeftModule, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether a factor reads all channels of a convolution whose kernels have those of one group."""
    own, shape = adapter.shapes.get(module.keys.get("A", ""), ()), shapes.get(module.name, ())
    return len(own) == len(shape) > 2 and not module.named and own[1] > shape[1]


def _virtual(adapter: PeftAdapter, model: nn.Module, structure: Callable[[], Structure]) -> dict[str, Any]:
    """Return the entry of a spec for virtual tokens.

    In a model with two stacks, peft's prefix is in the decoder's own attention, and its prompt in front of the
    encoder's text: of a table with rows for both stacks, it reads the first half.
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
        cross = [f.module for f in structure().findings if f.kind is SiteKind.ATTENTION and "cross." in f.role]
        entry["target"] = {"role": "decoder.attn", "exclude": globs(dict.fromkeys(cross), _paths(model))}
    return entry


def _fill(adapter: PeftAdapter, compilation: Compilation) -> None:
    """Copy the tensors into the model, once all of them are known to fit.

    Raises:
        GraftError: GC113 and GC114 with everything that does not fit.
    """
    pairs = [pair for pair in pairs_in(adapter, compilation) if not pair.again]
    store = compilation.store
    wanted = {pair.key: pair for pair in pairs}
    present = set(adapter.shapes) - set(adapter.copies.values()) - set(adapter.keys.unused)
    present -= {key for _, key in (*adapter.keys.again, *adapter.doubles)}
    lacking = [key for key, pair in wanted.items() if key not in present and not _drawn(adapter, pair)]
    problems = [f"{key}: not in the file" for key in lacking]
    problems += [f"{key}: nothing in the model takes it" for key in sorted(present - wanted.keys())]
    values: list[tuple[str, Tensor]] = []
    rounded: list[str] = []
    for pair in pairs:
        if pair.key not in present:
            continue
        own, theirs = store.get(pair.tensor), adapter.tensor(pair.key)
        value = _value(adapter, pair, own, theirs, problems)
        if value is None:
            continue
        if not finite(theirs):
            problems.append(f"{pair.key}: has values that are not finite")
        elif not own.is_meta and not torch.equal(value.to(own.dtype).to(value.dtype), value):
            rounded.append(pair.key)
        values.append((pair.tensor, value))
    problems += _left_over(adapter, compilation, pairs)
    problems += _unfilled(compilation, pairs)
    if problems:
        message = f"{len(problems)} tensors do not fit" if len(problems) > 1 else problems[0]
        details = problems[:SHOWN] if len(problems) > 1 else []
        raise GraftError("GC114" if _sizes(problems) else "GC113", message, place=adapter.place, details=details)
    if rounded:
        warn("GC116", f"{len(rounded)} adapter tensors were rounded to a narrower type, such as {rounded[0]}")
    with torch.no_grad():
        for name, value in values:
            store.get(name).copy_(value)


def _sizes(problems: Sequence[str]) -> bool:
    return all(" is [" in problem or "nothing in the model" in problem for problem in problems)


def _drawn(adapter: PeftAdapter, pair: Pair) -> bool:
    """Return whether a tensor is not in the file because it is drawn from a seed."""
    _, table = adapter.config.format
    return pair.shared and table.drawn is not None and adapter.config.value(table.drawn) is False


def _value(adapter: PeftAdapter, pair: Pair, own: Tensor, theirs: Tensor, problems: list[str]) -> Tensor | None:
    order = next((m.shaped.order for m in adapter.modules if pair.key in m.keys.values()), None)
    try:
        value = pair.read(theirs, own, order)
    except ValueError:
        value = None
    if value is not None and pair.rank is not None:
        value = filled(value, pair.rank, own.shape[pair.rank])
    if value is None or value.shape != own.shape:
        wanted = list(pair.write(own.detach()).shape)
        problems.append(f"{pair.key} is {list(theirs.shape)}, the model has room for {wanted}")
        return None
    return value


def _left_over(adapter: PeftAdapter, compilation: Compilation, pairs: Sequence[Pair]) -> list[str]:
    """Return a message for each tensor that several parts share and whose size is not that of the parts together."""
    problems = []
    for key in {pair.key for pair in pairs if pair.start is not None} & adapter.shapes.keys():
        own = [pair for pair in pairs if pair.key == key]
        axis, shape = own[0].axis, adapter.shapes[key]
        size = sum(compilation.store.get(pair.tensor).shape[axis] for pair in own)
        if shape[axis] != size and not (axis == 0 and shape[0] == 2 * size):
            wanted = [size if number == axis else length for number, length in enumerate(shape)]
            problems.append(f"{key} is {list(shape)}, the model has room for {wanted}")
    return problems


def _unfilled(compilation: Compilation, pairs: Sequence[Pair]) -> list[str]:
    """Return a message for each trained tensor that no pair fills."""
    filled = {pair.tensor for pair in pairs}
    rest = [n for n, t in adapter_tensors(compilation.store) if n not in filled and t.requires_grad]
    return [f"{quoted(name)}: the file has nothing for it" for name in rest]
