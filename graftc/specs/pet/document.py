"""The PET spec: the document that describes how an ensemble of patterns becomes a classifier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from graftc.specs.base_model import Document, Items
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError, nearest
from graftc.specs.errors.text import quoted, some
from graftc.specs.pet.pattern import Pattern, PatternSpec
from graftc.specs.pet.training import ClassifierSpec, IpetOptions, TrainingOptions, everything
from graftc.specs.pet.verbalizer import Verbalizer
from graftc.specs.spec_errors import Problem, reject

PATTERNS = 100
"""Maximum number of patterns in a document."""

SEEDS = 100
"""Maximum number of members for a pattern."""


class PetSpec(Document):
    """Pattern-exploiting training: classification as filling blanks, by an ensemble of patterns that labels rows for a
    final classifier (Schick & Schütze 2021, Exploiting Cloze Questions for Few Shot Text Classification and Natural
    Language Inference, EACL).

    Raises:
        GraftError: GC002 to GC012, GC175, GC176 and GC177 with the path of the invalid value.
    """

    patterns: Items[Pattern] = Field(min_length=1, max_length=PATTERNS)
    """The patterns; each trains `seeds` members of the ensemble."""

    verbalizer: Verbalizer | None = None
    """A word, or a list of words, for each label; the labels are those of the data. May be left out where each pattern
    has its own."""

    spec: Spec = Field(default_factory=everything)
    """A document of graftc that says what trains in every member. Default: everything, by `adapt: [{method: full}]`."""

    training: TrainingOptions = TrainingOptions()
    """How a member trains."""

    seeds: int = Field(default=3, ge=1, le=SEEDS)
    """Members of each pattern, which differ by their random seed."""

    ensemble: Literal["accuracy", "uniform"] = "accuracy"
    """How the members' logits are averaged. `accuracy`: weighted by the accuracy of the untrained pattern on the
    training set. `uniform`: all alike."""

    members: Literal["separate", "bank"] = "separate"
    """`separate`: each member is a model of its own. `bank`: the members are adaptations in the slots of one bank over
    one shared base."""

    ipet: IpetOptions | None = None
    """Train generations of members (iPET). Default: one generation (PET)."""

    classifier: ClassifierSpec = ClassifierSpec()
    """The final model."""

    @field_validator("patterns")
    @classmethod
    def _names_are_unique(cls, patterns: tuple[PatternSpec, ...]) -> tuple[PatternSpec, ...]:
        taken = {p.name for p in patterns if p.name is not None}
        named = tuple(
            p if p.name is not None else p.model_copy(update={"name": _free(number, taken)})
            for number, p in enumerate(patterns, start=1)
        )
        reject(_repetitions(named))
        return named

    @model_validator(mode="after")
    def _verbalizers_fit(self) -> Self:
        reject([*self._verbalizer_problems(), *self._member_problems()])
        return self

    def _verbalizer_problems(self) -> Iterator[Problem]:
        common = self.verbalizer
        own = [(index, p.verbalizer) for index, p in enumerate(self.patterns) if p.verbalizer is not None]
        if common is None and len(own) < len(self.patterns):
            without = next(index for index, p in enumerate(self.patterns) if p.verbalizer is None)
            message = f"there is no verbalizer for {quoted(str(self.patterns[without].name))}"
            hint = "add one to the document: verbalizer: {label: word, ...}"
            yield ("patterns", without), GraftError("GC176", message, hint=hint)
        first = common if common is not None else own[0][1] if own else None
        for index, verbalizer in own:
            if first is not None and set(verbalizer) != set(first):
                where = "the document's" if common is not None else f"that of patterns[{own[0][0]}]"
                yield ("patterns", index, "verbalizer"), _other_labels(verbalizer.labels, first.labels, where)

    def _member_problems(self) -> Iterator[Problem]:
        for path, spec in ((("spec",), self.spec), (("classifier", "spec"), self.classifier.spec)):
            if spec.cloze is not None:
                hint = "remove it: patterns and verbalizer define it"
                yield (*path, "cloze"), GraftError("GC002", "a member's cloze follows from its pattern", hint=hint)
        if self.ipet is not None and len(self.patterns) * self.seeds < 2:
            message = "a member of iPET learns from other members, but there is only one"
            yield ("ipet",), GraftError("GC002", message, hint="add a pattern, or raise seeds")
        if self.members == "bank":
            yield from self._bank_problems()

    def _bank_problems(self) -> Iterator[Problem]:
        """Yield the reasons why members cannot be slots of one bank."""
        spec = self.spec
        example = "for example spec: {adapt: [{method: lora, target: {role: [attn.q, attn.v]}}]}"
        if "spec" not in self.model_fields_set:
            message = "members of a bank share their base, but the default spec trains all of it"
            yield ("members",), GraftError("GC177", message, hint=example)
            return
        if not spec.adapt:
            message = "members of a bank are adaptations, but the spec has none"
            yield ("spec", "adapt"), GraftError("GC177", message, hint=example)
        if spec.compose:
            hint = "remove compose, or use members: separate"
            message = "members of a bank are composed as one, but the spec has its own compose"
            yield ("spec", "compose"), GraftError("GC177", message, hint=hint)
        for index, adaptation in enumerate(spec.adapt):
            if not type(adaptation).claims.bankable:
                message = f"{adaptation.method} cannot be part of a bank"
                yield ("spec", "adapt", index, "method"), GraftError("GC177", message, hint=example)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of logits: that of the document's verbalizer, or of the first pattern's."""
        return self.verbalizer_of(0).labels if self.verbalizer is None else self.verbalizer.labels

    @property
    def slots(self) -> tuple[str, ...]:
        """Every field that any pattern shows."""
        return tuple(dict.fromkeys(slot for pattern in self.patterns for slot in pattern.slots))

    @property
    def verbalizers(self) -> tuple[Verbalizer, ...]:
        """The verbalizer of each pattern, all with the labels in the same order."""
        return tuple(self.verbalizer_of(index) for index in range(len(self.patterns)))

    def verbalizer_of(self, index: int) -> Verbalizer:
        """Return the verbalizer of a pattern by its index, counted from 0, with the labels in the order of logits."""
        first = self.verbalizer if self.verbalizer is not None else self.patterns[0].verbalizer
        own = self.patterns[index].verbalizer
        if first is None or own is None:
            assert first is not None  # validation ensures that one of them is given
            return first
        return own.ordered(first.labels)


def _repetitions(patterns: Sequence[PatternSpec]) -> Iterator[Problem]:
    names: dict[str, int] = {}
    texts: dict[tuple[str, Verbalizer | None], int] = {}
    for index, pattern in enumerate(patterns):
        # Some file systems use one folder for two names that differ only by case.
        first = names.setdefault(str(pattern.name).lower(), index)
        same = texts.setdefault((pattern.text, pattern.verbalizer), index)
        if first != index:
            message = f"the name {quoted(str(pattern.name))} is taken by patterns[{first}]"
            yield (index, "name"), GraftError("GC005", message, hint="names are unique")
        if same != index:
            message = f"the pattern is the same as patterns[{same}]"
            yield (index,), GraftError("GC175", message, hint="raise `seeds` for more members of one pattern")


def _free(number: int, taken: set[str]) -> str:
    """Return ``pattern-3`` for the third one, or the next free name, and mark it as taken."""
    name = next(name for name in map("pattern-{}".format, count(number)) if name not in taken)
    taken.add(name)
    return name


def _other_labels(own: Sequence[str], wanted: Sequence[str], where: str) -> GraftError:
    """Return the error for a verbalizer whose labels differ from those of another."""
    missing = [label for label in wanted if label not in own]
    more = [label for label in own if label not in wanted]
    said = [f"lacks {some([quoted(m) for m in missing], 5)}"] if missing else []
    said += [f"has {some([quoted(m) for m in more], 5)}"] if more else []
    close = nearest(more[0], missing, n=1) if more else []
    hint = f"did you mean '{close[0]}'?" if close else f"the labels are: {some(list(wanted), 20)}"
    return GraftError("GC176", f"the verbalizer {' and '.join(said)}, unlike {where}", hint=hint)
