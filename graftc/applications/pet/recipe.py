"""Run PET from rows to a classifier, in stages from which a killed run can resume."""

from __future__ import annotations

import hashlib
import json
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from graftc.applications.pet.asking import encoder_of
from graftc.applications.pet.classifier import Classifier
from graftc.applications.pet.data import PetData, TextRows, load_pet_data
from graftc.applications.pet.ensemble import accuracy, member_weights, mixed_logits
from graftc.applications.pet.members import Answers, trained_answers, try_members, untrained_answers
from graftc.applications.pet.result import PetResult
from graftc.applications.pet.sets import Line, new_sets, set_of
from graftc.applications.pet.stages import KeptStages
from graftc.applications.pet.task import Examples, Task
from graftc.compiler.capture.identity.fingerprint import identify
from graftc.compiler.quantised_sources.convert import arrived
from graftc.files.writing import alone_in
from graftc.passes.core import progress
from graftc.records.applications.pet import Accuracy, PetGeneration, PetMember, PetRows
from graftc.runtime.swapped_arguments import check_spec_and_model
from graftc.specs.errors.arguments import as_path, as_seed, kind_of
from graftc.specs.errors.calls import public
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import quoted
from graftc.specs.pet.document import PetSpec
from graftc.specs.pet.io import load_pet_spec

_JUDGED = ("labelled", "test")
_PROBE = "A text of 1,234 Words, some of them un-usual: Übergröße, naïve, 東京!"
"""A text whose tokens identify a tokenizer."""


@public("graftc.pet")
def pet(
    spec: PetSpec | Mapping[str, Any] | str | Path,
    model: nn.Module,
    tokenizer: Any,
    data: PetData | str | Path,
    *,
    folder: str | Path | None = None,
    seed: int = 0,
) -> PetResult:
    """Train a classifier from few labelled rows by pattern-exploiting training (Schick & Schütze 2021).

    Members, one or more for each pattern, learn the task as cloze questions. Their mean answer labels the unlabelled
    rows, from which a classifier then learns. With ``ipet``, there are several generations of members: each starts from
    the language model and learns from more rows, labelled by other members of the previous generation. Without labelled
    rows, the first labels come from untrained patterns.

    With a folder, every stage is stored there before the next one begins. If a run is killed at any moment, the same
    call resumes it and ends with the same tensors. Members of earlier generations are deleted once they have answered.

    Args:
        spec: a `PetSpec`, a mapping, or the path of a file.
        model: a masked, causal or encoder-decoder transformers language model; it is never changed.
        tokenizer: the model's tokenizer.
        data: the labelled rows, if there are any, the unlabelled rows, and a test set that is not used for training; or
            a folder that `load_pet_data` reads.
        folder: the folder in which to store the stages and the classifier, as an artifact; it is created if it does not
            exist.
        seed: the seed for all random numbers.

    Raises:
        GraftError: GC058 if the folder contains another recipe, GC063 if another run is using it, GC073 for arguments
            of the wrong type, GC082 if a stored stage was changed, GC179 for an auxiliary loss that the model lacks,
            GC180 for labels that the document lacks, GC181 if a loss is not finite, GC182 if there is nothing to learn
            from; otherwise as for `graftc.compile`.
    """
    check_spec_and_model("graftc.pet", spec, model, "spec, model, tokenizer, data")
    loaded, seed = load_pet_spec(spec), as_seed(seed)
    rows = data if isinstance(data, PetData) else load_pet_data(as_path(data), loaded.labels, loaded.slots)
    _require_kinds(model, tokenizer)
    place = None if folder is None else as_path(folder)
    # Training draws from torch's global random number generator, which all threads share.
    with _RUNNING, as_before(model), progress.working("PET of", type(model).__name__):
        model = arrived(model)
        try:
            task = _task(loaded, model, tokenizer, rows, place, seed)
            final = Classifier(task, tokenizer)
        except GraftError as error:
            raise loaded.locate(error) from error
        if not task.stages.begun:
            _try_out(task, final)
        task.stages.begin()
        with alone_in(task.stages.folder):
            return _run(task, final)


_RUNNING = threading.Lock()


@contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Run the block, and afterwards restore the state of the random number generators."""
    devices = list({tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"})
    python, numbers = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(numbers)


def _require_kinds(model: Any, tokenizer: Any) -> None:
    """Check that the arguments are a model whose tensors have values, and a tokenizer.

    Raises:
        GraftError: GC073 if they are not.
    """
    if not isinstance(model, nn.Module):
        raise GraftError("GC073", f"the model is {kind_of(model)}", hint="pass a transformers language model")
    if any(tensor.is_meta for tensor in model.parameters()):
        raise GraftError("GC073", "the model is on the meta device and has no values", hint="load its weights")
    if not callable(tokenizer) or not hasattr(tokenizer, "model_max_length"):
        hint = "use AutoTokenizer.from_pretrained(...)"
        raise GraftError("GC073", f"the tokenizer is {kind_of(tokenizer)}", hint=hint)


def _task(spec: PetSpec, model: nn.Module, tokenizer: Any, data: PetData, folder: Path | None, seed: int) -> Task:
    if not data.unlabelled:
        raise GraftError("GC182", "there are no unlabelled rows", hint="the classifier learns from them")
    encoder = encoder_of(spec, tokenizer, model)
    labels = spec.labels
    rows = {
        "labelled": _rows(data.train, labels),
        "unlabelled": _rows(data.unlabelled, labels),
        "test": _rows(data.test, labels),
    }
    for each in rows.values():
        encoder.check(each.texts)
    if spec.training.auxiliary:  # if the model has no such loss, fail before training starts
        encoder.token_batch(rows["unlabelled"].texts[:1], 0, torch.Generator())
    probe = dict.fromkeys(spec.slots, _PROBE)
    sample = [encoder.encode([probe], pattern)["input_ids"].tolist() for pattern in range(len(spec.patterns))]
    identity = {
        "spec": spec.model_dump(mode="json"),
        "labels": list(spec.labels),
        "data": _digest([[list(map(dict, each.texts)), list(each.labels)] for each in rows.values()]),
        "seed": seed,
        "base": identify(model, full=True).fingerprint,
        "tokenizer": _digest([encoder.options(), sample]),
    }
    return Task(spec, model, encoder, **rows, seed=seed, stages=KeptStages(folder, identity))


def _try_out(task: Task, final: Classifier) -> None:
    """Compile the members and the classifier, before anything is written or trained.

    Raises:
        GraftError: as for `graftc.compile`, with a place in the document.
    """
    for part, run in (("spec", partial(try_members, task)), ("classifier.spec", final.tried)):
        try:
            run()
        except GraftError as error:
            raise task.spec.locate(error.within(part)) from error


def _rows(given: TextRows | None, labels: Sequence[str]) -> Examples:
    """Return the rows, with their labels as indices into the document's labels.

    Raises:
        GraftError: GC180 for labels that the document does not have.
    """
    if given is None:
        return Examples((), ())
    if given.labels is None:
        return Examples(given.rows, ())
    names = given.names or labels
    other = next((name for name in names if name not in labels), None)
    if other is not None or any(not 0 <= number < len(names) for number in given.labels):
        what = "an index for which there is no label" if other is None else f"the label {quoted(other)}"
        message = f"the rows have {what}, which the document does not define"
        raise GraftError("GC180", message, hint=f"the document's labels are {', '.join(labels)}")
    order = [list(labels).index(name) for name in names]
    return Examples(given.rows, [order[number] for number in given.labels])


def _run(task: Task, final: Classifier) -> PetResult:
    patterns = torch.tensor([member.pattern for member in task.members])
    untrained = {name: logits[patterns] for name, logits in untrained_answers(task).items()}
    before = _judged(task, untrained)
    known = [each["labelled"] for each in before]
    weighs = task.spec.ensemble == "accuracy" and len(task.labelled)
    weights = member_weights([part or 0.0 for part in known] if weighs else None, len(task.members))
    answers = trained_answers(task, 0, [set_of(task, None)] * len(task.members)) if len(task.labelled) else untrained
    generations = []
    options = task.spec.ipet
    if options is not None:
        for generation in range(1, options.generations + 1):
            lines = new_sets(task, generation, answers["unlabelled"], weights, options)
            answers = trained_answers(task, generation, [set_of(task, line) for line in lines])
            _forget(task, generation - 1)
            generations.append(_generation(lines, task.spec.labels))
    mixed = task.stages.tensors("ensemble", lambda: {n: mixed_logits(logits, weights) for n, logits in answers.items()})
    classifier = final.trained(mixed["unlabelled"])
    asked = {name: rows for name, rows in task.asked.items() if name in _JUDGED}
    predictions = task.stages.tensors(
        "answers", lambda: {name: final.answers(classifier, rows.texts) for name, rows in asked.items()}
    )
    after = _judged(task, answers)
    members = [
        PetMember(
            pattern=str(task.spec.patterns[member.pattern].name),
            repetition=member.repetition,
            weight=float(weights[member.number]),
            untrained=before[member.number],
            trained=after[member.number],
        )
        for member in task.members
    ]
    result = PetResult(
        classifier=classifier,
        labels=task.spec.labels,
        soft_labels=torch.softmax(mixed["unlabelled"], dim=1),
        rows=PetRows(len(task.labelled), len(task.unlabelled), len(task.test)),
        members=members,
        generations=generations,
        ensemble=_accuracies(task, mixed),
        final=_accuracies(task, predictions),
    )
    task.stages.plain("results", result.to_json())
    return result


def _forget(task: Task, generation: int) -> None:
    """Delete the members of a generation; their answers stay."""
    for stage in ("bank", *(f"member-{member.number}" for member in task.members)):
        task.stages.forget(f"generation-{generation}/{stage}")


def _judged(task: Task, answers: Answers) -> list[Accuracy]:
    """Return each member's accuracies."""
    return [
        _accuracies(task, {name: logits[member.number] for name, logits in answers.items()}) for member in task.members
    ]


def _accuracies(task: Task, logits: Mapping[str, Tensor]) -> Accuracy:
    rows = task.asked
    return Accuracy(*(accuracy(logits[name], rows[name].answers) if name in rows else None for name in _JUDGED))


def _generation(lines: Sequence[Line], labels: Sequence[str]) -> PetGeneration:
    missing = [sum(line["missing"][label] for line in lines) / len(lines) for label in range(len(labels))]
    return PetGeneration(tuple(len(line["rows"]) for line in lines), dict(zip(labels, missing, strict=True)))


def _digest(data: Any) -> str:
    return hashlib.sha256(
        json.dumps(data, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass")
    ).hexdigest()
