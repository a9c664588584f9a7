"""The final classifier, trained on the ensemble's answers: a model with a head, or one that fills blanks."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftc.applications.pet.asking import Asking, by_length, encoder_of
from graftc.applications.pet.members import telling
from graftc.applications.pet.plain import PlainEncoder, pad_id, positions_of
from graftc.applications.pet.task import Fields, Task
from graftc.applications.pet.training import Batch, draws, logits_of, train_classifier
from graftc.applications.recipes.tune import Stage, tune
from graftc.compat.hooks import forward_hooks
from graftc.compiler.missing_weights import mark_fresh
from graftc.files.tensors.writing import writing
from graftc.passes.core import progress
from graftc.runtime.api import compile
from graftc.runtime.artifact.write import save
from graftc.runtime.compiled import Compiled
from graftc.runtime.loading.load import load
from graftc.runtime.sources.models import quiet_transformers
from graftc.specs.changes import replacing
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError

CLASSIFIER = "classifier"
"""The name of the artifact's folder."""

_DISTILLING = "distilling"


def sequence_classifier(model: Any, labels: Sequence[str], padding: int, seed: int) -> Any:
    """Build a transformers sequence classifier around a language model's own encoder, in eval mode.

    Args:
        model: a transformers language model; the classifier shares its tensors.
        labels: the names of the classes, in the order of the logits.
        padding: the padding token, used if the model's config has none.
        seed: the seed for the parts that the language model lacks: the head, and in some classifiers a pooler.

    Raises:
        GraftError: GC182 if transformers has no sequence classifier for the model, or the model's layers differ from
            the classifier's.
    """
    from transformers import AutoModelForSequenceClassification

    auto: Any = AutoModelForSequenceClassification
    config = copy.deepcopy(model.config)
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    if getattr(config, "pad_token_id", None) is None:  # decoders use it to find the last token
        config.pad_token_id = padding
    config.problem_type = "single_label_classification"
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        classifier = auto.from_config(config)
    except ValueError as error:
        message = f"transformers has no sequence classifier for {type(model).__name__}"
        raise GraftError("GC182", message, hint="classifier: {kind: cloze}") from error
    finally:
        torch.random.set_rng_state(state)
    classifier.config.name_or_path = ""  # it is not stored anywhere yet
    prefix = classifier.base_model_prefix
    # Encoder-decoders have no submodule with that name; their own tensors have the same names as in the submodule.
    source, part = getattr(model, prefix, model), getattr(classifier, prefix, None)
    own = part.state_dict() if part is not None else {}
    known = source.state_dict()
    shared = {name: known[name] for name in own if name in known and known[name].shape == own[name].shape}
    if part is None or not shared:
        message = f"{type(classifier).__name__} has no tensors in common with {type(model).__name__}"
        raise GraftError("GC182", message, hint="classifier: {kind: cloze}")
    _require_alike(source, part, own.keys() - shared.keys(), model)
    first = next(model.parameters())
    classifier = classifier.to(device=first.device, dtype=first.dtype).eval()
    part.load_state_dict(_apart(shared), strict=False, assign=True)
    classifier.tie_weights()
    taken = {f"{prefix}.{name}" for name in shared}
    mark_fresh(
        classifier, (name for name, _ in classifier.named_parameters() if name not in taken), type(model).__name__
    )
    return classifier


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with separate storages, so that only tensors that the class itself ties share one."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return separate


def _require_alike(source: nn.Module, part: nn.Module, lost: Collection[str], model: nn.Module) -> None:
    """Check that a model's encoder is as its class builds it.

    Anything added to the encoder would silently be missing from the classifier.

    Args:
        source: the language model's encoder.
        part: the classifier's encoder.
        lost: the names of tensors in the classifier's encoder for which the model has no tensor of the same shape.
        model: the language model, named in errors.

    Raises:
        GraftError: GC182 if the encoder differs.
    """
    mine, places = dict(source.named_modules(remove_duplicate=False)), {name.rpartition(".")[0] for name in lost}
    for path, module in part.named_modules(remove_duplicate=False):
        counterpart = mine.get(path)
        if counterpart is None or counterpart is model:
            continue
        if type(counterpart) is not type(module):
            what = f"is a {_class_of(counterpart)}, but in a new classifier it is a {_class_of(module)}"
        elif "forward" in vars(counterpart) or forward_hooks(counterpart):
            what = "has its own forward or hooks, which a new classifier would not have"
        elif path in places:
            what = "is not stored in the same form as in a new classifier"
        else:
            continue
        message = f"{path or 'the encoder'} of {type(model).__name__} {what}"
        raise GraftError("GC182", message, hint="use classifier: {kind: cloze}, or an unmodified model")


def _class_of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


class Classifier:
    """The final classifier of a PET run.

    Args:
        task: the run.
        tokenizer: the language model's tokenizer.
    """

    def __init__(self, task: Task, tokenizer: Any) -> None:
        self._task, self._options, self._tokenizer = task, task.spec.classifier, tokenizer
        self._fills = self._options.kind == "cloze"
        self._base = task.model
        if not self._fills:
            self._base = sequence_classifier(task.model, task.spec.labels, pad_id(tokenizer), task.seed_of("head"))
        self._device = next(self._base.parameters()).device
        length, positions = self._options.training.max_length, positions_of(task.model)
        self._cloze = encoder_of(task.spec, tokenizer, task.model, length, blank=task.encoder.kind)
        self._plain = PlainEncoder(task.spec.slots, tokenizer, length, positions)

    def tried(self) -> None:
        """Compile the classifier without training it.

        Raises:
            GraftError: as for `graftc.compile`.
        """
        compile(self._spec(), self._base, self._inputs(self._task.unlabelled.texts[:2]), seed=self._task.seed)

    def trained(self, soft: Tensor) -> Compiled:
        """Return the classifier, in eval mode: trained on soft labels, or loaded if it is already stored.

        Args:
            soft: the ensemble's logits on the unlabelled rows, ``[rows, labels]``.
        """
        stages = self._task.stages
        place, folder = stages.place(CLASSIFIER), stages.place(_DISTILLING)
        if place is None or not place.exists():
            classifier = tune(
                self._spec(),
                self._base,
                lambda compiled, stage: self._train(compiled, stage, soft),
                examples=[self._example(soft)],
                example_inputs=self._inputs(self._task.unlabelled.texts[:2]),
                folder=folder,
                seed=self._task.seed_of(CLASSIFIER),
            )
            if place is None:
                return classifier
            self._save(classifier, place)
        stages.forget(_DISTILLING)
        return load(place, self._base).eval()

    def answers(self, compiled: Compiled, texts: Sequence[Fields]) -> Tensor:
        """Return the classifier's logits, float32 ``[rows, labels]`` on the CPU."""
        progress.step("asking the classifier")
        batches = ((some, self._inputs([texts[row] for row in some])) for some in by_length(texts))
        return logits_of(compiled, batches, len(texts))

    def _save(self, compiled: Compiled, place: Path) -> None:
        if self._fills:
            compiled.save(place, certify=False)
        else:  # the base is stored nowhere else
            save(compiled, place, bundle=self._save_base)

    def _save_base(self, folder: Path) -> None:
        base: Any = self._base
        with quiet_transformers(), writing(folder):
            for each in (base, self._tokenizer):  # a merge copies the tokenizer stored beside the base
                each.save_pretrained(folder)

    def _spec(self) -> Spec:
        spec = self._options.spec
        return replacing(spec, cloze=self._cloze.options([0])) if self._fills else spec

    def _inputs(self, texts: Sequence[Fields]) -> Batch:
        if self._fills:
            return Asking(self._cloze, [0], [0], (), self._device).questions(texts, [0] * len(texts))
        return {name: tensor.to(self._device) for name, tensor in self._plain.encode(texts).items()}

    def _example(self, soft: Tensor) -> dict[str, Tensor]:
        texts = self._task.unlabelled.texts[: self._options.training.batch_size]
        return {**self._inputs(texts), "labels": soft[: len(texts)].argmax(1).to(self._device)}

    def _train(self, compiled: Compiled, stage: Stage, soft: Tensor) -> None:
        which = f", training {stage.number} of {stage.total}" if stage.total > 1 else ""
        train_classifier(
            compiled,
            self._batches(soft),
            self._options.training,
            temperature=self._options.temperature,
            on_step=telling(f"classifier{which}"),
        )

    def _batches(self, soft: Tensor) -> Iterator[tuple[Batch, Tensor]]:
        texts = self._task.unlabelled.texts
        size = self._options.training.batch_size
        for some in draws(len(texts), size, self._task.generator("distilling")):
            yield self._inputs([texts[row] for row in some]), soft[some].to(self._device)
