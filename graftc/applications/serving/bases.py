"""An adapter's base as checks need it: its config, and its modules with their sizes, without weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from graftc.files.tensors.folder import TensorFolder
from graftc.files.tensors.weights import weight_files
from graftc.runtime.sources.folder_checks import plain_config
from graftc.runtime.sources.models import load_folder

ModuleKind = Literal["linear", "embedding", "head", "experts"]
_EXPERT = re.compile(r"(?P<owner>.*\bexperts)\.(?:(?P<index>\d+)\.)?(?P<map>gate_proj|up_proj|down_proj|w1|w2|w3)")
_FUSED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "w1": "gate_up_proj", "w3": "gate_up_proj"}


@dataclass(frozen=True)
class BaseModule:
    """A module of a base that a LoRA can adapt.

    Attributes:
        kind: what it is.
        tensor: the name of its weight.
        inputs, outputs: its sizes; for an embedding, the vocabulary and the width.
    """

    kind: ModuleKind
    tensor: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class ServedBase:
    """A base, as transformers builds it from its config.

    Attributes:
        folder: its folder.
        config: the contents of its ``config.json``.
        model: the model on the meta device.
    """

    folder: Path
    config: Mapping[str, Any]
    model: nn.Module

    @classmethod
    def of(cls, folder: Path) -> ServedBase:
        """Build a base from a folder with a ``config.json``.

        Raises:
            GraftError: GC032 for a folder or a config that cannot be read.
        """
        model = load_folder(folder, meta=True)
        return cls(folder, plain_config(folder, str(folder)), model)

    @property
    def architecture(self) -> str:
        """The name of its class in its config; empty if there is none."""
        return str(next(iter(self.config.get("architectures") or ()), ""))

    @property
    def vocabulary(self) -> int | None:
        """The number of tokens in its config; None if the config has none."""
        config: Any = self.model.config
        size = getattr(config.get_text_config(), "vocab_size", None)
        return size if isinstance(size, int) else None

    @cached_property
    def head(self) -> str | None:
        """The path of the module that computes logits; None if there is none."""
        return self._path_of("get_output_embeddings")

    @cached_property
    def tied(self) -> bool:
        """Whether the head and the embedding share their weight."""
        config: Any = self.model.config
        return self.head is not None and bool(config.get_text_config().tie_word_embeddings)

    @cached_property
    def stored(self) -> Mapping[str, Tensor]:
        """The tensors of its files by name, with the head's if it is tied; empty if the folder has only a config."""
        if weight_files(self.folder) is None:
            return {}
        tensors = TensorFolder(self.folder, strict=False)
        tied = f"{self.head}.weight" if self.tied else None
        embedding = f"{self._path_of('get_input_embeddings')}.weight"
        return {name: tensors[name] for name in tensors} | ({tied: tensors[embedding]} if tied is not None else {})

    @cached_property
    def modules(self) -> Mapping[str, BaseModule]:
        """Every module with a matrix, by path; experts as they are stored, fused or each on its own."""
        found: dict[str, BaseModule] = {}
        for path, module in self.model.named_modules():
            if isinstance(module, nn.Embedding):
                found[path] = BaseModule("embedding", f"{path}.weight", module.num_embeddings, module.embedding_dim)
            elif isinstance(module, nn.Linear):
                kind: ModuleKind = "head" if path == self.head else "experts" if ".experts." in path else "linear"
                found[path] = BaseModule(kind, f"{path}.weight", module.in_features, module.out_features)
            elif type(module).__name__ == "Conv1D":
                found[path] = BaseModule("linear", f"{path}.weight", *map(int, module.weight.shape))
        return found

    def module(self, path: str) -> BaseModule | None:
        """Return the module that an adapter names; None if the base has none of that name."""
        return self.modules.get(path) or self._expert(path)

    def _expert(self, path: str) -> BaseModule | None:
        """Return one projection of an expert, or of all experts, in a module that fuses them."""
        match = _EXPERT.fullmatch(path)
        owner = self._modules.get(match["owner"]) if match is not None else None
        fused = _FUSED.get(match["map"], "down_proj") if match is not None else ""
        weight: Any = getattr(owner, fused, None)
        if match is None or weight is None or weight.dim() != 3 or int(match["index"] or 0) >= len(weight):
            return None
        rows, columns = weight.shape[1:]
        rows = rows // 2 if fused == "gate_up_proj" else rows
        return BaseModule("experts", f"{match['owner']}.{fused}", columns, rows)

    @cached_property
    def _modules(self) -> Mapping[str, nn.Module]:
        return dict(self.model.named_modules())

    def _path_of(self, getter: str) -> str | None:
        module = getattr(self.model, getter, lambda: None)()
        return next((path for path, own in self.model.named_modules() if own is module), None)
