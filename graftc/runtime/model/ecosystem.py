"""What transformers, accelerate and peft ask a model for, and what of it a compiled model has another way to do."""

from __future__ import annotations

import copy
import inspect
import os
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import nn

from graftc.compiler.compilation import Compilation
from graftc.passes.core.weights.containers import deepspeed
from graftc.passes.core.weights.store import Store
from graftc.runtime.above import above
from graftc.runtime.model.blocks import Runner
from graftc.runtime.model.head import head_at
from graftc.specs.errors.diagnostics import GraftError

COPIED = ("accepts_loss_kwargs", "base_model_prefix", "loss_type", "model_tags", "name_or_path")
"""Attributes of a source model that a compiled one has as well, as copies."""

_SAVE = "compiled.save(path) writes what was trained, compiled.merge().save(path) a plain transformers folder"

ELSEWHERE = {
    "push_to_hub": _SAVE,
    "from_pretrained": "graftc.load(path) reads what compiled.save wrote",
    "merge_and_unload": "compiled.merge() folds into the weights and certifies the result",
    "unload": "compiled.disabled() computes what the base computes; the source model is as it was",
    "disable_adapter": "with compiled.disabled(): computes what the base computes, disabled(name) leaves one out",
    "get_base_model": "the source model that was compiled is as it was",
    "add_adapter": "compiled.add({...}) adds an adaptation, as an entry of a spec's adapt list",
    "delete_adapter": "compiled.remove(name) removes an adaptation",
    "disable_adapters": "compiled.disable(name) leaves an adaptation out until compiled.enable(name)",
    "enable_adapters": "compiled.enable(name) undoes compiled.disable(name)",
    "set_adapter": "compiled.activate(name) chooses from a bank, compiled.train_only(name) what trains",
    "resize_token_embeddings": "tokens: {add: ...} in the spec gives the table new rows that train",
    "set_input_embeddings": "change the source model before it is compiled",
    "set_output_embeddings": "change the source model before it is compiled",
    "set_attn_implementation": "change the source model before it is compiled",
    "add_weighted_adapter": "compiled.combine(...) joins trained adaptations",
}
"""Names that the models of other libraries have, with what does the same here."""


class NotHereError(GraftError, AttributeError):
    """A coded error for an attribute that there is not, so that ``hasattr`` says so."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.name = ""  # Python would fill in its own, by which a Root tells attributes that nobody has


def refuse_pickling(module: nn.Module) -> NoReturn:
    """Say how a model is kept, where it was to be pickled.

    Raises:
        GraftError: GC074.
    """
    name = type(module).__name__
    message = f"{name} cannot be pickled: its graphs are code, which no file should hold"
    hint = "model.save(path) keeps all of it; torch.save(model.state_dict(), path) what trains; copy.deepcopy copies it"
    raise GraftError("GC074", message, hint=hint)


def refuse_deepspeed() -> None:
    """Say that a model does not train with DeepSpeed, where Accelerate, and so the Trainer, was told to use it.

    Raises:
        GraftError: GC072.
    """
    state = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
    if state is not None and state._shared_state.get("deepspeed_plugins"):
        raise deepspeed()


class Ecosystem(Runner):
    """The part of `Compiled` that other libraries look at."""

    _compilation: Compilation
    accepts_loss_kwargs: bool
    _base_only: bool

    def __init__(self, compilation: Compilation, store: Store) -> None:
        """Take over what a source model says of itself. Names of its children stay theirs."""
        super().__init__(compilation, store)  # type: ignore[arg-type, call-arg]
        model = compilation.model
        found = {name: getattr(model, name) for name in COPIED if hasattr(model, name) and name not in model._modules}
        if not isinstance(found.get("accepts_loss_kwargs"), bool):  # as the Trainer tells it
            rest = inspect.signature(model.forward).parameters.values()
            found["accepts_loss_kwargs"] = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in rest)
        vars(self).update((name, copy.deepcopy(value)) for name, value in found.items())

    def __getattr__(self, name: str) -> Any:
        """Says what does the same where other libraries' models have an attribute of this name."""
        if name in ELSEWHERE:
            kind = type(self._compilation.model).__name__
            raise NotHereError("GC072", f"a compiled {kind} has no {name}", hint=ELSEWHERE[name])
        return super().__getattr__(name)  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write this model into a folder of another library's, as sentence-transformers asks for in its checkpoints:
        ``config.json`` and, in the folder ``graftc``, the artifact, without the base's weights and without a
        certificate. After ``import graftc.auto``, transformers' ``Auto`` classes load it.

        Args:
            save_directory: made where it is missing; other files in it stay.
            options: those of transformers that have a meaning here: ``is_main_process=False`` writes nothing.

        Raises:
            GraftError: GC032 for a model without a config of transformers, GC064 where it cannot be written, GC072 for
                options that ask for another form, as ``state_dict`` or ``push_to_hub``.
        """
        above("save_pretrained")(self, save_directory, options)

    def get_input_embeddings(self) -> nn.Module | None:
        """Where the table of token embeddings is; it holds tensors and computes nothing. None where there is none."""
        return self._at("get_input_embeddings")

    def get_output_embeddings(self) -> nn.Module | None:
        """Where the weights of the head over the vocabulary are, as the model uses them: a `Head` where it is trained;
        None where there is none. An adapted head is refused when its weight is read."""
        path = self._path("get_output_embeddings")
        if path is None:
            return None
        return (
            self.module.get_submodule(path)
            if self._base_only
            else head_at(self._store, path, self._compilation.tensor_edits)
        )

    def get_decoder(self) -> nn.Module | None:
        """Where the tensors of the decoder, or of the model below its head, are; it computes nothing by itself. None
        where the source model has none."""
        return self._at("get_decoder")

    def tie_weights(self, *args: Any, **options: Any) -> None:
        """Nothing to do: tensors that the source model ties are one here."""

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of all parameters, those of the base and of adapters, tied ones once.

        Args:
            return_buffers: count buffers too.
        """
        counted = [*self.module.parameters(), *(self.module.buffers() if return_buffers else ())]
        return sum(tensor.numel() * tensor.element_size() for tensor in counted)

    def _at(self, getter: str) -> nn.Module | None:
        path = self._path(getter)
        return None if path is None else self.module.get_submodule(path)

    def _path(self, getter: str) -> str | None:
        model = self._compilation.model
        try:
            found = getattr(model, getter)()
        except (AttributeError, NotImplementedError):
            return None
        return next((path for path, module in model.named_modules() if module is found), None)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many elements all parameters have together, those of the base included and tied ones once.

        Args:
            only_trainable: count what trains.
            exclude_embeddings: leave out tables of embeddings.
        """
        tables = set()
        if exclude_embeddings:
            modules = self._compilation.model.named_modules()
            tables = {f"{path}.weight".lstrip(".") for path, module in modules if isinstance(module, nn.Embedding)}
        counted = ((name, p) for name, p in self.module.named_parameters() if p.requires_grad or not only_trainable)
        return sum(p.numel() for name, p in counted if name not in tables)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many elements train, and how many there are."""
        return self.num_parameters(only_trainable=True), self.num_parameters()

    def print_trainable_parameters(self) -> None:
        """Print `get_nb_trainable_parameters`, as peft does."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def add_model_tags(self, tags: str | Iterable[str]) -> None:
        """Add tags to ``model_tags``, for the card of a model, each once."""
        new = [tags] if isinstance(tags, str) else list(tags)
        self.model_tags = list(dict.fromkeys([*(getattr(self, "model_tags", None) or []), *new]))

    def enable_input_require_grads(self) -> None:
        """Nothing to do: layers that are recomputed need no gradient of their inputs."""

    def disable_input_require_grads(self) -> None:
        """See `enable_input_require_grads`."""

    def floating_point_ops(self, inputs: dict[str, Any], exclude_embeddings: bool = True) -> int:
        """An estimate for a forward and a backward pass: six per token and parameter, as transformers has it."""
        tokens = inputs.get(getattr(self, "main_input_name", "input_ids"))
        if not isinstance(tokens, torch.Tensor):
            return 0
        return 6 * tokens.numel() * self.num_parameters(exclude_embeddings=exclude_embeddings)
