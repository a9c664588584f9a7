"""Adaptations of a live model: left out, added, removed and renamed while the others keep training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import graftc
from graftc.compiler.adapt import places
from graftc.runtime.model import adapted as module
from graftc.specs.claims import FoldKind
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.registry import method_specs
from graftc.testing import largest_difference, outputs_of, perturb, same_bits
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.comparing import gradients_of, same_tensors, trainable
from tests.kit.models import adapted

ROLES = {"role": ["attn.q", "ffn.down"]}
LOW = {"name": "low", "method": "lora", "target": ROLES, "rank": 2}
OTHER = {"name": "other", "method": "lora", "target": {"role": "attn.q"}, "rank": 3, "dropout": 0.1}
KINDS: dict[str, dict[str, Any]] = {
    "lora": OTHER,
    "dora": {**OTHER, "method": "dora"},
    "prefix": {"name": "other", "method": "prefix", "length": 3},
    "prompt": {"name": "other", "method": "prompt", "length": 3},
    "houlsby": {"name": "other", "method": "houlsby"},
    "adamix": {"name": "other", "method": "adamix"},
    "full": {"name": "other", "method": "full", "target": {"role": "attn.v"}},
    "mask": {"name": "other", "method": "mask", "target": {"role": "attn.v"}, "density": 0.1},
}


def without(compiled: Any, name: str, *entries: Any, **spec: Any) -> Any:
    """Compile a model that never had that adaptation, with the tensors of the others."""
    own = graftc.compile({"adapt": list(entries), **spec}, tiny("bert")).eval()
    tensors = {n: t for n, t in compiled.adapter_state_dict().items() if f".{name}." not in f".{n}."}
    own.load_adapter_state_dict(tensors)
    return own


def gradients(compiled: Any) -> dict[str, torch.Tensor]:
    """Return the gradients of a loss of one batch by name, and clear them in the model."""
    compiled(**inputs_for(compiled)).logits.square().sum().backward()
    grads = gradients_of(compiled)
    compiled.zero_grad()
    return grads


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_one_is_left_out(kind: str) -> None:
    """Outputs and gradients are bit for bit those of a model without it, and all is restored afterwards."""
    compiled = adapted("bert", LOW, KINDS[kind], noise=0.1, seed=0)
    inputs = inputs_for(compiled)
    every, base = outputs_of(compiled, inputs), tiny("bert")
    alone = without(compiled, "other", LOW)
    with compiled.disabled("other"):
        assert same_bits(outputs_of(compiled, inputs), outputs_of(alone, inputs))
        grads, expected = gradients(compiled), gradients(alone)
        with compiled.disabled("low"):
            assert same_bits(outputs_of(compiled, inputs), outputs_of(base, inputs))
        with compiled.disabled():
            assert same_bits(outputs_of(compiled, inputs), outputs_of(base, inputs))
        assert same_bits(outputs_of(compiled, inputs), outputs_of(alone, inputs))
    assert same_tensors(grads, expected)
    assert largest_difference(outputs_of(compiled, inputs), outputs_of(alone, inputs)) > 1e-4
    assert same_bits(outputs_of(compiled, inputs), every)


@pytest.mark.full
def test_leaving_out_costs_nothing_in_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled after the first time, for inputs of both kinds, and nothing is captured at all."""
    compiled = graftc.compile({"adapt": [LOW, OTHER]}, tiny("bert"), cache=False)
    inputs = inputs_for(compiled)
    labelled = {**inputs, "labels": torch.zeros(len(inputs["input_ids"]), dtype=torch.long)}
    compiled(**labelled)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("again")

    monkeypatch.setattr("graftc.compiler.capture.capture_cache.capture", never)
    for _ in range(2):
        for names in (("other",), ("low",), ()):
            with compiled.disabled(*names):
                compiled(**inputs)
                compiled(**labelled)
        monkeypatch.setattr(module, "recompile", never)
        monkeypatch.setattr(places, "roles_of", never)


@pytest.mark.slow
def test_an_adapter_is_left_out_for_good(tmp_path: Path) -> None:
    """A disabled adapter is not used and gets no gradients until it is enabled, but it is saved."""
    compiled = adapted("bert", LOW, OTHER, noise=0.1, seed=0)
    inputs = inputs_for(compiled)
    every = outputs_of(compiled, inputs)
    compiled.disable("other")
    alone = outputs_of(without(compiled, "other", LOW), inputs)
    assert same_bits(outputs_of(compiled, inputs), alone)
    assert all(".low." in name for name in gradients(compiled))
    copied = copy.deepcopy(compiled)
    assert same_bits(outputs_of(copied, inputs), alone)
    compiled.save(tmp_path / "artifact")
    assert same_bits(outputs_of(graftc.load(tmp_path / "artifact", tiny("bert")).eval(), inputs), every)
    assert same_bits(outputs_of(compiled, inputs), alone)
    for each in (compiled, copied):
        each.enable("other")
        assert same_bits(outputs_of(each, inputs), every)


def entry_of(method: str) -> tuple[dict[str, Any], str]:
    """Return an adaptation with only the required fields, on sites that no other adapts, and a family for it."""
    spec = method_specs()[method]
    entry = {"name": "new", "method": method, **spec.needed}
    if method == "pasta":
        entry["special_tokens"] = [1, 2]
    elif method == "alora":
        entry |= {"invocation": [64, 61], "target": {"role": "attn.v"}}  # the first tokens of every batch
    elif spec.claims.folds == FoldKind.EXACT and method not in ("norms", "last_layers", "bitfit"):
        entry["target"] = {"role": "decoder.cross.attn.v" if method == "cross_attention" else "attn.v"}
    return entry, {"cross_attention": "t5", "pasta": "bert"}.get(method, "gpt2")


@pytest.mark.full
@pytest.mark.parametrize("method", method_specs())
def test_every_method_comes_and_goes(method: str) -> None:
    """Adding gives the same as compiling both, initial values included, or is refused with the same code.

    After it is left out, renamed and removed, the rest is unchanged, bit for bit, and no tensor is left over.
    """
    entry, family = entry_of(method)
    low = {**LOW, "target": {"role": "ffn.up"}}
    compiled = graftc.compile({"adapt": [low]}, tiny(family)).eval()
    perturb(compiled, 0.1)
    inputs = inputs_for(compiled)
    before, tensors = (
        outputs_of(compiled, inputs),
        [n for n, _ in (*compiled.named_parameters(), *compiled.named_buffers())],
    )
    try:
        both = graftc.compile({"adapt": [low, entry]}, tiny(family)).eval()
    except GraftError as error:
        with pytest.raises(GraftError, match=error.code):
            compiled.add(entry)
        assert same_bits(outputs_of(compiled, inputs), before)
        return
    compiled.add(entry)
    own, other = compiled.adapter_state_dict(), both.adapter_state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in other.items() if ".new." in f".{name}.")
    for name, p in compiled.named_parameters():
        if p.requires_grad and ".new." in f".{name}.":
            with torch.no_grad():
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    both.load_adapter_state_dict(compiled.adapter_state_dict())
    every = outputs_of(compiled, inputs)
    assert same_bits(every, outputs_of(both, inputs)) and not same_bits(every, before)
    with compiled.disabled("new"):
        assert same_bits(outputs_of(compiled, inputs), before)
    compiled.rename("new", "renamed")
    assert same_bits(outputs_of(compiled, inputs), every)
    compiled.remove("renamed")
    assert same_bits(outputs_of(compiled, inputs), before)
    assert [n for n, _ in (*compiled.named_parameters(), *compiled.named_buffers())] == tensors


def steps(compiled: Any, optimizer: Any, numbers: range) -> None:
    """Do steps of AdamW, each with its own seed."""
    compiled.train()
    for number in numbers:
        torch.manual_seed(number)
        inputs = inputs_for(compiled)
        compiled.extra_loss().backward() if compiled.extra_loss().requires_grad else None
        compiled(**inputs).logits.square().mean().backward()
        optimizer.step()
        compiled.after_step()
        optimizer.zero_grad()


ADALORA = {"name": "budget", "method": "adalora", "target": ROLES, "rank": 4, "target_rank": 2, "final_steps": 2}


@pytest.mark.full
def test_the_others_train_on() -> None:
    """Adding, renaming and removing between steps leaves the state of an optimiser and of a controller unchanged.

    The tensors end as without these changes, except for the rounding of products that one more adaptation takes part
    in.
    """
    results = []
    for disturbed in (False, True):
        compiled = adapted("bert", LOW, ADALORA, noise=0.1, seed=0).train()
        compiled.begin(12)
        mine = trainable(compiled)
        optimizer = torch.optim.AdamW(mine.values(), lr=1e-2)
        steps(compiled, optimizer, range(4))
        if disturbed:
            new = compiled.add({**OTHER, "dropout": 0.0})
            assert new and all(".other." in n and p.requires_grad for n, p in new.items())
            compiled.rename("other", "third")
            assert all(any(p is q for q in compiled.parameters()) for p in new.values())
        steps(compiled, optimizer, range(4, 8))
        if disturbed:
            compiled.remove("third")
        now = dict(compiled.named_parameters())
        assert all(now[name] is p for name, p in mine.items())
        steps(compiled, optimizer, range(8, 12))
        results.append((compiled.adapter_state_dict(), compiled.rank_pattern("budget")))
    (plain, ranks), (other, others) = results
    assert plain.keys() == other.keys()
    for name, tensor in other.items():
        torch.testing.assert_close(tensor, plain[name], rtol=0, atol=1e-6)
    assert all(torch.equal(ranks[site], live) for site, live in others.items())
    assert sum(int(live.sum()) for live in ranks.values()) == 2 * len(ranks)


@pytest.mark.slow
def test_what_is_added_trains() -> None:
    """An added adaptation starts as the identity, takes part from the next call on, and has parameter groups."""
    compiled = adapted("bert", LOW, noise=0.1, seed=0)
    inputs = inputs_for(compiled)
    before = outputs_of(compiled, inputs)
    optimizer = torch.optim.AdamW(graftc.optim.param_groups(compiled, 1e-2))
    new = compiled.add({"method": "lora", "target": {"role": "attn.v"}, "rank": 3})
    assert [a.name for a in compiled.spec.adapt] == ["low", "lora"]
    assert same_bits(outputs_of(compiled, inputs), before)
    (group,) = graftc.optim.param_groups(compiled, 1e-2, only=["lora"])
    assert {id(p) for p in group["params"]} == {id(p) for p in new.values()}
    optimizer.add_param_group(group)
    steps(compiled, optimizer, range(3))
    assert all(p.any() for p in new.values())
    compiled.eval()
    after = {n: t.clone() for n, t in compiled.adapter_state_dict().items()}
    again = adapted("bert", LOW, noise=0.1, seed=0)
    again.add(compiled.spec.adapt[1], {n: t for n, t in after.items() if ".lora." in n})
    again.load_adapter_state_dict(after)
    assert same_bits(outputs_of(compiled, inputs), outputs_of(again, inputs))


@pytest.mark.full
def test_names_and_signatures_after_a_change(tmp_path: Path) -> None:
    """New signatures, saving, loading, merging and copying work with the changed adaptations."""
    compiled = adapted("bert", LOW, OTHER, noise=0.1, seed=0, train=["classifier"])
    labels = {"labels": torch.zeros(2, dtype=torch.long)}
    inputs = inputs_for(compiled, (2, 5))
    compiled(**inputs, **labels)
    every = outputs_of(compiled, inputs)
    compiled.rename("other", "renamed")
    assert not any(".other." in name for name, _ in compiled.named_modules())
    assert same_bits(outputs_of(compiled, inputs), every)
    compiled(**inputs, **labels).loss.backward()
    compiled.train_only("renamed")
    assert {n.split(".graftc.")[1].split(".")[0] for n, p in compiled.named_parameters() if p.requires_grad} == {
        "renamed"
    }
    compiled.train_only()
    compiled.save(tmp_path / "artifact")
    loaded = graftc.load(tmp_path / "artifact", tiny("bert")).eval()
    assert same_bits(outputs_of(loaded, inputs), every)
    assert same_bits(outputs_of(copy.deepcopy(compiled), inputs), every)
    compiled.remove("low")
    assert [a.name for a in compiled.report.adaptations] == ["renamed", "trained"]
    left = outputs_of(compiled, inputs)
    assert largest_difference(outputs_of(compiled.merge(), inputs), left) < 1e-4
    assert compiled.state_dict().keys() == {n for n in loaded.state_dict() if ".low." not in f".{n}."}


@pytest.mark.full
def test_chosen_ones_are_merged() -> None:
    """The result is that of a model that never had the others."""
    compiled = adapted(
        "bert", LOW, OTHER, {"name": "front", "method": "prefix", "length": 3}, noise=0.1, seed=0, train=["classifier"]
    )
    inputs = inputs_for(compiled)
    merged = compiled.merge(["low"])
    with compiled.disabled("other", "front"):
        assert largest_difference(outputs_of(merged, inputs), outputs_of(compiled, inputs)) < 1e-4
    assert set(merged.folded) == {"low", "trained"}
    assert set(compiled.merge(["low", "other"], budget=1e-2).folded) == {"low", "other", "trained"}
    for names, code in ((["lwo"], "GC091"), (1e-3, "GC073"), ([], "GC073"), ("front", "GC050"), (None, "GC050")):
        with pytest.raises(GraftError) as caught:
            compiled.merge(names)
        assert caught.value.code == code


@pytest.mark.full
def test_a_composition_is_left_out_as_one() -> None:
    bank = [{**LOW, "name": name} for name in ("one", "two")]
    compiled = adapted("bert", *bank, OTHER, noise=0.1, seed=0, compose={"bank": ["one", "two"], "name": "tasks"})
    inputs = inputs_for(compiled)
    with compiled.disabled("tasks"):
        alone = outputs_of(compiled, inputs)
    own = graftc.compile({"adapt": [OTHER]}, tiny("bert")).eval()
    own.load_adapter_state_dict({n: t for n, t in compiled.adapter_state_dict().items() if ".other." in n})
    assert same_bits(alone, outputs_of(own, inputs))
    with pytest.raises(GraftError, match="GC036"), compiled.disabled("one"):
        pass
    with pytest.raises(GraftError, match="GC036"):
        compiled.remove("one")
    compiled.rename("one", "first")
    compiled.activate("first")
    with compiled.disabled("other"):
        compiled(**inputs, adapter_ids=["first"] * len(inputs["input_ids"]))


def state(compiled: Any) -> dict[str, Any]:
    """Return everything that a failure could have changed."""
    named = {n: id(t) for n, t in (*compiled.named_parameters(), *compiled.named_buffers())}
    return {"tensors": named, "modules": [n for n, _ in compiled.named_modules()], "spec": compiled.spec.model_dump()}


@pytest.mark.full
def test_what_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong names and places change nothing, nor does an interrupt while code for the new graphs is installed."""
    compiled = adapted("bert", LOW, OTHER, noise=0.1, seed=0)
    inputs = inputs_for(compiled)
    before, outputs = state(compiled), outputs_of(compiled, inputs)
    wrong = [
        (lambda: compiled.add({**OTHER, "name": "low"}), "GC005"),
        (lambda: compiled.add({**OTHER, "name": "new", "target": {"modules": ["nowhere"]}}), "GC011"),
        (lambda: compiled.add({**OTHER, "name": "new", "rnak": 3}), "GC003"),
        (lambda: compiled.add({**OTHER, "name": "new"}, {"graftc.new.x": torch.zeros(1)}), "GC053"),
        (lambda: compiled.add({**OTHER, "name": "new"}, compiled.adapter_state_dict()), "GC053"),
        (lambda: compiled.remove("lwo"), "GC091"),
        (lambda: compiled.rename("lwo", "high"), "GC091"),
        (lambda: compiled.rename("low", "other"), "GC005"),
        (lambda: compiled.rename("low", "a.b"), "GC002"),
        (lambda: compiled.disable("lwo"), "GC091"),
        (lambda: compiled.enable("lwo"), "GC091"),
    ]
    for run, code in wrong:
        with pytest.raises(GraftError) as caught:
            run()
        assert caught.value.code == code
    runner, install = compiled._graftc, compiled._graftc.install

    def interrupted(key: Any, program: Any) -> None:
        install(key, program)
        raise KeyboardInterrupt

    for run in (
        lambda: compiled.add({**OTHER, "name": "new"}),
        lambda: compiled.rename("low", "high"),
        lambda: compiled.remove("low"),
        lambda: compiled.disable("low"),
    ):
        monkeypatch.setattr(runner, "install", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
        monkeypatch.undo()
        assert state(compiled) == before
        assert same_bits(outputs_of(compiled, inputs), outputs)
    compiled.rename("low", "high")
    assert same_bits(outputs_of(compiled, inputs), outputs)


@pytest.mark.full
@pytest.mark.parametrize("called", [False, True], ids=["at once", "after a call"])
@pytest.mark.parametrize("out", ["low", "other"])
def test_changes_inside_of_disabled(out: str, called: bool) -> None:
    """An adaptation that is left out stays so through changes in the block, and is back afterwards."""
    inputs = None
    for change in ("remove", "rename", "rename out", "add", "disable"):
        compiled, kept = adapted("bert", LOW, OTHER, noise=0.1, seed=0), "other" if out == "low" else "low"
        inputs = inputs_for(compiled)
        if called:
            outputs_of(compiled, inputs)
        with compiled.disabled(kept):
            alone = outputs_of(compiled, inputs)
        with compiled.disabled():
            base = outputs_of(compiled, inputs)
        with compiled.disabled(out):
            inside = outputs_of(compiled, inputs)
            every = {"remove": alone, "disable": alone}.get(change)
            if change == "remove":
                compiled.remove(kept)
            elif change == "disable":
                compiled.disable(kept)
            elif change == "rename":
                compiled.rename(kept, "new")
            elif change == "rename out":
                compiled.rename(out, "new")
            else:
                compiled.add({"name": "front", "method": "prefix", "length": 3})
            if change != "add":
                expected = base if change in ("remove", "disable") else inside
                assert same_bits(outputs_of(compiled, inputs), expected), change
        if every is not None:
            assert same_bits(outputs_of(compiled, inputs), every), change
        compiled.enable()
        loaded = adapted("bert", *(a.model_dump(exclude_unset=True) for a in compiled.spec.adapt), noise=0.1, seed=0)
        loaded.load_adapter_state_dict(compiled.adapter_state_dict())
        assert same_bits(outputs_of(compiled, inputs), outputs_of(loaded, inputs)), change


@pytest.mark.full
@pytest.mark.parametrize("entry", ["x", None, 3, [LOW]])
def test_what_is_no_adaptation_is_not_added(entry: Any) -> None:
    with pytest.raises(GraftError, match="GC002"):
        adapted("bert", LOW, noise=0.1, seed=0).add(entry)
