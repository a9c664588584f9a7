"""Train the members of an ensemble, separately or in a bank, and compute their answers for all rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftc.applications.pet.asking import AT_ONCE, Asking
from graftc.applications.pet.task import EnsembleMember, Examples, Task
from graftc.applications.pet.training import Batch, Questions, draws, train_members
from graftc.applications.recipes.tune import Stage, tune
from graftc.compiler.inspect.trained import trained_tensors
from graftc.passes.core import progress
from graftc.runtime.api import compile
from graftc.runtime.compiled import Compiled
from graftc.runtime.model.runner import runner_of
from graftc.specs.changes import replacing
from graftc.specs.compose import Bank
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError

Answers = dict[str, Tensor]
"""Logits ``[members, rows, labels]`` for the labelled, unlabelled and test rows; missing sets are omitted."""


def untrained_answers(task: Task) -> Answers:
    """Return the untrained language model's answers for each pattern: ``[patterns, rows, labels]``."""

    def make() -> Answers:
        progress.step("asking untrained patterns")
        patterns = range(len(task.spec.patterns))
        cloze = task.encoder.options(patterns)
        spec = Spec.model_validate({"adapt": [], "base": task.spec.spec.base, "cloze": cloze})
        compiled = compile(spec, task.model, seed=task.seed).eval()
        asking = Asking(task.encoder, patterns, patterns, (), compiled.device)
        return {name: asking.answers(compiled, rows.texts) for name, rows in task.asked.items()}

    return task.stages.tensors("untrained", make)


def try_members(task: Task) -> None:
    """Compile the members without training them.

    Raises:
        GraftError: as for `graftc.compile`.
    """
    progress.step("trying out the document")
    members = task.members if task.spec.members == "bank" else task.members[:1]
    _Group(task, 0, members).tried()


def trained_answers(task: Task, generation: int, sets: Sequence[Examples]) -> Answers:
    """Train the members of a generation, each starting from the language model, and return their answers.

    Args:
        task: the run.
        generation: the number of the generation, counted from 0.
        sets: the examples that each member learns from.

    Raises:
        GraftError: GC182 for a member that has no examples to learn from; otherwise as for `graftc.compile` and
            training.
    """
    for member, rows in zip(task.members, sets, strict=True):
        if not len(rows):
            message = f"member {member.number + 1} has no labelled rows to learn from in generation {generation}"
            raise GraftError("GC182", message)
    if task.spec.members == "bank":
        return _Group(task, generation, task.members).answers(sets)
    parts = [
        _Group(task, generation, [member]).answers([rows]) for member, rows in zip(task.members, sets, strict=True)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True)
class _Group:
    """Members that train as one model: either a single member, or all members as slots of banks."""

    task: Task
    generation: int
    members: Sequence[EnsembleMember]

    @property
    def name(self) -> str:
        """The name of the stage."""
        stage = "bank" if self._banked else f"member-{self.members[0].number}"
        return f"generation-{self.generation}/{stage}"

    @property
    def _banked(self) -> bool:
        return self.task.spec.members == "bank"

    def tried(self) -> None:
        """Compile the group's model without training it."""
        example = self.task.encoder.encode(self.task.unlabelled.texts[:2], self.members[0].pattern)
        compile(self._spec(), self.task.model, example, seed=self.task.seed)

    def answers(self, sets: Sequence[Examples]) -> Answers:
        """Return the members' answers for all rows; the members are trained first unless the stage is already done."""
        return self.task.stages.tensors(self.name, lambda: self._make(sets))

    def _make(self, sets: Sequence[Examples]) -> Answers:
        task, seed = self.task, self.task.seed_of("member", self.generation, *(m.number for m in self.members))
        spec, asking = self._spec(), self._asking()
        trained = tune(
            spec,
            task.model,
            lambda compiled, stage: self._train(compiled, stage, asking, sets),
            examples=[self._example(asking, sets[0])],
            example_inputs=task.encoder.encode(sets[0].texts[:2], self.members[0].pattern),
            folder=task.stages.place(self.name),
            seed=seed,
        )
        progress.step(f"{self._said}: asking for all rows")
        return {name: asking.answers(trained, rows.texts) for name, rows in task.asked.items()}

    @property
    def _said(self) -> str:
        subject = "all members" if self._banked else f"member {self.members[0].number + 1} of {len(self.task.members)}"
        return f"generation {self.generation}, {subject}" if self.task.spec.ipet is not None else subject

    def _known(self) -> Sequence[int]:
        return range(len(self.task.spec.patterns)) if self._banked else [self.members[0].pattern]

    def _spec(self) -> Spec:
        spec, cloze = self.task.spec.spec, self.task.encoder.options(self._known())
        grouped = banked(spec, len(self.members)) if self._banked else spec
        return replacing(grouped, cloze=cloze)

    def _asking(self) -> Asking:
        task = self.task
        banks = (
            [bank.ids for bank in banked(task.spec.spec, 1).compose if isinstance(bank, Bank)] if self._banked else []
        )
        device = next(task.model.parameters()).device
        return Asking(task.encoder, [member.pattern for member in self.members], self._known(), banks, device)

    @staticmethod
    def _example(asking: Asking, rows: Examples) -> dict[str, Tensor]:
        """Return a labelled batch for methods that use examples before training."""
        some = range(min(len(rows), AT_ONCE))
        inputs = asking.questions([rows.texts[at] for at in some], [0] * len(some))
        return {**inputs, "labels": rows.answers[: len(some)].to(asking.device)}

    def _train(self, compiled: Compiled, stage: Stage, asking: Asking, sets: Sequence[Examples]) -> None:
        options = self.task.spec.training
        which = f", training {stage.number} of {stage.total}" if stage.total > 1 else ""
        train_members(
            compiled,
            self._questions(asking, sets),
            self._texts(asking),
            options,
            auxiliary=options.auxiliary,
            own=self._own(compiled) if self._banked else None,
            on_step=telling(f"{self._said}{which}"),
        )

    def _draws(self, what: str, counts: Sequence[int], size: int) -> list[Iterator[list[int]]]:
        """Return, for every member, an iterator over the row indices of its batches.

        The draws depend only on their purpose, the seed, the generation and the member.
        """
        return [
            draws(count, size, self.task.generator(what, self.generation, member.number))
            for member, count in zip(self.members, counts, strict=True)
        ]

    def _questions(self, asking: Asking, sets: Sequence[Examples]) -> Iterator[Questions]:
        size = self.task.spec.training.batch_size
        drawn = self._draws("rows", [len(rows) for rows in sets], size)
        answers = [rows.answers for rows in sets]
        while True:
            picked = [next(each) for each in drawn]
            texts = [sets[member].texts[row] for member, some in enumerate(picked) for row in some]
            members = [member for member, some in enumerate(picked) for _ in some]
            labels = torch.cat([answers[member][some] for member, some in enumerate(picked)])
            yield Questions(asking.questions(texts, members), labels.to(asking.device))

    def _texts(self, asking: Asking) -> Iterator[list[Batch]]:
        options, texts = self.task.spec.training, self.task.unlabelled.texts
        size = options.batch_size * options.unlabelled_ratio
        drawn = self._draws("texts", [len(texts)] * len(self.members), size)
        masks = [self.task.generator("masks", self.generation, member.number) for member in self.members]
        while True:
            yield [
                asking.texts([texts[row] for row in next(each)], member, masks[member])
                for member, each in enumerate(drawn)
            ]

    def _own(self, compiled: Compiled) -> list[list[nn.Parameter]]:
        """Return each slot's trainable parameters."""
        names = [{slot_name(str(a.name), slot) for a in self.task.spec.spec.adapt} for slot in range(len(self.members))]
        every = list(trained_tensors(runner_of(compiled).compilation))
        return [[item.tensor for item in every if item.adaptation in own] for own in names]  # type: ignore[misc]


def slot_name(name: str, slot: int) -> str:
    """Return the name that an adaptation has in a slot."""
    return f"{name}_{slot + 1}"


def banked(spec: Spec, slots: int) -> Spec:
    """Return the spec with each adaptation replaced by a bank with the given number of slots.

    Raises:
        GraftError: GC177 if the spec also trains tensors that all slots would share.
    """
    if spec.train or spec.tokens is not None:
        what = "train" if spec.train else "tokens"
        hint = f"leave out {what}, or set members: separate"
        raise GraftError("GC177", f"{what} would train for all members at once", hint=hint)
    adapt = [
        adaptation.model_copy(update={"name": slot_name(str(adaptation.name), slot)})
        for adaptation in spec.adapt
        for slot in range(slots)
    ]
    compose = [
        Bank(
            name=f"members_{number + 1}",
            bank=tuple(slot_name(str(adaptation.name), slot) for slot in range(slots)),
            inputs=f"members_{number + 1}",
        )
        for number, adaptation in enumerate(spec.adapt)
    ]
    return replacing(spec, adapt=adapt, compose=compose)


def telling(what: str) -> Callable[[int, int], None]:
    """Return a callback that shows a training run's progress."""

    def tell(step: int, steps: int) -> None:
        progress.step(f"{what}: step {step} of {steps}")

    return tell
