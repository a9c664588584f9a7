"""The Python interface: compile, load, check, roles, select."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from graftc.compiler.capture.attempts import first_capture
from graftc.compiler.capture.capture import Capture
from graftc.compiler.capture.capture_cache import captured
from graftc.compiler.capture.interface import ExampleInputs, Flags, Interface
from graftc.compiler.capture.isolation import exclusive, seldom_collected
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.capture.signature import Axis, request
from graftc.compiler.capture.source_model import require_plain
from graftc.compiler.compilation import Compilation
from graftc.compiler.inspect.report import report
from graftc.compiler.inspect.snapshot import Snapshot, base_snapshot
from graftc.compiler.missing_weights import check_fresh
from graftc.compiler.pipeline import StartingPoint, compile_model
from graftc.compiler.quantised_sources.convert import arrived
from graftc.compiler.resolve.selectable import ModelStructure, Selectable, selectable
from graftc.compiler.resolve.selection import Selection
from graftc.compiler.roles.structure import Structure, roles_of
from graftc.passes.core.ir.program import Program
from graftc.passes.core.progress import shown
from graftc.passes.core.weights.store import Store
from graftc.records.report import Report
from graftc.runtime.artifact.written import follow
from graftc.runtime.compiled import Compiled, make_compiled
from graftc.runtime.model.runner import Source, runner_of
from graftc.runtime.seeds import starting_seed
from graftc.runtime.sources.models import load_folder, load_hub
from graftc.runtime.sources.processors.example import processor_example
from graftc.runtime.sources.reference import is_hub_id
from graftc.runtime.swapped_arguments import check_folder_and_model, check_spec_and_model
from graftc.specs.document import Spec
from graftc.specs.errors.arguments import as_path, as_seed
from graftc.specs.errors.calls import public
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.io import load_spec

SpecLike = Spec | Mapping[str, Any] | str | Path


@public("graftc.compile")
def compile(
    spec: SpecLike,
    model: Source,
    example_inputs: ExampleInputs | None = None,
    *,
    seed: int | None = None,
    cache: bool = True,
    progress: bool | None = None,
) -> Compiled[Source]:
    """Compile a spec against a model.

    Args:
        spec: a `Spec`, a mapping, or the path of a YAML, JSON or TOML file.
        model: a transformers model, or any `nn.Module` that torch.export can capture. It is never changed; its base
            tensors are shared, not copied.
        example_inputs: the inputs, by name or in order, for models whose inputs cannot be derived from their interface.
            By default they are derived from the interface or, for a model that reads text with images or sound, created
            from a small example by the processor in the folder from which the model was loaded. The first axis is the
            batch. Tensor values matter only for models that cannot be captured as one graph, which are run on the
            inputs. Flags (``output_hidden_states=True``) may be included.
        seed: the seed that, together with the tensors' names, determines the initial values of adapter tensors; it is
            stored in an artifact. By default `torch.initial_seed()`, which `torch.manual_seed` and transformers'
            `set_seed` set; nothing is drawn from the global generator. In a process group, all ranks use rank 0's
            default, so all of them must call this function unless a seed is passed.
        cache: whether to cache captured graphs in the user's cache folder.
        progress: whether to show the current step in a line on stderr once compiling has taken two seconds. By default
            it is shown on a terminal, unless the environment variable ``GRAFTC_PROGRESS`` (``on`` or ``off``) is set.

    Raises:
        GraftError: with a code, for any problem with the spec, the model or their combination.
    """
    check_spec_and_model("graftc.compile", spec, model)
    chosen = starting_seed() if seed is None else as_seed(seed)
    loaded = spec_for(spec, model, example_inputs, cache=cache)
    axes, flags = _request(model, example_inputs)
    with seldom_collected():
        with shown(progress):
            compilation = compile_model(loaded, model, axes, flags=flags, start=StartingPoint(chosen, cache))
        check_fresh(compilation)
        return cast("Compiled[Source]", make_compiled(compilation))


def _register_auto_classes() -> None:
    """Register the classes with which transformers' ``Auto`` classes load folders written by ``save_pretrained``."""
    from graftc.runtime.loading import auto_classes  # noqa: F401, it registers them


follow("auto classes", _register_auto_classes)


@overload
def load(path: str | Path, model: Source, *, cache: bool = True) -> Compiled[Source]: ...
@overload
def load(path: str | Path, model: str | None = None, *, cache: bool = True) -> Compiled: ...
@public("graftc.load")
def load(path: str | Path, model: nn.Module | str | None = None, *, cache: bool = True) -> Compiled:
    """Load a compiled model from an artifact, or from a checkpoint that a trainer wrote.

    Every file is checked before any of its contents are used. The spec is compiled again and must adapt the same
    places; the artifact's own graphs are used if they were captured with the same model, code and versions. The graphs
    of the first kind of call are read at once, and those of any other kind when it is first called.

    Args:
        path: the folder of the artifact or of a checkpoint, whose ``model.safetensors`` contains the output of
            `Compiled.state_dict`.
        model: the base, or its location in the form that the command line accepts. By default the location recorded in
            the artifact or, for a base folder that was moved together with the artifact, the same place relative to it.
        cache: whether to cache captured graphs in the user's cache folder.

    Raises:
        GraftError: GC080 to GC085 for an artifact that is missing, damaged, unsafe or in a newer format; GC086 if the
            base cannot be found; GC087 if it is another model; GC088 if the spec now adapts other places; GC089 if the
            base's checkpoint lacks tensors; GC073 for arguments of the wrong kind.
    """
    from graftc.runtime.loading.load import load as load_from

    check_folder_and_model("graftc.load", path, model, by_name=True)
    if model is not None and not isinstance(model, str):
        require_plain(model)
    return load_from(as_path(path), model, cache=cache)


@public("graftc.load_base")
def load_base(name: str | Path, *, dtype: torch.dtype | None = None, revision: str | None = None) -> nn.Module:
    """Load a transformers model, quantised or not, in eval mode from a folder or the hub.

    No code from the folder or repository is run. Checkpoints in bitsandbytes, GPTQ, AWQ, HQQ, FP8,
    compressed-tensors and MXFP4 formats are read without the libraries that wrote them: linear maps and experts store
    the codes, and compute their weights from the codes at every access, bit for bit as the library does. `compile`
    accepts such a model like any other.

    Args:
        name: a folder whose ``config.json`` names the class in ``architectures``, or the id of a hub repository with
            such a file.
        dtype: the dtype of tensors that are not quantised and of weights computed from codes; by default the one in the
            config.
        revision: the commit of a hub repository; by default the newest.

    Raises:
        GraftError: GC032 if there is no such model, GC073 for a ``dtype`` that is not a floating-point dtype, GC161 for
            an unsupported format, GC163 for inconsistent codes, scales and zero points.
    """
    given: object = dtype
    if not (given is None or (isinstance(given, torch.dtype) and given.is_floating_point)):
        raise GraftError("GC073", f"dtype is {dtype!r}", hint="pass a floating-point dtype: torch.bfloat16")
    folder = as_path(name).expanduser()
    if folder.exists() or not is_hub_id(str(name)):
        return load_folder(folder, dtype=dtype)
    return load_hub(str(name), revision=revision, dtype=dtype)


@public("graftc.import_peft")
def import_peft(
    path: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    model: Source,
    example_inputs: ExampleInputs | None = None,
    *,
    name: str | None = None,
    cache: bool = True,
    bank: bool = False,
    slots: int = 0,
    rank: int | None = None,
) -> Compiled[Source]:
    """Create a compiled model in eval mode from one or several PEFT checkpoints.

    Args:
        path: the folder that PEFT's ``save_pretrained`` wrote, with ``adapter_config.json`` and
            ``adapter_model.safetensors``; or several folders: a list, whose adaptations are named after the folders, or
            a mapping from names to folders. All adaptations are in effect; ``compiled.disable(name)`` switches one off.
        model: the base, which is never changed.
        example_inputs: as for `compile`.
        name: the adapter to read from a subfolder of ``path``, where PEFT writes every adapter except ``default``.
        cache: whether to cache captured graphs in the user's cache folder.
        bank: whether to put the adapters, which must be LoRA, in the slots of a bank, from which each row of a batch
            chooses. They may differ in modules, ranks and scales, and graftc artifacts are accepted as well.
        slots: for a bank, the number of empty slots for adapters that `Compiled.bank` adds later.
        rank: for a bank, the rank of its slots; by default the highest of the adapters.

    Raises:
        GraftError: GC005 for two folders with the same name, GC073 for ``name`` with several folders and for options
            of a bank without ``bank``, GC191 for an adapter that does not fit a bank, GC110 if there is
            no adapter, GC111 for a config that cannot be read, GC112 for a type or option that has no equivalent, GC113
            for tensors that the config does not account for, GC114 for an adapter of another base; others as for
            `compile`. The model is unchanged in all cases.
    """
    from graftc.runtime.interop.peft.importing import imported

    check_folder_and_model("graftc.import_peft", path, model)
    axes, flags = _request(model, example_inputs)

    def structure() -> Structure:
        return roles(model, example_inputs)

    if not bank and (slots or rank is not None):
        raise GraftError("GC073", "slots and rank are options of a bank", hint="pass bank=True")
    if bank and isinstance(path, str | Path):
        path = [path]
    if isinstance(path, list | tuple | Mapping):
        from graftc.runtime.interop.banks import imported_bank
        from graftc.runtime.interop.peft.several import imported_together, names_of

        if name is not None:
            hint = "leave name out, and pass the adapter's own folder"
            raise GraftError("GC073", "name selects an adapter in one folder, but several were passed", hint=hint)
        if bank:
            compilation = imported_bank(names_of(path), model, axes, flags, slots=slots, rank=rank, cache=cache)
        else:
            compilation = imported_together(names_of(path), model, axes, flags, cache=cache, structure=structure)
    else:
        compilation = imported(as_path(path), model, axes, flags, name=name, cache=cache, structure=structure)
    compiled = make_compiled(compilation)
    return cast("Compiled[Source]", compiled.to(compiled._graftc.device).eval())


@public("graftc.check")
def check(
    spec: SpecLike,
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    cache: bool = True,
) -> Report:
    """Resolve a spec and report its cost without creating a compiled model; this works on the meta device.

    Args:
        spec: as for `compile`.
        model: as for `compile`.
        example_inputs: as for `compile`.
        cache: as for `compile`.

    Raises:
        GraftError: as for `compile`.
    """
    check_spec_and_model("graftc.check", spec, model)
    loaded = spec_for(spec, model, example_inputs, cache=cache)
    axes, flags = _request(model, example_inputs)
    start = StartingPoint(use_cache=cache, every_layer=True)
    compilation = compile_model(loaded, model, axes, flags=flags, start=start)
    check_fresh(compilation)
    return report(compilation)


def spec_for(
    spec: SpecLike, model: nn.Module, example_inputs: ExampleInputs | None = None, *, cache: bool = True
) -> Spec:
    """Return the spec that `compile` compiles against a model.

    The modules that a PEFT config adapts depend on the model type, the task and the version of transformers; the
    returned spec lists by name the modules that `peft.get_peft_model` adapts in this model.

    Args:
        spec: as for `compile`.
        model: as for `compile`.
        example_inputs: as for `compile`.
        cache: as for `compile`.

    Raises:
        GraftError: as for `compile`.
    """

    def from_config(config: object, where: str) -> Spec:
        from graftc.runtime.interop.peft.configs import spec_of

        require_plain(model)
        return spec_of(config, where, model, lambda: roles(model, example_inputs, cache=cache))

    return load_spec(spec, from_config)


@public("graftc.roles")
def roles(model: nn.Module, example_inputs: ExampleInputs | None = None, *, cache: bool = True) -> ModelStructure:
    """Return the roles found in a model, with the evidence for each; `select` accepts the result as well as the model.

    Args:
        model: as for `compile`.
        example_inputs: as for `compile`.
        cache: as for `compile`.

    Raises:
        GraftError: GC030 if the model cannot be captured.
    """
    return captured_roles(model, example_inputs, cache=cache)[0]


@exclusive()
def captured_roles(
    model: nn.Module, example_inputs: ExampleInputs | None = None, *, cache: bool = True
) -> tuple[ModelStructure, Snapshot]:
    """Return the roles found in a model (see `roles`), and a snapshot that represents the model as data."""
    axes, flags = _request(model, example_inputs)
    model = arrived(model)
    store = Store.mirror(model)

    def attempt(tried: Sequence[Axis]) -> Capture:
        return captured(CaptureRequest(model, tuple(tried), flags, aliases=store.aliases), use_cache=cache)

    try:
        capture = first_capture(model, axes, attempt)
    except GraftError as error:
        if error.code != "GC030":
            raise
        return _roles_apart(model, axes, flags, cache)
    for name in capture.constants:
        if name not in store:
            store.add_constant(name, capture.constants[name])
    return _structure_of(model, capture.program, store, capture.constants)


def _roles_apart(
    model: nn.Module, axes: Sequence[Axis] | None, flags: Flags, cache: bool
) -> tuple[ModelStructure, Snapshot]:
    """Return the result of `captured_roles` for a model that is not one graph, using graphs of its layers and maps."""
    start = StartingPoint(use_cache=cache, every_layer=True)
    compilation = compile_model(load_spec({"adapt": []}), model, axes, flags=flags, start=start)
    store = compilation.store
    constants = {name: store.get(name) for name in store.constants}
    return _structure_of(compilation.model, compilation.program("train", "base"), store, constants)


def _structure_of(
    model: nn.Module, program: Program, store: Store, constants: Mapping[str, Tensor]
) -> tuple[ModelStructure, Snapshot]:
    structure = roles_of(program, constants)
    parts = {f.name: getattr(structure, f.name) for f in fields(structure)}
    with_places = ModelStructure(**parts, places=selectable(model, program, store, structure))
    return with_places, base_snapshot(model, program, store)


@public("graftc.select")
def select(
    model: nn.Module | Structure,
    example_inputs: ExampleInputs | None = None,
    *,
    method: str | None = None,
    cache: bool = True,
) -> Selection:
    """Return the places that targets can select in a model, to count and combine them before writing a spec.

    A spec accepts a selection as a ``target``.

    Args:
        model: a model, possibly on the meta device; a compiled model, whose base is used; or the result of `roles`. The
            latter two are not captured again, and narrowing a selection does not capture its model again.
        example_inputs: as for `compile`; only used with a model.
        method: the tag of a method, to offer only the kinds of site that the method accepts. By default, the weights of
            linear maps, embeddings and experts are offered, and sites of any kind that a role names.
        cache: whether to cache the captured graph in the user's cache folder.

    Raises:
        GraftError: GC030 if the model cannot be captured; GC004 for an unknown method; GC073 for an argument that is
            not a model.
    """
    if isinstance(model, Compiled):
        return Selection(_places_of(model), method=method)
    if isinstance(model, Structure) and not isinstance(model, ModelStructure):
        hint = "pass the model, or the result of graftc.roles(model)"
        raise GraftError("GC073", "these roles do not identify their model", hint=hint)
    structure = model if isinstance(model, ModelStructure) else roles(model, example_inputs, cache=cache)
    return Selection(structure.places, method=method)


@exclusive()
def _places_of(compiled: Compiled) -> Selectable:
    compilation: Compilation = runner_of(compiled).compilation
    program = compilation.program("train", "source")
    structure = roles_of(program, compilation.main.captures[0].constants)
    return selectable(compilation.model, program, compilation.store, structure)


def _request(model: nn.Module, example_inputs: ExampleInputs | None) -> tuple[list[Axis] | None, Flags]:
    require_plain(model)
    if example_inputs is None:
        example_inputs = processor_example(model)
    if example_inputs is None:
        return None, ()
    return request(model, Interface(model).examples(example_inputs))
