"""The checks that every model has to pass.

It equals the source before training, its gradients are right, and it merges, saves, loads and generates like the
source's class.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb

MAPS = "**.{q_proj,v_proj,query,value,q,v,qkv,query_key_value,fc1,in_proj,to_q,to_v}"
"""Names of maps, for models whose roles are not known where single maps are graphs."""
IDENTITY = 1e-6
CLOSE = 1e-4
NEGLIGIBLE = 1e-6
"""Gradients this much smaller than the largest are what rounding leaves of a sum that cancels."""
_TOKENS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "suppress_tokens": list(range(200, 300))}
"""Images have token ids from 200 on; a random model would ask for more of them."""


def compiled_where_it_fits(model: nn.Module, batch: Mapping[str, Any], target: Any, maps: str, **options: Any) -> Any:
    """Compile LoRA at a target or, if its roles are unknown, at maps given by name."""
    for chosen in (target, {"modules": maps}):
        spec = {"adapt": [{"method": "lora", "rank": 2, "target": chosen}], **options}
        try:
            return graftc.compile(spec, model, dict(batch), seed=0, cache=False)
        except GraftError as error:
            if error.code not in ("GC010", "GC011", "GC012", "GC015") or chosen == {"modules": maps}:
                raise
    raise AssertionError


def numbers(outputs: Any) -> dict[str, Tensor]:
    """Return the floating-point tensors of outputs, by name."""
    tensors: dict[str, Tensor] = {}

    def look(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                tensors[name] = value
        elif isinstance(value, Mapping):
            for key, each in value.items():
                look(f"{name}.{key}", each)
        elif isinstance(value, list | tuple):
            for index, each in enumerate(value):
                look(f"{name}.{index}", each)

    look("", outputs)
    return tensors


def apart(ours: Any, theirs: Any) -> float:
    """Return the largest difference between two calls' outputs relative to the largest element of each.

    The result is infinite if the outputs differ in structure.
    """
    a, b = numbers(ours), numbers(theirs)
    shared = a.keys() & b.keys()
    if not shared or ("loss" in str(b.keys())) != ("loss" in str(a.keys())):
        return float("inf")
    worst = 0.0
    for name in shared:
        if a[name].shape != b[name].shape:
            return float("inf")
        if not torch.equal(a[name], b[name]):
            scale = float(b[name].double().abs().max().clamp_min(1e-30))
            gap = float((a[name].double() - b[name].double()).abs().max()) / scale
            worst = max(worst, gap if gap == gap else float("inf"))
    return worst


def objective(outputs: Any) -> Tensor:
    """Return the loss if there is one, otherwise the mean of squares."""
    own = numbers(outputs)
    return own[".loss"] if ".loss" in own else torch.stack([v.square().mean() for v in own.values()]).sum()


def seeded(model: Any, batch: Mapping[str, Any]) -> Any:
    """Call the model with a fixed random state."""
    torch.manual_seed(11)
    return model(**batch)


def check_identity(compiled: Any, model: nn.Module, batches: list[Mapping[str, Any]]) -> dict[str, float]:
    """Return how far the model is from the source before training, in either mode, on every batch.

    The source is frozen, as a tuned base is: products of weights that require gradients may be computed in another
    order (`torch.matmul`).
    """
    gaps = {}
    for mode in ("eval", "train"):
        compiled.train(mode == "train")
        model.train(mode == "train")
        for number, batch in enumerate(batches):
            with torch.no_grad():
                theirs = seeded(copy.deepcopy(model).requires_grad_(False), batch)
                gaps[f"{mode} {number}"] = apart(seeded(compiled, batch), theirs)
    compiled.eval(), model.eval()
    return gaps


def check_gradients(trained: Any, plain: nn.Module, batch: Mapping[str, Any]) -> float:
    """Return how far gradients of ``A`` and ``B`` are from those that the folded weight's gradient implies."""
    plain.requires_grad_(True).zero_grad(set_to_none=True)
    objective(seeded(plain, batch)).backward()
    trained.zero_grad(set_to_none=True)
    objective(seeded(trained, batch)).backward()
    (lora,) = trained.compilation.spec.adapt
    scale = lora.alpha / lora.rank
    factors = dict(trained.named_parameters())
    gradients = {name: p.grad for name, p in plain.named_parameters(remove_duplicate=False)}
    compared: list[tuple[float, float]] = []
    for site, _ in trained.compilation.main.resolved[0].places:
        place = ".".join(filter(None, (site.key.module, "graftc", lora.name, site.key.part)))
        a, b, whole = factors.get(f"{place}.A"), factors.get(f"{place}.B"), gradients.get(site.own.tensor)
        if a is None or b is None or a.grad is None or whole is None:
            continue
        own = site.own.operand(whole)
        if own.shape[-2:] != (b.shape[-2], a.shape[-1]):  # a grouped convolution
            continue
        for ours, wanted in ((a.grad, scale * b.mT @ own), (b.grad, scale * own @ a.mT)):
            compared.append((float((ours - wanted).abs().max()), float(wanted.abs().max())))
    largest = max((size for _, size in compared), default=0.0)
    assert largest > 0, "no gradient could be compared"
    return max(gap / max(size, NEGLIGIBLE * largest) for gap, size in compared)


def check_model(
    model: nn.Module,
    batches: list[Mapping[str, Any]],
    folder: Path,
    *,
    target: Any,
    maps: str = MAPS,
    generates: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Run all checks on a model; the result contains the error of each step that fails.

    Args:
        model: the source model, in eval mode.
        batches: batches of different structure, the first of which it is compiled with.
        folder: an empty folder.
        target: the target of the adaptation; ``maps`` replaces it if roles are unknown.
        maps: a glob of maps.
        generates: whether the model's class can generate.
        options: further fields of the spec.
    """
    results: dict[str, Any] = {}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def step(name: str, run: Any) -> Any:
        try:
            results[name] = run()
            return results[name]
        except Exception as error:
            results[name] = f"{type(error).__name__}: {str(error)[:300]}"
            return None

    warnings.simplefilter("ignore")
    try:
        compiled = compiled_where_it_fits(model, batches[0], target, maps, **options)
    except Exception as error:
        return {"compile": f"{type(error).__name__}: {str(error)[:500]}"}
    results["level"] = "graph" if not compiled.compilation.notes else "; ".join(compiled.compilation.notes)[:300]
    step("identity", lambda: check_identity(compiled, model, batches))
    perturb(compiled.eval(), 0.05)
    merged = step("merged", lambda: compiled.merge())
    if merged is not None:
        results["merged"] = bool(merged.certificate.passed)
        step("merge", lambda: max(_gap(compiled, merged, batch) for batch in batches))
        plain = step("folded", lambda: _folded(model, merged))
        if plain is not None:
            results["folded"] = max(_gap(compiled, plain, batch) for batch in batches)
            step("gradients", lambda: check_gradients(compiled, plain, batches[0]))
            if isinstance(results["gradients"], float) and results["gradients"] > CLOSE:
                step("gradients", lambda: _gradients_in_double(model, batches[0], target, maps))
            plain.requires_grad_(False)
            if generates:
                step("generate", lambda: _generates(compiled, merged, plain, batches))
    step("saved", lambda: compiled.save(folder / "artifact") and None)
    loaded = step("loaded", lambda: graftc.load(folder / "artifact", model).eval())
    if loaded is not None:
        results["loaded"] = max(_gap(loaded, compiled, batch) for batch in batches)
    now = model.state_dict()
    results["source kept"] = all(torch.equal(tensor, now[name]) for name, tensor in before.items())
    return results


def _gradients_in_double(model: nn.Module, batch: Mapping[str, Any], target: Any, maps: str) -> float:
    """Run `check_gradients` in float64; with nearly equal entries, a maximum may pick another one after rounding."""
    wide = {name: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for name, t in batch.items()}
    model = copy.deepcopy(model).double()
    compiled = compiled_where_it_fits(model, wide, target, maps).eval()
    perturb(compiled, 0.05)
    return check_gradients(compiled, _folded(model, compiled.merge()), wide)


def _gap(one: Any, other: Any, batch: Mapping[str, Any]) -> float:
    with torch.no_grad():
        return apart(seeded(one, batch), seeded(other, batch))


def _folded(model: nn.Module, merged: Any) -> nn.Module:
    """Return a model of the source's own class with the folded tensors."""
    plain = copy.deepcopy(model).eval()
    plain.load_state_dict(merged.folded_state_dict(), strict=False)
    return plain


def _generates(compiled: Any, merged: Any, plain: Any, batches: list[Mapping[str, Any]]) -> bool:
    for batch in batches:
        asked = {name: value for name, value in batch.items() if name not in ("labels", "return_loss")}
        for cached in (True, False):
            options = {**_TOKENS, "use_cache": cached}
            wanted = plain.generate(**asked, **options)
            for other in (compiled, merged):
                if not torch.equal(other.generate(**asked, **options), wanted):
                    return False
    return True
