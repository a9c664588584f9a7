"""The methods that transformers, accelerate and peft expect on a model."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from graftc.runtime.artifact.pretrained import save_pretrained
from graftc.runtime.hooks.embeddings import path_by_getter
from graftc.runtime.model.feature import Feature
from graftc.runtime.model.head import head_at


class Ecosystem(Feature):
    """Implements the methods that transformers, accelerate and peft expect on a model."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write this model into another library's folder, for callers such as sentence-transformers.

        The folder receives ``config.json`` and, in its subfolder ``graftc``, the artifact, without the base's weights
        and without a certificate. After ``import graftc.auto``, transformers' ``Auto`` classes load it.

        Args:
            save_directory: the folder, created if it is missing; other files in it stay.
            options: those of transformers' options that apply here; with ``is_main_process=False``, nothing is written.

        Raises:
            GraftError: GC032 for a model without a transformers config, GC064 if the folder cannot be written, GC072
                for options that request another form, such as ``state_dict`` or ``push_to_hub``.
        """
        save_pretrained(self.runner, save_directory, options)

    def get_input_embeddings(self) -> nn.Module | None:
        """Return the module that contains the token embedding table; None if there is none.

        The module contains tensors, but cannot be called.
        """
        return self._at("get_input_embeddings")

    def get_output_embeddings(self) -> nn.Module | None:
        """Return a module with the vocabulary head's weights, as the model uses them; None if there is no head.

        The module is a `Head` if the head is trained. If the head is adapted in another way, reading its weight raises
        an error.
        """
        path = path_by_getter(self.runner.compilation.model, "get_output_embeddings")
        if path is None:
            return None
        return (
            self.runner.module.get_submodule(path)
            if self.runner.base_only
            else head_at(self.runner.store, path, self.runner.compilation.tensor_edits)
        )

    def get_decoder(self) -> nn.Module | None:
        """Return the module that contains the tensors of the decoder, or of the model without its head.

        The module cannot be called. The result is None if the source model has no such module.
        """
        return self._at("get_decoder")

    def tie_weights(self, *args: Any, **options: Any) -> None:
        """Do nothing, since tensors that the source model ties are a single tensor here."""

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the size of all parameters (the base's and the adapters') in bytes, counting tied ones once.

        Args:
            return_buffers: whether to count buffers as well.
        """
        counted = [*self.runner.module.parameters(), *(self.runner.module.buffers() if return_buffers else ())]
        return sum(tensor.numel() * tensor.element_size() for tensor in counted)

    def _at(self, getter: str) -> nn.Module | None:
        path = path_by_getter(self.runner.compilation.model, getter)
        return None if path is None else self.runner.module.get_submodule(path)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of elements in all parameters, including the base's and counting tied ones once.

        Args:
            only_trainable: whether to count only trainable parameters.
            exclude_embeddings: whether to leave out embedding tables.
        """
        tables = set()
        if exclude_embeddings:
            modules = self.runner.compilation.model.named_modules()
            tables = {f"{path}.weight".lstrip(".") for path, module in modules if isinstance(module, nn.Embedding)}
        counted = (
            (name, p) for name, p in self.runner.module.named_parameters() if p.requires_grad or not only_trainable
        )
        return sum(p.numel() for name, p in counted if name not in tables)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the number of trainable elements and the total number of elements."""
        return self.num_parameters(only_trainable=True), self.num_parameters()

    def print_trainable_parameters(self) -> None:
        """Print the result of `get_nb_trainable_parameters` in peft's format."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def add_model_tags(self, tags: str | Iterable[str]) -> None:
        """Add tags to ``model_tags``, for the model card, without duplicates."""
        new = [tags] if isinstance(tags, str) else list(tags)
        known = getattr(self.runner, "model_tags", None) or []
        vars(self.runner)["model_tags"] = list(dict.fromkeys([*known, *new]))

    def enable_input_require_grads(self) -> None:
        """Do nothing, since recomputed layers do not need inputs that require gradients."""

    def disable_input_require_grads(self) -> None:
        """Do nothing; see `enable_input_require_grads`."""

    def floating_point_ops(self, inputs: dict[str, Any], exclude_embeddings: bool = True) -> int:
        """Estimate the FLOPs of a forward and a backward pass: six per token and parameter, as in transformers."""
        tokens = inputs.get(getattr(self.runner, "main_input_name", "input_ids"))
        if not isinstance(tokens, torch.Tensor):
            return 0
        return 6 * tokens.numel() * self.num_parameters(exclude_embeddings=exclude_embeddings)
