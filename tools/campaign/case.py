"""A case of the campaign, and its checks."""

from __future__ import annotations

import random
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.registry import method_specs
from graftc.testing import perturb
from tools.campaign.blocks import Attention
from tools.campaign.comparing import CASTING, DRAWN, SLOPE, Comparison, record_of, tolerance_of
from tools.campaign.eager import Eager, leaves
from tools.campaign.grammar import Model, draw_model
from tools.campaign.models import build, inputs_of
from tools.campaign.reference import WITHOUT_GRADIENTS, NoReferenceError
from tools.campaign.routes import ROUTES, Run, folding, usable
from tools.campaign.specs import draw_spec
from tools.forked import Record

SIZES = ((3, 4), (2, 6))
"""Batch and positions of the calls; the first is the one that models are compiled with."""
STEP = 1e-6
"""The step of finite differences."""
OTHER_SLOPES = frozenset({"dora", "adamix", "pruning"})
"""Methods without a slope of their own: a norm that counts as a constant, drawn experts, straight-through scores."""
INTERNAL = frozenset({"GC040", "GC041", "GC051", "GC053", "GC071", "GC099"})
"""Codes that no case may end with: a broken invariant, a wrong graph, a fold that is not certified, wrong tensors, a
method that fails when it is inserted, a crash."""


@dataclass(frozen=True)
class Case:
    """A model, a spec and routes.

    Attributes:
        seed: the seed of adapter tensors, their perturbation and the inputs.
        model: the description of the model.
        spec: the spec.
        routes: names of `ROUTES`.
        noise: the standard deviation of the perturbation.
    """

    seed: int
    model: Model
    spec: dict[str, Any]
    routes: tuple[str, ...]
    noise: float

    def to_json(self) -> dict[str, Any]:
        """Return the case as plain data."""
        own = {"seed": self.seed, "spec": self.spec, "routes": list(self.routes), "noise": self.noise}
        return {**own, "model": self.model.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Case:
        """Return the case that `to_json` has written."""
        model = Model.from_json(data["model"])
        return cls(data["seed"], model, data["spec"], tuple(data["routes"]), data["noise"])


def draw_case(seed: int, only: str | None = None) -> Case:
    """Return the case of a seed.

    Args:
        seed: the seed.
        only: the one route to take, if the case has it; by default two are drawn.
    """
    model = draw_model(seed)
    spec = draw_spec(seed, model, build(model))
    draw = random.Random(f"case {seed}")
    routes = usable(model, spec)
    chosen = sorted(draw.sample(routes, min(2, len(routes))))
    noise = draw.choice((0.02, 0.05, 0.2))
    return Case(seed, model, spec, tuple(chosen) if only is None else (only,) * (only in routes), noise)


def check(case: Case, tell: Callable[[Record], None] = lambda record: None, only: str | None = None) -> Record:
    """Run a case.

    Args:
        case: the case.
        tell: called with what is known after every check, for whoever has to report a process that dies.
        only: the one check to make, beside compiling.

    Returns:
        A record with ``checks``, each with a ``status``: ``equal``, ``refused`` with a ``code``, ``difference`` or
        ``error``; and with the ``reference`` of outputs, ``eager`` or ``compiled``.
    """
    record: Record = {"seed": case.seed, "checks": {}, "reference": "eager"}
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        warnings.simplefilter("ignore")
        built = build(case.model)
        before = {name: tensor.clone() for name, tensor in built.state_dict().items()}
        _checked(record, "compile", lambda: _compile(case, built, record, Path(folder), tell, only))
        after = built.state_dict()
        same = before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
        record["checks"]["base unharmed"] = {"status": "equal" if same else "difference"}
    return record


def unexplained(run: Run, code: str) -> str:
    """Return why a refusal of a route needs an explanation; empty if the case itself is one."""
    folds = len(folding(run.spec)) == len(run.spec["adapt"])
    if code == "GC050" and folds and not any(entry.get("add_missing") for entry in run.spec["adapt"]):
        return "every method folds exactly"
    names, own = dict(run.built.named_parameters(remove_duplicate=False)), dict(run.built.named_parameters())
    if code == "GC022" and len(names) == len(own):
        return "no two tensors of the base are tied"
    return ""


def findings(record: Record) -> dict[str, Record]:
    """Return the checks of a record that need an explanation."""
    return {
        name: each
        for name, each in record["checks"].items()
        if each["status"] in ("difference", "error") or each.get("code") in INTERNAL or each.get("unexplained")
    }


def _checked(record: Record, name: str, work: Callable[[], Iterator[Comparison]]) -> None:
    """Run one check and record how it ends."""
    try:
        with torch.random.fork_rng(devices=()):
            result = record_of(list(work()))
    except GraftError as error:
        result = {"status": "refused", "code": error.code, "message": str(error).splitlines()[0][:300]}
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        text = f"{type(error).__name__}: {error}"
        result = {"status": "error", "error": type(error).__name__, "message": f"{text[:300]} at {where}"}
        record["trace"] = traceback.format_exc()[-4000:]
    if result["status"] != "nothing":
        record["checks"][name] = result


def _compile(
    case: Case,
    built: nn.Module,
    record: Record,
    folder: Path,
    tell: Callable[[Record], None],
    only: str | None,
) -> Iterator[Comparison]:
    calls = [inputs_of(case.model, built, sizes, case.seed) for sizes in SIZES]
    compiled: Any = graftc.compile(case.spec, built, dict(calls[0]), seed=case.seed, cache=False).eval()
    tolerance = tolerance_of(case.model.family)
    with torch.no_grad():
        if _starts_as_base(case.spec):
            drawn = any(entry.get("init") == "orthogonal" for entry in case.spec["adapt"])
            bound = max(tolerance, DRAWN) if drawn else tolerance
            for inputs in calls:
                yield Comparison("before training", leaves(compiled(**inputs)), leaves(built(**inputs)), bound)
    perturb(compiled, case.noise, case.seed)
    tensors = compiled.adapter_state_dict()
    eager: Eager | None = None
    try:
        eager = Eager(built, case.spec)
        eager.call(tensors, calls[0])
    except NoReferenceError as reason:
        eager, record["reference"], record["no_reference"] = None, "compiled", str(reason)
    with torch.no_grad():
        outputs = [leaves(compiled(**inputs)) for inputs in calls]
        expected = outputs if eager is None else [leaves(eager.call(tensors, inputs)) for inputs in calls]
    run = Run(case.seed, case.model, case.spec, built, compiled, eager, list(zip(calls, expected, strict=True)), folder)
    checks: dict[str, Callable[[], Iterator[Comparison]]] = {}
    if eager is not None:
        pairs = list(enumerate(zip(outputs, expected, strict=True)))
        checks["outputs"] = lambda: (Comparison(f"call {n}", a, b, tolerance) for n, (a, b) in pairs)
        checks["places"] = lambda: _places(run)
        if not eager.methods & WITHOUT_GRADIENTS:
            checks["gradients"] = lambda: _gradients(run)
    elif case.model.family not in CASTING and not _methods(case.spec) & (WITHOUT_GRADIENTS | OTHER_SLOPES):
        checks["slope"] = lambda: _slope(run)
    checks |= {name: partial(ROUTES[name], run) for name in case.routes}
    for name, work in checks.items():
        if only in (None, name):
            record["step"] = name
            tell(record)
            _checked(record, name, work)
            result = record["checks"].get(name, {})
            if result.get("status") == "refused" and (why := unexplained(run, result["code"])):
                result["unexplained"] = why
    record.pop("step", None)


def _starts_as_base(spec: Mapping[str, Any]) -> bool:
    claims = [method_specs()[entry["method"]].claims for entry in spec["adapt"]]
    return all(claim.identity_at_init for claim in claims)


def _methods(spec: Mapping[str, Any]) -> set[str]:
    return {entry["method"] for entry in spec["adapt"]}


def _gradients(run: Run) -> Iterator[Comparison]:
    """Compare outputs in train mode, and the gradients of a loss of every output, with the eager model's."""
    assert run.eager is not None
    inputs, expected = run.calls[0]
    weights = _noise(run.seed, expected)
    trained = {n: p for n, p in run.compiled.named_parameters() if p.requires_grad}
    run.compiled.zero_grad()
    try:
        outputs = leaves(run.compiled.train()(**inputs))
        yield Comparison("train mode", outputs, expected, run.tolerance)
        _backward(outputs, weights)
    finally:
        run.compiled.eval()
    own = {n: t.detach().clone() for n, t in run.compiled.adapter_state_dict().items()}
    for name in trained:
        own[name].requires_grad_(True)
    reference = leaves(run.eager.call(own, inputs))
    _backward(reference, weights)
    names = list(trained)
    actual = [_or_zeros(trained[name].grad, trained[name]) for name in names]
    yield Comparison(
        "gradients", actual, [_or_zeros(own[name].grad, trained[name]) for name in names], run.tolerance * 10
    )
    run.compiled.zero_grad()


def _slope(run: Run) -> Iterator[Comparison]:
    """Compare the gradients of a loss, along a random line, with its finite differences, where there is no reference.

    The scale of the comparison is the sum of what all elements contribute, since they may cancel.
    """
    inputs, expected = run.calls[0]
    trained = [p for p in run.compiled.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    noise = _noise(run.seed, [*expected, *trained])
    weights, line = noise[: len(expected)], noise[len(expected) :]
    run.compiled.zero_grad()
    run.compiled.train()
    try:
        _backward(leaves(run.compiled(**inputs)), weights)
        parts = [_or_zeros(p.grad, p) * d for p, d in zip(trained, line, strict=True)]
        losses = []
        with torch.no_grad():
            for step in (STEP, -STEP):
                for parameter, own, along in zip(trained, start, line, strict=True):
                    parameter.copy_(own + step * along)
                outputs = leaves(run.compiled(**inputs))
                losses.append(sum(float((a * b).sum()) for a, b in zip(outputs, weights, strict=True)))
            for parameter, own in zip(trained, start, strict=True):
                parameter.copy_(own)
    finally:
        run.compiled.eval()
        run.compiled.zero_grad()
    slope, scale = (torch.stack([f(part).sum() for part in parts]).sum() for f in (torch.clone, torch.abs))
    measured = torch.tensor((losses[0] - losses[1]) / (2 * STEP), dtype=torch.float64)
    yield Comparison("slope", [torch.stack([measured, scale])], [torch.stack([slope, scale])], SLOPE)


def _noise(seed: int, like: Sequence[Tensor]) -> list[Tensor]:
    """Return normal values in the shapes and types of tensors."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in like]


def _backward(outputs: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    torch.autograd.backward(torch.stack([(a * b).sum() for a, b in zip(outputs, weights, strict=True)]).sum())


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _places(run: Run) -> Iterator[Comparison]:
    """Compare the weights that were adapted with those that the spec names, and roles with what the grammar built."""
    assert run.eager is not None
    adapted = run.eager.adapted(run.compiled.adapter_state_dict())
    for entry in run.spec["adapt"]:
        target = entry.get("target", {})
        weights = {(weight, rows) for name, weight, rows in adapted if name == entry["name"]}
        if not weights or entry.get("bias", "none") != "none":
            continue
        if "modules" in target:
            modules = {weight.rpartition(".")[0] for weight, _ in weights}
            if modules != set(target["modules"]):
                raise AssertionError(f"{entry['name']} adapts {sorted(modules)}, not {target['modules']}")
        elif run.model.family is None:
            truth = _truth(run.built, target["role"])
            if truth is not None and weights != truth:
                raise AssertionError(
                    f"{entry['name']} adapts {sorted(map(str, weights))}, not {sorted(map(str, truth))}"
                )
    yield Comparison("places", [torch.zeros(1)], [torch.zeros(1)], 1.0)


def _truth(built: nn.Module, roles: list[str]) -> set[tuple[str, Any]] | None:
    """Return the weights and rows of roles as the grammar built them; None if some attention has none to tell."""
    weights = set()
    for path, module in built.named_modules():
        if isinstance(module, Attention):
            for role in roles:
                if role not in module.roles:
                    return None
                child, rows = module.roles[role]
                weights.add((f"{path}.{child}" if child == "in_proj_weight" else f"{path}.{child}.weight", rows))
    return weights
