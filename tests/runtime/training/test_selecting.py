"""Entries chosen by examples: their scores, what choosing leaves unchanged, warnings and errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.applications.recipes.tune import Stage
from graftc.passes.core.sites.site_slices import slices_of
from graftc.runtime.compiled import Compiled
from graftc.specs.errors.diagnostics import GraftError, GraftWarning
from graftc.testing import outputs_of, same_bits
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.training import adamw

TWO_ROUNDS = {"method": "lt_sft", "iterations": 2, "density": 0.05}


def batches(model: nn.Module, count: int = 3) -> list[dict[str, Tensor]]:
    """Return batches of four sentences with labels."""
    generator = torch.Generator().manual_seed(5)
    names = {"input_ids": (4, 7)}
    result = []
    for _ in range(count):
        batch = {n: torch.randint(0, 101, size, generator=generator) for n, size in names.items()}
        labels = (4,) if hasattr(model, "classifier") else (4, 7)
        batch["labels"] = torch.randint(0, 3, labels, generator=generator)
        result.append(batch)
    return result


def train(compiled: Compiled, stage: Stage | None = None, steps: int = 3) -> None:
    """Do some steps of AdamW with weight decay, on random batches."""
    optimiser = adamw(compiled, lr=1e-2, weight_decay=0.5)
    for batch in batches(compiled.compilation.model, steps):
        optimiser.zero_grad()
        noise = torch.rand(()) / 10 + 1  # a training that draws random numbers
        (compiled(**batch).loss * noise).backward()
        optimiser.step()
        compiled.after_step()


def deltas(compiled: Compiled) -> dict[str, tuple[str, Tensor]]:
    """Return, by the name of a base tensor, the name of its trained tensor and the indices of its entries."""
    compilation = compiled.compilation
    result: dict[str, tuple[str, Tensor]] = {}
    for resolved in compilation.main.resolved:
        for site, _ in resolved.places:
            parts = compilation.parts[resolved.name].get(site.key, {})
            for region in slices_of(site, compilation.store):
                if f"{region.part}_indices" in parts:
                    indices = compilation.store.get(parts[f"{region.part}_indices"])
                    result[region.tensor] = parts.get(f"{region.part}_delta", parts.get(region.part, "")), indices
    return result


def entries(compiled: Compiled) -> dict[str, set[int]]:
    """Return the trained entries of each base tensor."""
    return {name: set(indices.tolist()) for name, (_, indices) in deltas(compiled).items()}


def fisher(model: nn.Module, examples: list[dict[str, Tensor]], single: bool = True) -> dict[str, Tensor]:
    """Compute the diagonal of the empirical Fisher information in plain torch."""
    scores = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    model.eval()
    for batch in examples:
        for row in range(len(batch["labels"])) if single else (slice(None),):
            own = {n: v[row : row + 1] if isinstance(row, int) else v for n, v in batch.items()}
            model.zero_grad()
            model(**own).loss.backward()
            for n, p in model.named_parameters():
                if p.grad is not None:
                    scores[n] += p.grad**2
    return scores


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_fisher_information_of_single_examples(family: str) -> None:
    """Entries are as many as the budget says, and those of a plain loop; the scale of the loss changes none."""
    model = tiny(family)
    examples = batches(model)
    compiled = graftc.compile({"adapt": [{"method": "mask", "entries": 1000}]}, model)
    chosen = compiled.select(examples)
    scaled = compiled.select(examples, loss=lambda outputs, _: outputs.loss * 8)
    selected = entries(chosen)
    assert entries(scaled) == selected
    assert sum(len(own) for own in selected.values()) == chosen.report.trainable_parameters == 1000
    scores = {n: s for n, s in fisher(model, examples).items() if not n.startswith(("classifier", "lm_head"))}
    least = torch.cat([s.flatten() for s in scores.values()]).topk(1000).values.min()
    for name, score in scores.items():
        above = set(torch.nonzero(score.flatten() > least * 1.001).flatten().tolist())
        at_least = set(torch.nonzero(score.flatten() >= least * 0.999).flatten().tolist())
        assert above <= selected.get(name, set()) <= at_least, name
    mean = fisher(model, examples, single=False)
    assert any(not torch.allclose(mean[n], s, rtol=0.1) for n, s in scores.items())


@pytest.mark.slow
def test_movement() -> None:
    """The chosen entries are those that descent moves away from zero."""
    model = tiny("bert")
    examples = batches(model)
    spec = {"adapt": [{"method": "mask", "selection": "movement", "entries": 300, "target": {"role": "ffn.down"}}]}
    chosen = graftc.compile(spec, model).select(examples)
    model.eval()
    scores = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for batch in examples:
        model.zero_grad()
        model(**batch).loss.backward()
        for n, p in model.named_parameters():
            scores[n] -= p.detach() * p.grad if p.grad is not None else 0
    names = [n for n in scores if ".output.dense." in n and "attention" not in n]
    least = torch.cat([scores[n].flatten() for n in names]).topk(300).values.min()
    for name in names:
        wanted = torch.nonzero(scores[name].flatten() >= least * 0.999).flatten().tolist()
        assert set(wanted) >= entries(chosen).get(name, set())


@pytest.mark.full
def test_selecting_leaves_everything_as_it_was() -> None:
    """Modes, `requires_grad`, gradients and values are unchanged."""
    model = tiny("bert")
    compiled = graftc.compile({"adapt": [{"method": "mask"}], "train": ["classifier"]}, model).train()
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in compiled.named_parameters()}
    chosen = compiled.select(batches(model))
    assert compiled.training and chosen.training
    assert not chosen.unselected and compiled.unselected == ("mask",)
    for name, parameter in compiled.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])
    inputs = inputs_for(compiled)
    assert same_bits(outputs_of(chosen.eval(), inputs), outputs_of(model, inputs))


@pytest.mark.full
def test_training_before_examples_have_chosen_warns(tmp_path: Path) -> None:
    """Merging a model that trained too early warns; a model whose examples have chosen is saved without a warning."""
    model = tiny("bert")
    compiled = graftc.compile({"adapt": [{"method": "mask", "density": 0.1}]}, model)
    train(compiled.train())
    with pytest.warns(GraftWarning, match="before selection by examples"):
        compiled.eval().merge()
    chosen = graftc.compile({"adapt": [{"method": "mask", "density": 0.1}]}, model).select(batches(model))
    train(chosen.train())
    chosen.eval().save(tmp_path / "artifact")
    loaded = graftc.load(tmp_path / "artifact", model)
    assert entries(loaded) == entries(chosen)
    assert not loaded.unselected
    assert same_bits(outputs_of(loaded, inputs_for(chosen)), outputs_of(chosen, inputs_for(chosen)))


@pytest.mark.full
@pytest.mark.parametrize(
    ("run", "code"),
    [
        (lambda m: graftc.compile({"adapt": [{"method": "ia3"}]}, m).select([]), "GC056"),
        (lambda m: graftc.compile({"adapt": [{"method": "mask"}]}, m).select([]), "GC056"),
        (
            lambda m: graftc.compile({"adapt": [{"method": "mask"}]}, m).select(
                [{"input_ids": torch.ones(1, 3).long()}]
            ),
            "GC056",
        ),
        (lambda m: graftc.compile({"adapt": [{"method": "mask"}]}, m).advance(), "GC057"),
        (lambda m: graftc.tune({"adapt": [{"method": "mask"}]}, m, train), "GC056"),
        (lambda m: graftc.compile({"adapt": [{"method": "mask", "entries": 10**8}]}, m), "GC020"),
        (lambda m: graftc.compile({"adapt": [{"method": "mask", "density": 1e-9}]}, m), "GC020"),
        (lambda m: graftc.compile({"adapt": [{"method": "mask", "density": 0.1, "entries": 3}]}, m), "GC002"),
    ],
)
def test_errors(run: Callable[[nn.Module], object], code: str) -> None:
    """Each error has its code."""
    with pytest.raises(GraftError) as error:
        run(tiny("bert"))
    assert error.value.code == code
