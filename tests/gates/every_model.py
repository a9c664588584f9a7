"""What is asked of every model: it is the source before training, its gradients are right, and it merges, saves, loads
and generates as the source's class does."""

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


def compiled_of(model: nn.Module, batch: Mapping[str, Any], target: Any, maps: str, **options: Any) -> Any:
    """LoRA at a target, or where its roles are not known at maps by their names."""
    for chosen in (target, {"modules": maps}):
        spec = {"adapt": [{"method": "lora", "rank": 2, "target": chosen}], **options}
        try:
            return graftc.compile(spec, model, dict(batch), seed=0, cache=False)
        except GraftError as error:
            if error.code not in ("GC010", "GC011", "GC012", "GC015") or chosen == {"modules": maps}:
                raise
    raise AssertionError


def numbers(outputs: Any) -> dict[str, Tensor]:
    """The floating-point tensors of outputs, by name."""
    found: dict[str, Tensor] = {}

    def look(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                found[name] = value
        elif isinstance(value, Mapping):
            for key, each in value.items():
                look(f"{name}.{key}", each)
        elif isinstance(value, list | tuple):
            for index, each in enumerate(value):
                look(f"{name}.{index}", each)

    look("", outputs)
    return found


def apart(ours: Any, theirs: Any) -> float:
    """The largest difference of two calls' outputs, over the largest element of each; infinite where one has others."""
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
    """The loss where there is one, and otherwise the mean of squares."""
    own = numbers(outputs)
    return own[".loss"] if ".loss" in own else torch.stack([v.square().mean() for v in own.values()]).sum()


def seeded(model: Any, batch: Mapping[str, Any]) -> Any:
    """A call from the same random state as any other one."""
    torch.manual_seed(11)
    return model(**batch)


def check_identity(compiled: Any, model: nn.Module, batches: list[Mapping[str, Any]]) -> dict[str, float]:
    """How far it is from the source before training, in either mode, on every batch. The source is frozen, as what is
    tuned is: products of weights that ask for gradients may be computed in another order (`torch.matmul`)."""
    found = {}
    for mode in ("eval", "train"):
        compiled.train(mode == "train")
        model.train(mode == "train")
        for number, batch in enumerate(batches):
            with torch.no_grad():
                theirs = seeded(copy.deepcopy(model).requires_grad_(False), batch)
                found[f"{mode} {number}"] = apart(seeded(compiled, batch), theirs)
    compiled.eval(), model.eval()
    return found


def check_gradients(trained: Any, plain: nn.Module, batch: Mapping[str, Any]) -> float:
    """How far gradients of ``A`` and ``B`` are from what the chain rule makes of those of the whole folded weight."""
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
        if own.shape[-2:] != (b.shape[-2], a.shape[-1]):  # a convolution in groups
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
    """Everything that is asked of a model; a step that fails is there with its error.

    Args:
        model: in eval mode.
        batches: of different structure; it is compiled with the first.
        folder: an empty one.
        target: what is adapted, and ``maps`` where roles are not known.
        maps: a glob of maps.
        generates: whether its class does.
        options: of the spec.
    """
    found: dict[str, Any] = {}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def step(name: str, run: Any) -> Any:
        try:
            found[name] = run()
            return found[name]
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error)[:300]}"
            return None

    warnings.simplefilter("ignore")
    try:
        compiled = compiled_of(model, batches[0], target, maps, **options)
    except Exception as error:
        return {"compile": f"{type(error).__name__}: {str(error)[:500]}"}
    found["level"] = "graph" if not compiled.compilation.notes else "; ".join(compiled.compilation.notes)[:300]
    step("identity", lambda: check_identity(compiled, model, batches))
    perturb(compiled.eval(), 0.05)
    merged = step("merged", lambda: compiled.merge())
    if merged is not None:
        found["merged"] = bool(merged.certificate.passed)
        step("merge", lambda: max(_gap(compiled, merged, batch) for batch in batches))
        plain = step("folded", lambda: _folded(model, merged))
        if plain is not None:
            found["folded"] = max(_gap(compiled, plain, batch) for batch in batches)
            step("gradients", lambda: check_gradients(compiled, plain, batches[0]))
            if isinstance(found["gradients"], float) and found["gradients"] > CLOSE:
                step("gradients", lambda: _gradients_in_double(model, batches[0], target, maps))
            plain.requires_grad_(False)
            if generates:
                step("generate", lambda: _generates(compiled, merged, plain, batches))
    step("saved", lambda: compiled.save(folder / "artifact") and None)
    loaded = step("loaded", lambda: graftc.load(folder / "artifact", model).eval())
    if loaded is not None:
        found["loaded"] = max(_gap(loaded, compiled, batch) for batch in batches)
    now = model.state_dict()
    found["source kept"] = all(torch.equal(tensor, now[name]) for name, tensor in before.items())
    return found


def _gradients_in_double(model: nn.Module, batch: Mapping[str, Any], target: Any, maps: str) -> float:
    """As `check_gradients`: of two entries that are nearly equal, maxima of other roundings pick another one."""
    wide = {name: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for name, t in batch.items()}
    model = copy.deepcopy(model).double()
    compiled = compiled_of(model, wide, target, maps).eval()
    perturb(compiled, 0.05)
    return check_gradients(compiled, _folded(model, compiled.merge()), wide)


def _gap(one: Any, other: Any, batch: Mapping[str, Any]) -> float:
    with torch.no_grad():
        return apart(seeded(one, batch), seeded(other, batch))


def _folded(model: nn.Module, merged: Any) -> nn.Module:
    """The source's own class with the folded tensors."""
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
