"""The PET recipe from rows to a classifier: in full, in generations, without labels, in a bank, and interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import graftc
from graftc.applications.pet import classifier as classifying
from graftc.applications.pet import members as training
from graftc.applications.pet.asking import by_length, encoder_of
from graftc.applications.pet.data import PetData, TextRows
from graftc.applications.pet.members import _Group, banked, slot_name, trained_answers
from graftc.applications.pet.recipe import _task, pet
from graftc.applications.pet.result import PetResult
from graftc.applications.pet.sets import set_of
from graftc.applications.pet.stages import KeptStages
from graftc.applications.pet.task import Examples
from graftc.applications.recipes.tune import Stage
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.pet.io import load_pet_spec
from graftc.testing import tiny
from tests.applications.pet.small import LORA, SPEC, data, model, sentinels, texts, tokenizer

QUICK: dict[str, Any] = {
    **SPEC,
    "training": {**SPEC["training"], "steps": 4, "auxiliary": 0},
    "classifier": {"training": {**SPEC["classifier"]["training"], "steps": 4}},
}
"""Next to no training."""


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return model(initializer_range=0.1)


def _state(result: PetResult) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in result.classifier.adapter_state_dict().items()}


def _same(one: PetResult, other: PetResult) -> bool:
    mine, theirs = _state(one), _state(other)
    equal = mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    return equal and torch.equal(one.soft_labels, other.soft_labels) and one.to_json() == other.to_json()


def _no_training(*_: object, **__: object) -> None:
    raise AssertionError("it is done")


@pytest.mark.full
def test_members_learn_and_a_classifier_learns_from_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows lead to an accurate classifier; a finished run is only read, and a different one is refused."""
    base = model(initializer_range=0.1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    options = {"steps": 60, "learning_rate": 5e-3, "max_length": 24}
    spec = {**SPEC, "training": options, "classifier": {"training": {**options, "steps": 100}}}
    result = pet(spec, base, tokenizer(), data(10, 40, 20), folder=tmp_path)
    assert result.rows == {"labelled": 10, "unlabelled": 40, "test": 20} and result.labels == ("space", "hockey")
    assert [(m.pattern, m.repetition) for m in result.members] == [("pattern-1", 0), ("pattern-2", 0)]
    assert sum(m.weight for m in result.members) == pytest.approx(1)
    assert (result.ensemble["test"] or 0) >= 0.9 and (result.final["test"] or 0) >= 0.9
    torch.testing.assert_close(result.soft_labels.sum(1), torch.ones(40))
    monkeypatch.setattr(training, "train_members", _no_training)
    monkeypatch.setattr(classifying, "train_classifier", _no_training)
    assert _same(pet(spec, base, tokenizer(), data(10, 40, 20), folder=tmp_path), result)
    other: list[tuple[str, Callable[[], PetResult]]] = [
        ("seed", lambda: pet(spec, base, tokenizer(), data(10, 40, 20), folder=tmp_path, seed=1)),
        ("data", lambda: pet(spec, base, tokenizer(), data(4, 40, 20), folder=tmp_path)),
        ("spec", lambda: pet({**spec, "ensemble": "uniform"}, base, tokenizer(), data(10, 40, 20), folder=tmp_path)),
        ("base", lambda: pet(spec, model(1), tokenizer(), data(10, 40, 20), folder=tmp_path)),
    ]
    for what, run in other:
        with pytest.raises(GraftError, match=f"a different {what}\n") as error:
            run()
        assert error.value.code == "GC058"


@pytest.mark.full
def test_the_same_without_a_folder(base: nn.Module, tmp_path: Path) -> None:
    """Runs with and without a folder agree, with members trained in stages and a classifier saved with its base."""
    adapt = [{"method": "lt_sft", "entries": 300}]
    spec = {**QUICK, "patterns": QUICK["patterns"][:1], "spec": {"adapt": adapt}}
    kept, plain = (pet(spec, base, tokenizer(), data(), folder=folder) for folder in (tmp_path, None))
    assert _same(kept, plain)
    assert (tmp_path / "generation-0" / "member-0" / "stage-2").exists()
    loaded = graftc.load(tmp_path / "classifier").eval()
    inputs = tokenizer()([row["text"] for row in texts(4, 3)[0]], return_tensors="pt")
    assert torch.equal(loaded(**inputs).logits, kept.classifier(**inputs).logits)
    merged = loaded.merge().to_transformers()
    torch.testing.assert_close(merged(**inputs).logits, loaded(**inputs).logits)
    assert merged.config.id2label == {0: "space", 1: "hockey"}


@pytest.mark.full
def test_without_labels_untrained_patterns_are_the_ensemble(base: Any) -> None:
    """Soft labels equal those computed from the language model's own logits, without graftc."""
    rows = data(0, 10)
    result = pet(QUICK, base, tokenizer(), rows)
    assert result.ensemble == {"labelled": None, "test": result.ensemble["test"]}
    assert [m.weight for m in result.members] == [0.5, 0.5]
    assert rows.unlabelled is not None
    own, mask, said = tokenizer(), tokenizer().mask_token_id, []
    ids = {word: own.convert_tokens_to_ids(word) for word in ("space", "nasa", "hockey")}
    for pattern in ("{} . it is about [MASK] .", "topic : [MASK] . {}"):
        for row in rows.unlabelled.rows:
            inputs = own(pattern.format(row["text"]), return_tensors="pt")
            with torch.no_grad():
                logits = base(**inputs).logits[0, inputs["input_ids"][0].tolist().index(mask)]
            said.append(torch.stack([(logits[ids["space"]] + logits[ids["nasa"]]) / 2, logits[ids["hockey"]]]))
    mean = torch.stack(said).view(2, 10, 2).mean(0)
    torch.testing.assert_close(result.soft_labels, torch.softmax(mean, 1), atol=1e-5, rtol=1e-4)


@pytest.mark.full
def test_generations_grow_from_nothing(base: nn.Module, tmp_path: Path) -> None:
    """Without labels, the first set has ``start_size`` rows, as many for each label, and no first member is trained."""
    spec = {**QUICK, "ipet": {"generations": 2, "growth": 2, "start_size": 4}}
    spec["classifier"] = {**QUICK["classifier"], "kind": "cloze"}
    result = pet(spec, base, tokenizer(), data(0), folder=tmp_path)
    first, second = (_lines(tmp_path, generation) for generation in (1, 2))
    for line in first:
        assert len(line["rows"]) == 4 and sorted(line["labels"]) == [0, 0, 1, 1]
        assert line["teachers"] == [1 - line["member"]]
    for line, size in zip(second, result.generations[1].examples, strict=True):
        assert len(line["rows"]) == size == 8 - sum(line["missing"])
    assert not (tmp_path / "generation-0").exists()
    assert not (tmp_path / "generation-1" / "member-0").exists()
    assert (tmp_path / "generation-2" / "member-0" / "result").exists()


def _lines(folder: Path, generation: int) -> list[dict[str, Any]]:
    text = (folder / f"generation-{generation}" / "sets.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()[:-1]]  # the last one is the digest of the others


class KilledError(Exception):
    """Raised where the test kills the run."""


@pytest.mark.full
def test_killed_everywhere(base: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run killed anywhere ends with the same tensors when it is called again, and repeats no finished work.

    It is killed in the middle of every training, and before and after each stage is written.
    """
    spec = {**QUICK, "ipet": {"generations": 1, "growth": 3}}
    whole = pet(spec, base, tokenizer(), data())
    passed: set[str] = set()
    trainings: list[str] = []

    def die_once(at: str) -> None:
        if at not in passed:
            passed.add(at)
            raise KilledError(at)

    telling, tensors, lines = training.telling, KeptStages.tensors, KeptStages.lines

    def told(what: str) -> Callable[[int, int], None]:
        trainings.append(what)

        def tell(step: int, steps: int) -> None:
            if step == 2:
                die_once(f"in {what}")
            telling(what)(step, steps)

        return tell

    def dying(stage: Any) -> Any:
        def dying_stage(self: KeptStages, name: str, make: Callable[[], Any]) -> Any:
            def before() -> Any:
                value = make()
                die_once(f"before {name}")
                return value

            done = stage(self, name, before)
            die_once(f"after {name}")
            return done

        return dying_stage

    monkeypatch.setattr(training, "telling", told)
    monkeypatch.setattr(classifying, "telling", told)
    monkeypatch.setattr(KeptStages, "tensors", dying(tensors))
    monkeypatch.setattr(KeptStages, "lines", dying(lines))
    resumed, kills = None, 0
    while resumed is None:
        try:
            resumed = pet(spec, base, tokenizer(), data(), folder=tmp_path)
        except KilledError:
            kills += 1
    stages = ["untrained", "generation-1/sets", "ensemble", "answers"]
    stages += [f"generation-{g}/member-{m}" for g in (0, 1) for m in (0, 1)]
    assert {at.partition(" ")[2] for at in passed if not at.startswith("in ")} == set(stages)
    assert kills == len(passed) == 2 * len(stages) + 5
    assert all(trainings.count(what) == 2 for what in trainings)  # begun again only after it was cut off
    assert _same(resumed, whole)


@pytest.mark.full
def test_slots_of_a_bank_train_as_if_each_were_alone(base: nn.Module) -> None:
    """Rows, masks and initial tensors are the same in a bank and alone, and norms are clipped for each slot."""
    options = {**SPEC["training"], "steps": 3, "auxiliary": 0.2, "max_grad_norm": 0.05, "learning_rate": 1e-2}
    still = model(initializer_range=0.1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    document = {**SPEC, "training": options, "spec": LORA, "members": "bank"}
    task = _task(load_pet_spec(document), still, tokenizer(), data(), None, 0)
    group = _Group(task, 0, task.members)
    sets = [set_of(task, None)] * 2
    together = graftc.compile(group._spec(), still)
    starts = {name: tensor.clone() for name, tensor in together.adapter_state_dict().items()}
    for name, tensor in starts.items():
        if tensor.is_floating_point() and not tensor.any():
            starts[name] = torch.randn_like(tensor) * 0.05
    together.load_adapter_state_dict(starts)
    group._train(together.train(), Stage(1, 1, None), group._asking(), sets)
    alone = replace(task, spec=load_pet_spec({**document, "members": "separate"}))
    moved = together.adapter_state_dict()
    for member in task.members:
        own = _Group(alone, 0, [member])
        single = graftc.compile(own._spec(), still)
        slot = slot_name("lora", member.number)
        names = {name: name.replace(".lora.", f".{slot}.") for name in single.adapter_state_dict()}
        single.load_adapter_state_dict({name: starts[there] for name, there in names.items()})
        own._train(single.train(), Stage(1, 1, None), own._asking(), sets[:1])
        for name, tensor in single.adapter_state_dict().items():
            assert not torch.equal(moved[names[name]], starts[names[name]])
            torch.testing.assert_close(moved[names[name]], tensor, atol=2e-5, rtol=1e-3)


@pytest.mark.full
def test_a_bank_labels_and_is_kept(base: nn.Module, tmp_path: Path) -> None:
    """A bank with two members of one pattern labels rows for the next generation, whose bank is kept."""
    adapt = [*LORA["adapt"], {"method": "ia3"}]
    spec = {**QUICK, "patterns": QUICK["patterns"][:1], "seeds": 2, "members": "bank", "spec": {"adapt": adapt}}
    result = pet({**spec, "ipet": {"generations": 1, "growth": 2}}, base, tokenizer(), data(), folder=tmp_path)
    assert [m.repetition for m in result.members] == [0, 1]
    assert not (tmp_path / "generation-0" / "bank").exists()
    assert (tmp_path / "generation-1" / "bank" / "result").exists()
    assert [len(line["rows"]) + sum(line["missing"]) for line in _lines(tmp_path, 1)] == [6, 6]


@pytest.mark.parametrize("extra", [{"train": ["cls"]}, {"tokens": {"add": ["<new>"]}}])
def test_slots_share_nothing_that_trains(extra: dict[str, Any]) -> None:
    with pytest.raises(GraftError) as error:
        banked(Spec.model_validate({**LORA, **extra}), 2)
    assert error.value.code == "GC177"


def test_rows_that_are_not_there(base: nn.Module) -> None:
    with pytest.raises(GraftError, match="no unlabelled rows") as error:
        pet(QUICK, base, tokenizer(), replace(data(), unlabelled=None))
    assert error.value.code == "GC182"
    with pytest.raises(GraftError, match="no field 'text'"):
        pet(QUICK, base, tokenizer(), PetData(unlabelled=TextRows(({"title": "moon"},))))


@pytest.mark.full
def test_a_full_disk(base: nn.Module, small_disk: Callable[[int], Path]) -> None:
    """Wherever the disk is full, the run ends with GC064, and resumes when there is more room."""
    spec, room, failures = {**QUICK, "patterns": QUICK["patterns"][:1]}, 16, 0
    whole = pet(spec, base, tokenizer(), data())
    while True:
        folder = small_disk(room)
        try:
            result = pet(spec, base, tokenizer(), data(), folder=folder / "run")
            break
        except GraftError as error:
            assert error.code == "GC064" and "No space left on device" in error.message
            room, failures = room * 5 // 4, failures + 1
    assert failures > 5 and _same(result, whole)


def test_an_auxiliary_loss_that_a_model_has_not() -> None:
    """An auxiliary loss that the model does not have is refused before training."""
    with pytest.raises(GraftError, match="no auxiliary loss") as error:
        pet({**SPEC, "patterns": SPEC["patterns"][:1]}, tiny("t5"), sentinels(), data())
    assert error.value.code == "GC179" and str(error.value.place) == "training.auxiliary"


@pytest.mark.parametrize(
    ("change", "code", "line", "path"),
    [
        ({"verbalizer": {"space": "space", "ice hockey": "puckish"}}, "GC178", "ice hockey: puckish", ".ice hockey"),
        ({"verbalizer": {"space": ["nasa", "space"], "hockey": "Hockey space"}}, "GC178", "hockey: Hockey", ".hockey"),
        ({"patterns": ["{text} {blank}", "{text} [SEP] {blank}"]}, "GC179", "[SEP]", "patterns[1]"),
        (
            {
                "patterns": [
                    "{text} {blank}",
                    {"text": "{blank} {text}", "verbalizer": {"space": "moon", "hockey": "ox"}},
                ]
            },
            "GC178",
            "hockey: ox",
            "patterns[1].verbalizer.hockey",
        ),
    ],
)
def test_errors_say_where_the_document_is_wrong(
    base: nn.Module, tmp_path: Path, change: dict[str, Any], code: str, line: str, path: str
) -> None:
    text = yaml.safe_dump({**QUICK, **change}, sort_keys=False, width=200)
    (tmp_path / "pet.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(GraftError) as error:
        pet(tmp_path / "pet.yaml", base, tokenizer(), data(), folder=tmp_path / "run")
    place = error.value.place
    assert error.value.code == code and place is not None and place.path.endswith(path)
    assert place.line is not None and line in text.splitlines()[place.line - 1]
    assert not (tmp_path / "run").exists()


def test_a_member_with_an_empty_set(base: nn.Module) -> None:
    task = _task(load_pet_spec(QUICK), base, tokenizer(), data(), None, 0)
    with pytest.raises(GraftError, match="member 2 has no labelled rows to learn from in generation 3") as error:
        trained_answers(task, 3, [set_of(task, None), Examples(())])
    assert error.value.code == "GC182"


@pytest.mark.full
def test_a_loss_that_is_not_finite(base: nn.Module) -> None:
    broken = model(initializer_range=0.1)
    with torch.no_grad():
        dict(broken.named_parameters())["cls.predictions.bias"].fill_(float("nan"))
    with pytest.raises(GraftError, match="loss of step 1 of 4 is nan") as error:
        pet(QUICK, broken, tokenizer(), data())
    assert error.value.code == "GC181"


def test_batches_for_answers_hold_every_row_once() -> None:
    rows = texts(130, 0)[0]
    batches = list(by_length(rows, 2))
    assert sorted(at for some in batches for at in some) == list(range(260)) and max(map(len, batches)) == 64


def test_all_patterns_are_options_of_one_model(base: nn.Module) -> None:
    encoder = encoder_of(load_pet_spec(SPEC), tokenizer(), base)
    assert encoder.options()["labels"] == ["space", "hockey"] and encoder.max_length == 24


@pytest.mark.slow
def test_members_share_captures(base: nn.Module) -> None:
    """The second member reuses the first one's captures, which take longest in a small run."""
    task = _task(load_pet_spec({**QUICK, "spec": LORA}), base, tokenizer(), data(), None, 0)
    compiled = [graftc.compile(_Group(task, 0, [member])._spec(), base) for member in task.members]
    assert compiled[1].compilation.main.captures[0].cached


@pytest.mark.full
def test_labels_are_known_by_their_names(base: nn.Module) -> None:
    """Rows read with labels in another order are the same rows."""
    given = data()

    def turned(rows: TextRows | None) -> TextRows | None:
        if rows is None or rows.labels is None:
            return rows
        return replace(rows, labels=tuple(1 - label for label in rows.labels), names=("hockey", "space"))

    other = PetData(turned(given.train), given.unlabelled, turned(given.test))
    first, second = (pet(QUICK, base, tokenizer(), each) for each in (given, other))
    assert torch.equal(first.soft_labels, second.soft_labels)
    assert first.final == second.final
    strange = replace(given.train, names=("space", "chess"))  # type: ignore[type-var]
    with pytest.raises(GraftError, match="'chess', which the document does not"):
        pet(QUICK, base, tokenizer(), PetData(strange, given.unlabelled))


@pytest.mark.slow
def test_a_document_that_does_not_compile_leaves_nothing(base: nn.Module, tmp_path: Path) -> None:
    nowhere = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "nope"}}]}
    for part, spec in (("spec", {"spec": nowhere}), ("classifier.spec", {"classifier": {"spec": nowhere}})):
        with pytest.raises(GraftError, match="GC011") as caught:
            pet({**QUICK, **spec}, base, tokenizer(), data(), folder=tmp_path / "run")
        assert caught.value.place is not None
        assert str(caught.value.place.path).startswith(part)
        assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_stages_that_were_changed_are_refused(base: nn.Module, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pet(QUICK, base, tokenizer(), data(), folder=run)
    for name in ("untrained.safetensors", "ensemble.safetensors"):
        whole = (run / name).read_bytes()
        for wrong in (whole[:-4] + b"\x00\x00\x80\x3f", whole[:40], b"", b"\x80\x04."):
            (run / name).write_bytes(wrong)
            with pytest.raises(GraftError, match=r"is damaged|cannot be read"):
                pet(QUICK, base, tokenizer(), data(), folder=run)
        (run / name).write_bytes(whole)
    (run / "recipe.json").unlink()
    with pytest.raises(GraftError, match="contains files but no recipe"):
        pet(QUICK, base, tokenizer(), data(), folder=run)


def test_arguments_of_another_kind(base: nn.Module) -> None:
    for own, words in (("nope", tokenizer()), (base, None), (nn.Linear(1, 1, device="meta"), tokenizer())):
        with pytest.raises(GraftError, match="GC073"):
            pet(QUICK, own, words, data())  # type: ignore[arg-type]


@pytest.mark.full
def test_random_numbers_go_on_where_they_were(base: nn.Module) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    pet(QUICK, base, tokenizer(), data())
    assert torch.equal(torch.rand(3), wanted)
