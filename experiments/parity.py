"""Compare a method in graftc and in PEFT: the same factors, the same batches, the same optimiser.

The factors are those of an export that PEFT loads. Gradients and tensors are compared by the keys of PEFT's files.
"""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor

import graftc
from experiments.sources import Batch, base_of, batches_of, unlabelled
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Trained:
    """One side of a comparison, after training.

    Attributes:
        losses: the loss of every step.
        gradients: those of the first step, by PEFT's keys.
        tensors: the trained tensors, by PEFT's keys.
        parameters: the number of values that train.
    """

    losses: tuple[float, ...]
    gradients: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    parameters: int


def figures(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a cell: differences, relative to PEFT's values.

    ``rounding`` and ``peft_rounding`` are the differences of both from the gradients that PEFT computes in float64 from
    the same weights and factors.

    Args:
        cell: ``method``, ``model``, ``dtype``, ``rate``, ``seed``, ``steps`` and ``settings``: the entry of a spec's
            ``adapt``, the noise that is added to its tensors, and the sizes of a batch.
    """
    settings, seed = cell["settings"], cell["seed"]
    rows, tokens = settings["batch"]
    invocation = settings["adapt"].get("invocation", ())
    *data, other = batches_of(cell["model"], cell["steps"] + 1, rows, tokens, seed, invocation)
    base = base_of(cell["model"], getattr(torch, cell["dtype"]), seed)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        compiled = graftc.compile({"adapt": [settings["adapt"]]}, base, seed=seed)
        perturb(compiled, settings["noise"], seed=seed)
        compiled.export(folder / "start", format="peft")
        ours = _ours(compiled, data, cell["rate"], folder)
        theirs = _theirs(_loaded(base, folder / "start"), data, cell["rate"])
        exact = theirs
        if cell["dtype"] != "float64":
            exact = _theirs(_loaded(copy.deepcopy(base).double(), folder / "start"), data[:1], cell["rate"])
        return {
            "parameters": ours.parameters,
            "peft_parameters": theirs.parameters,
            **_differences(ours, theirs),
            "rounding": apart(ours.gradients, exact.gradients),
            "peft_rounding": apart(theirs.gradients, exact.gradients),
            **_merged(compiled, base, folder / "end", unlabelled(other)),
        }


def _differences(ours: Trained, theirs: Trained) -> dict[str, Any]:
    relative = [abs(a - b) / abs(b) for a, b in zip(ours.losses, theirs.losses, strict=True)]
    return {
        "first_loss": relative[0],
        "gradients": apart(ours.gradients, theirs.gradients),
        "losses": max(relative, key=lambda value: math.inf if math.isnan(value) else value),
        "tensors": apart(ours.tensors, theirs.tensors),
        "start": theirs.losses[0],
        "end": theirs.losses[-1],
    }


def apart(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return the largest difference between tensors of the same keys, over PEFT's largest entry.

    Raises:
        ValueError: if PEFT has a key or a shape that graftc does not have, or nothing at all.
    """
    missing = sorted(theirs.keys() - ours.keys())
    if missing or not theirs:
        raise ValueError(f"no tensor of graftc for {missing[:3]} of PEFT's {len(theirs)}")
    if wrong := [key for key in theirs if ours[key].shape != theirs[key].shape]:
        raise ValueError(f"other shapes: {wrong[:3]}")
    largest = max(float(value.double().abs().max()) for value in theirs.values())
    worst = max(float((ours[key].double() - value.double()).abs().max()) for key, value in theirs.items())
    return worst / largest


def _train(
    parameters: Sequence[Tensor],
    loss_of: Callable[[Batch], Tensor],
    after: Callable[[int], None],
    first: Callable[[], None],
    data: Sequence[Batch],
    rate: float,
) -> tuple[float, ...]:
    """Train with AdamW at a constant rate, and return the loss of every step.

    Args:
        parameters: what trains.
        loss_of: a function that returns the loss of a batch.
        after: a function that is called after a step of the optimiser, with its number from 0.
        first: a function that is called when the gradients of the first step are there.
        data: one batch a step.
        rate: the learning rate.
    """
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses: list[float] = []
    for step, batch in enumerate(data):
        loss: Any = loss_of(batch)
        loss.backward()
        losses.append(float(loss.detach()))
        if step == 0:
            first()
        optimiser.step()
        after(step)
        optimiser.zero_grad()
    return tuple(losses)


def _ours(compiled: Any, data: Sequence[Batch], rate: float, folder: Path) -> Trained:
    """Train graftc's model, and leave an export of it in ``end``."""
    parameters = {name: p for name, p in compiled.named_parameters() if p.requires_grad}
    count = sum(p.numel() for p in parameters.values())

    def export_gradients() -> None:
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        tensors = {name: value.clone() for name, value in compiled.adapter_state_dict().items()}
        compiled.load_adapter_state_dict({**tensors, **gradients})
        compiled.export(folder / "gradients", format="peft")
        compiled.load_adapter_state_dict(tensors)

    losses = _train(
        list(parameters.values()),
        lambda batch: compiled(**batch).loss + compiled.extra_loss(),
        lambda step: compiled.after_step(),
        export_gradients,
        data,
        rate,
    )
    compiled.export(folder / "end", format="peft")
    return Trained(losses, load_file(folder / "gradients" / WEIGHTS), load_file(folder / "end" / WEIGHTS), count)


def _loaded(base: Any, folder: Path) -> Any:
    """Return PEFT's model of a folder, to be trained."""
    base, config = copy.deepcopy(base), peft.PeftConfig.from_pretrained(str(folder))
    if not config.is_prompt_learning:
        return peft.PeftModel.from_pretrained(base, folder, is_trainable=True).train()
    # PEFT refuses to train virtual tokens that it has loaded, so they are put into those that it makes.
    config.inference_mode = False
    model = peft.get_peft_model(base, config)
    peft.set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
    return model.train()


def _theirs(model: Any, data: Sequence[Batch], rate: float) -> Trained:
    adalora = str(model.peft_config["default"].peft_type.value) == "ADALORA"
    # Without a task type, PEFT's outer model does not call the one that adds AdaLoRA's term to the loss.
    called = model.base_model if adalora else model
    gradients: dict[str, Tensor] = {}

    def keep() -> None:
        gradients.update(_by_key(model, lambda parameter: parameter.grad))

    def after(step: int) -> None:
        if adalora:
            model.base_model.update_and_allocate(step + 1)

    parameters = [p for p in model.parameters() if p.requires_grad]
    losses = _train(parameters, lambda batch: called(**batch).loss, after, keep, data, rate)
    if adalora:
        # Otherwise PEFT leaves out the ranks that the last pruning set to zero, some of which have grown since.
        model.peft_config["default"].rank_pattern = None
    tensors = _by_key(model, lambda parameter: parameter.detach())
    return Trained(losses, gradients, tensors, sum(p.numel() for p in parameters))


def _by_key(model: Any, value_of: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
    """Return a value of every parameter that PEFT trains, by the keys of its file."""
    if model.peft_config["default"].is_prompt_learning:
        value = value_of(model.prompt_encoder["default"].embedding.weight)
        return {} if value is None else {"prompt_embeddings": value.clone()}
    unknown = {n: torch.full_like(t, math.nan) for n, t in model.state_dict().items() if t.is_floating_point()}
    named = [(n, value_of(p)) for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    known = {n: value.clone() for n, value in named if value is not None}
    by_key = peft.get_peft_model_state_dict(model, state_dict={**unknown, **known}, save_embedding_layers=False)
    return {key: value for key, value in by_key.items() if value.is_floating_point() and not value.isnan().all()}


def _merged(compiled: Any, base: Any, folder: Path, batch: Batch) -> dict[str, Any]:
    """Return the difference of logits after merging the same tensors with both, or why there is none."""
    try:
        ours = compiled.merge().to_transformers().eval()
    except GraftError as error:
        if error.code not in ("GC022", "GC050"):
            raise
        return {"merged": None}
    theirs = _loaded(base, folder).merge_and_unload().eval()
    with torch.no_grad():
        mine, other = (model(**batch).logits.double() for model in (ours, theirs))
    return {"merged": float((mine - other).abs().max() / other.abs().max())}
