"""Read updates from a folder that peft wrote; the base's class, on the meta device, shows how weights are stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from graftc.files.tensors.folder import TensorFolder
from graftc.passes.core.method.capabilities import RowWise
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.weights.store import Store
from graftc.passes.core.weights.weight_slice import Layout, WeightSlice
from graftc.runtime.interop.peft.checks import check_contents, check_convolutions, check_copies
from graftc.runtime.interop.peft.folder import PeftAdapter, PeftModule, peft_digest, read_peft, table_form
from graftc.runtime.sources.models import load_folder
from graftc.runtime.streaming.names import FileNames
from graftc.runtime.streaming.update import AdapterUpdates, Replacement, SiteUpdate
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.foreign.config import CONFIG, config_bytes, read_config

NAME = "adapter"
"""The adaptation's name, since peft checkpoints do not contain one."""
_UNTIED = "save a base with tie_word_embeddings false, whose files have both tensors, and merge into that"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def base_named_by(path: Path) -> Path | None:
    """Return the folder that an adapter's config names as its base; None if there is none on this machine."""
    try:
        named = read_config(config_bytes(path / CONFIG), CONFIG).base_model_name_or_path
        return Path(named) if named and (Path(named) / "config.json").is_file() else None
    except (OSError, ValueError, GraftError):  # errors in the config are reported when the adapter is read
        return None


def peft_updates(path: Path, checkpoint: TensorFolder) -> AdapterUpdates:
    """Return the changes that a peft adapter makes to a checkpoint.

    Raises:
        GraftError: GC022 for a tied weight, GC100 for files that lack tensors, GC102, which lists all modules that the
            base does not have, GC103 for an adaptation that does not fold into a stored matrix, GC110 to GC114 for a
            folder that peft would not write or that has tensors of another base.
    """
    adapter = read_peft(path)
    model = load_folder(checkpoint.path, meta=True)
    aliases = Store.mirror(model).aliases
    names = FileNames(checkpoint, aliases)
    names.fit(name for name, _ in model.named_parameters())
    modules = dict(model.named_modules())
    wrong = [f"it has no {module.path}" for module in adapter.modules if module.path not in modules]
    wrong += [f"it has no {name}" for name in adapter.trained if names.find(name) is None]
    if wrong:
        hint = "use the base that the adapter was trained on"
        message = f"{path} adapts a model other than {checkpoint.path}: {wrong[0]}"
        raise GraftError("GC102", message, hint=hint, details=wrong[1:30])
    adapted = ((m.path, modules[m.path]) for m in adapter.modules)
    check_convolutions(adapter.config, adapter.in_config("target_modules"), adapted)
    check_contents(adapter, list(modules), dict(model.named_parameters(remove_duplicate=False)))
    _check_complete(adapter, model, checkpoint, names)
    _check_copies(adapter, model, checkpoint, names)
    tied = {*aliases, *aliases.values()}
    if tied_copies := [name for name in adapter.trained if name in tied]:
        message = f"{tied_copies[0]} was trained separately from a tensor it is tied to in the base: both would change"
        raise GraftError("GC022", message, hint=_UNTIED, details=tied_copies[1:])
    shared = adapter.shared()
    updates = tuple(_update(adapter, module, modules[module.path], names, tied, shared) for module in adapter.modules)
    trained = adapter.trained.items()
    copies = tuple(Replacement("trained", name, names.of(name), adapter.tensor(key)) for name, key in trained)
    config, order = json.dumps(dict(adapter.config.own)), tuple(name for name, _ in model.named_parameters())
    return AdapterUpdates("peft", updates, copies, peft_digest(adapter.folder), "", config, order)


def _check_complete(adapter: PeftAdapter, model: nn.Module, checkpoint: TensorFolder, names: FileNames) -> None:
    """Refuse a base if its files, or their index, lack tensors of its class that the adapter does not provide.

    If the files have tensors that the class does not have, they may merely use different names, so nothing is refused.
    """
    lacking = [name for name, _ in model.named_parameters() if names.find(name) is None and name not in adapter.trained]
    own = [name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())]
    if lacking and not checkpoint.entries.keys() - {names.find(name) for name in own}:
        message = f"the files of {checkpoint.path} lack {len(lacking)} tensors of {type(model).__name__}: {lacking[0]}"
        hint = "copy the base again; an index has to list every tensor in the files"
        raise GraftError("GC100", message, hint=hint, details=lacking[1:30])


def _check_copies(adapter: PeftAdapter, model: nn.Module, checkpoint: TensorFolder, names: FileNames) -> None:
    """Refuse an adapter whose copies of the base's tensors differ from those in the base's files."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]

    def read(name: str) -> Tensor | None:
        stored_name = names.find(name)
        # Files lack buffers that a class computes itself.
        return None if stored_name is None else checkpoint[stored_name]

    check_copies(adapter, {name: tuple(tensor.shape) for name, tensor in tensors}, read)


def _update(
    adapter: PeftAdapter,
    peft_module: PeftModule,
    module: nn.Module,
    names: FileNames,
    tied: set[str],
    shared: Mapping[str, Tensor],
) -> SiteUpdate:
    layout, method = _layout(module), method_for(peft_module.spec.method)
    # If the config names the parameter itself, peft's first factor belongs to the last axis.
    turned = peft_module.named and layout is Layout.COLUMNS
    if peft_module.parameter != "weight" or peft_module.depth or method.stands_in or layout is None or turned:
        what = f"{peft_module.spec.method} at {peft_module.name}, a {type(module).__name__},"
        raise GraftError("GC103", f"{what} does not fold into a stored matrix")
    if peft_module.name in tied:
        raise GraftError("GC022", f"{peft_module.name} is tied to another weight, which would change too", hint=_UNTIED)
    groups = int(getattr(module, "groups", 1))
    pair = {"down", "up"} <= {table_form(peft_module, part) for part in peft_module.keys}
    if layout is Layout.KERNEL and (method.reads_channels(peft_module.spec) or (groups > 1 and pair)):
        raise GraftError(
            "GC103",
            f"{peft_module.spec.method} at {peft_module.name} reads channels, so it does not fold into a matrix",
        )
    spec = method.standing_alone(peft_module.spec, ()) if isinstance(method, RowWise) else peft_module.spec
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    own = WeightSlice(names.of(peft_module.name), tuple(weight.shape), layout)
    own_bias = own.companion(names.of(f"{peft_module.path}.bias")) if isinstance(bias, Tensor) else None
    return SiteUpdate(
        NAME,
        spec,
        peft_module.name,
        own,
        own_bias,
        type(module) is nn.Embedding,
        lambda: {**adapter.tensors(peft_module), **shared},
    )


def _layout(module: nn.Module) -> Layout | None:
    """Return how a layer stores its weight; None for a class whose use of the weight is unknown."""
    from transformers.pytorch_utils import Conv1D

    if type(module) is nn.Linear:
        return Layout.ROWS
    if type(module) in _CONVOLUTIONS:
        return Layout.KERNEL
    return Layout.COLUMNS if type(module) in (Conv1D, nn.Embedding) else None
