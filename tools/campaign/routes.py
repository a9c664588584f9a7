"""The routes: every way in which a trained model leaves graftc, as a function that runs it.

Each takes a `Run` and yields comparisons. A refusal is a `GraftError`, which `case` records by its code.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graftc
from graftc.runtime.sources.models import load_model, quiet_transformers
from graftc.specs.registry import method_specs
from graftc.testing import perturb
from graftc.testing.compare import in_parts
from tools.campaign.comparing import SINGLE, Comparison, tolerance_of
from tools.campaign.eager import Eager, leaves
from tools.campaign.grammar import Model
from tools.campaign.models import build, untied

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Run:
    """A compiled and perturbed model, and what it has to compute.

    Attributes:
        seed: the seed of the case.
        model: the description of its base.
        spec: the spec.
        built: the eager base.
        compiled: the compiled model in eval mode.
        eager: the eager reference, None where a method has none.
        calls: inputs with the outputs that are expected of them.
        folder: an empty folder.
    """

    seed: int
    model: Model
    spec: dict[str, Any]
    built: nn.Module
    compiled: Any
    eager: Eager | None
    calls: Sequence[tuple[Inputs, Sequence[Tensor]]]
    folder: Path

    @property
    def tolerance(self) -> float:
        """The tolerance of outputs in float64."""
        return tolerance_of(self.model.family)

    @property
    def draw(self) -> random.Random:
        """A generator for the choices of a route."""
        return random.Random(f"route {self.seed}")

    def same(
        self, label: str, called: Callable[[Inputs], Any], fits: Callable[[Inputs], bool] = lambda inputs: True
    ) -> Iterator[Comparison]:
        """Compare what a function returns for every call that fits."""
        with torch.no_grad():
            for inputs, expected in self.calls:
                if not fits(inputs):
                    continue
                shape = tuple(next(iter(inputs.values())).shape)
                yield Comparison(f"{label} at {shape}", leaves(called(inputs)), expected, self.tolerance)


Route = Callable[[Run], Iterator[Comparison]]


def _with(module: Callable[..., Any]) -> Callable[[Inputs], Any]:
    return lambda inputs: module(**inputs)


def _loaded(run: Run, state: Mapping[str, Tensor]) -> nn.Module:
    """Return the eager base with other tensors, each under its own name even if the base ties them."""
    fresh = untied(build(run.model), run.spec.get("untie", ()))
    known = dict(fresh.named_parameters(remove_duplicate=False)) | dict(fresh.named_buffers(remove_duplicate=False))
    missing = [name for name in fresh.state_dict() if name not in state]
    assert not missing, f"the state dict lacks {missing}"
    with torch.no_grad():
        for name, tensor in state.items():
            if name not in known:  # a bias that folding has added, for which a linear module has a place
                path, _, last = name.rpartition(".")
                module = fresh.get_submodule(path)
                assert isinstance(module, nn.Linear) and last == "bias", f"no module reads {name}"
                known[name] = module.bias = nn.Parameter(torch.empty_like(tensor), requires_grad=False)
            known[name].copy_(tensor)
        for name, tensor in state.items():  # a tie that was broken shows here
            assert torch.equal(known[name], tensor), f"{name} and a tensor that is tied to it have different values"
    return fresh.eval()


def merge(run: Run) -> Iterator[Comparison]:
    """Merge everything: the merged model, and an eager base with its state dict."""
    merged = run.compiled.merge(allow_unchanged=True)
    assert merged.certificate.passed
    yield from run.same("merged", _with(merged.eval()))
    yield from run.same("eager base with the folded tensors", _with(_loaded(run, merged.folded_state_dict())))
    if run.model.family is not None:
        yield from run.same("plain transformers model", _with(merged.to_transformers()))
    names = [entry["name"] for entry in run.spec["adapt"]]
    if len(names) > 1 and run.eager is not None:
        chosen = run.draw.choice(names)
        inputs, tensors = run.calls[0][0], run.compiled.adapter_state_dict()
        alone = run.eager.call(tensors, inputs, frozenset(names) - {chosen})
        only = run.compiled.merge(chosen, allow_unchanged=True).eval()
        with torch.no_grad():
            yield Comparison(f"merged with {chosen} alone", leaves(only(**inputs)), leaves(alone), run.tolerance)


def streamed_tensors(run: Run) -> Iterator[Comparison]:
    """Fold tensor by tensor, as for an inference engine."""
    state = {name: tensor.clone() for name, tensor in run.compiled.merged_state_dict()}
    yield from run.same("eager base with the streamed tensors", _with(_loaded(run, state)))


def partial(run: Run) -> Iterator[Comparison]:
    """Fold some adaptations, and compile the rest over the folded base."""
    names = [entry["name"] for entry in run.spec["adapt"]]
    foldable = folding(run.spec)
    only = [run.draw.choice(foldable)] if len(names) > 1 and foldable and run.draw.random() < 0.7 else None
    result = run.compiled.merge_partially(only=only, allow_unchanged=True)
    assert result.certificate.passed
    yield from run.same("graph of a partial merge", _with(result.merged.eval()))
    yield from run.same("compiled over the folded base", _with(result.compiled.eval()))


def artifact(run: Run) -> Iterator[Comparison]:
    """Save an artifact and load it over another copy of the base."""
    run.compiled.save(run.folder / "artifact", certify=run.draw.random() < 0.3)
    loaded = graftc.load(run.folder / "artifact", build(run.model), cache=False).eval()
    yield from run.same("loaded", _with(loaded))


def pt2(run: Run) -> Iterator[Comparison]:
    """Export to torch's format."""
    path = run.compiled.export(run.folder / "model.pt2", "pt2", dict(run.calls[0][0]))
    loaded = torch.export.load(path)
    shapes = {node.name: node.meta["val"].shape for node in loaded.graph.find_nodes(op="placeholder")}

    def fits(inputs: Inputs) -> bool:
        return all(_fits(tensor, shapes[name]) for name, tensor in inputs.items())

    yield from run.same("program", _with(loaded.module()), fits)


def _fits(tensor: Tensor, shape: Sequence[Any]) -> bool:
    """Return whether a tensor has the sizes that are fixed in a file, which are integers there."""
    return all(size == own for size, own in zip(shape, tensor.shape, strict=True) if type(size) is int)


def onnx(run: Run) -> Iterator[Comparison]:
    """Export a float32 copy, merged if it folds, and run it in ONNX Runtime.

    The reference computes in float32 too: of a model in which a norm divides by little, or an activation has a step,
    outputs in float32 and in float64 are farther apart than those of ONNX Runtime and torch.
    """
    import onnxruntime

    single = build(run.model, torch.float32)
    cast = [{n: t.float() if t.is_floating_point() else t for n, t in inputs.items()} for inputs, _ in run.calls]
    compiled = graftc.compile(run.spec, single, dict(cast[0]), seed=run.seed, cache=False).eval()
    own = compiled.adapter_state_dict()
    compiled.load_adapter_state_dict({n: t.to(own[n].dtype) for n, t in run.compiled.adapter_state_dict().items()})
    source: Any = compiled
    if len(folding(run.spec)) == len(run.spec["adapt"]) and run.draw.random() < 0.5:
        source = compiled.merge(allow_unchanged=True)
    path = source.export(run.folder / "model.onnx", "onnx", dict(cast[0]))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    shapes = {value.name: value.shape for value in session.get_inputs()}
    tensors = compiled.adapter_state_dict()
    eager = None if run.eager is None else Eager(single, run.spec)
    for inputs in cast:
        if not all(_fits(tensor, shapes[name]) for name, tensor in inputs.items()):
            continue
        with torch.no_grad():
            expected = leaves(compiled(**inputs) if eager is None else eager.call(tensors, inputs))
        results = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        yield Comparison("ONNX Runtime", [torch.from_numpy(value) for value in results], expected, SINGLE)


def views(run: Run) -> Iterator[Comparison]:
    """Leave adaptations out of calls: all of them, and one of several; then the reference model."""
    names = [entry["name"] for entry in run.spec["adapt"]]
    inputs, expected = run.calls[0]
    with torch.no_grad():
        plain = leaves(run.built(**inputs))
        with run.compiled.disabled():
            yield Comparison("without adaptations", leaves(run.compiled(**inputs)), plain, run.tolerance)
        if len(names) > 1:
            name = run.draw.choice(names)
            with run.compiled.disabled(name):
                without = leaves(run.compiled(**inputs))
            if run.eager is not None:
                own = leaves(run.eager.call(run.compiled.adapter_state_dict(), inputs, frozenset({name})))
                yield Comparison(f"without {name}", without, own, run.tolerance)
        yield Comparison("reference model", leaves(run.compiled.reference()(**inputs)), plain, run.tolerance)
        yield Comparison("afterwards", leaves(run.compiled(**inputs)), expected, run.tolerance)


def copied(run: Run) -> Iterator[Comparison]:
    """Copy the model, and load its tensors into one that was compiled anew."""
    yield from run.same("copy", _with(copy.deepcopy(run.compiled)))
    anew = graftc.compile(run.spec, build(run.model), dict(run.calls[0][0]), seed=run.seed + 1, cache=False).eval()
    anew.load_adapter_state_dict(run.compiled.adapter_state_dict())
    yield from run.same("loaded into another", _with(anew))


def bank(run: Run) -> Iterator[Comparison]:
    """Put the adaptation into one of two slots, and call with this slot active, and row by row."""
    (entry,) = run.spec["adapt"]
    slots = [{**entry, "name": name} for name in ("one", "two")]
    spec = {**run.spec, "adapt": slots, "compose": {"bank": ["one", "two"]}}
    both = graftc.compile(spec, build(run.model), dict(run.calls[0][0]), seed=run.seed, cache=False).eval()
    perturb(both, 0.1, run.seed + 1)
    own = {
        n.replace(f"graftc.{entry['name']}.", "graftc.two."): t for n, t in run.compiled.adapter_state_dict().items()
    }
    both.load_adapter_state_dict({**both.adapter_state_dict(), **own})
    both.activate("two")
    yield from run.same("slot two", _with(both))
    inputs, expected = run.calls[0]
    rows = len(next(iter(inputs.values())))
    numbers = torch.tensor([(row + 1) % 2 for row in range(rows)])
    with torch.no_grad():
        both.activate("one")
        mixed = leaves(both(**inputs, adapter_ids=numbers))
        other = leaves(both(**inputs))
    for label, number, outputs in (("rows of slot two", 1, expected), ("rows of slot one", 0, other)):
        pairs = [
            (a[numbers == number], b[numbers == number]) for a, b in zip(mixed, outputs, strict=True) if len(b) == rows
        ]
        yield Comparison(label, [a for a, _ in pairs], [b for _, b in pairs], run.tolerance)


def cache(run: Run) -> Iterator[Comparison]:
    """Run a text as a whole, and in parts that read the cache of those before."""
    whole, parts = in_parts(run.compiled, run.seed)
    yield Comparison("in parts", [parts], [whole], run.tolerance)


def merge_checkpoint(run: Run) -> Iterator[Comparison]:
    """Merge an artifact into the base's files without a model, and load them with transformers."""
    base, out = run.folder / "base", run.folder / "merged"
    with quiet_transformers():
        build(run.model).save_pretrained(base, max_shard_size="30KB")  # type: ignore[operator]
        source = _read(base)
    compiled = graftc.compile(run.spec, source, dict(run.calls[0][0]), seed=run.seed, cache=False).eval()
    compiled.load_adapter_state_dict(run.compiled.adapter_state_dict())
    compiled.save(run.folder / "adapter", certify=False, base=str(base))
    merged = graftc.merge_checkpoint(run.folder / "adapter", base, out, allow_unchanged=True)
    assert merged.certificate.passed
    with quiet_transformers():
        yield from run.same("transformers from the merged files", _with(_read(out)))


def _read(path: Path) -> Any:
    """Load a folder with transformers; experts are computed by an operator that has float64, as in the base."""
    model: Any = load_model(str(path)).eval()
    if model.config.model_type == "mixtral":
        model.set_experts_implementation("batched_mm")
    return model


def folder(run: Run) -> Iterator[Comparison]:
    """Write the merged model as a folder, and load it with transformers."""
    merged = run.compiled.merge(allow_unchanged=True)
    with quiet_transformers():
        merged.save(run.folder / "merged")
        yield from run.same("transformers from the folder", _with(_read(run.folder / "merged")))


def peft_folder(run: Run) -> Iterator[Comparison]:
    """Write PEFT's format, which PEFT itself loads over another copy of the base, and graftc imports."""
    import peft

    path = run.compiled.export(run.folder / "peft", "peft")
    if not any(_beyond_peft(entry) for entry in run.spec["adapt"]):
        with quiet_transformers():
            loaded = peft.PeftModel.from_pretrained(build(run.model), str(path), autocast_adapter_dtype=False).eval()
        yield from run.same("PEFT", _with(loaded))
    imported = graftc.import_peft(path, build(run.model), dict(run.calls[0][0]), cache=False).eval()
    yield from run.same("imported", _with(imported))


def _beyond_peft(entry: Mapping[str, Any]) -> bool:
    """Return whether PEFT itself cannot load a folder here: several factors need CUDA, these starts have no float64."""
    return entry.get("factors", 1) > 1 or entry.get("init") in ("pissa", "olora")


ROUTES: Mapping[str, Route] = {
    "merge": merge,
    "folder": folder,
    "peft_folder": peft_folder,
    "streamed_tensors": streamed_tensors,
    "partial": partial,
    "artifact": artifact,
    "pt2": pt2,
    "onnx": onnx,
    "views": views,
    "copied": copied,
    "bank": bank,
    "cache": cache,
    "merge_checkpoint": merge_checkpoint,
}
"""Every route by its name."""

GENERATES = frozenset({"gpt2", "gpt_neox", "llama", "mixtral", "t5"})


def folding(spec: Mapping[str, Any]) -> list[str]:
    """Return the names of the adaptations whose methods fold exactly."""
    return [e["name"] for e in spec["adapt"] if method_specs()[e["method"]].claims.folds.value == "exact"]


def usable(model: Model, spec: Mapping[str, Any]) -> list[str]:
    """Return the routes that exist for a model and a spec."""
    names = set(ROUTES)
    if model.family is None:  # a class without a config cannot be built again
        names -= {"merge_checkpoint", "partial", "folder", "peft_folder"}
    if model.family not in GENERATES:
        names -= {"cache"}
    methods = [entry["method"] for entry in spec["adapt"]]
    if len(methods) != 1 or not method_specs()[methods[0]].claims.bankable:
        names -= {"bank"}
    return sorted(names)
