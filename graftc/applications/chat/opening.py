"""Load a model that generates text, with its tokenizer, from an artifact, a transformers folder or a PEFT adapter."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from graftc.compat.caches import cache_name
from graftc.compiler.capture.interface import Interface
from graftc.compiler.missing_weights import require_weights
from graftc.files.tensors.foreign_folders import require_regular_files
from graftc.runtime.api import import_peft, load
from graftc.runtime.artifact.manifest import MANIFEST
from graftc.runtime.artifact.places import is_peft
from graftc.runtime.compiled import Compiled
from graftc.runtime.loading.checkpoint import is_checkpoint
from graftc.runtime.model.choices import slot_names
from graftc.runtime.model.runner import runner_of
from graftc.runtime.onnx_generation import load as load_graphs
from graftc.runtime.onnx_generation.io_names import DECODER, PAIR
from graftc.runtime.sources.models import load_folder, load_model_and_inputs, local_folder, quiet_transformers
from graftc.specs.compose import Bank
from graftc.specs.errors.border import library_errors
from graftc.specs.errors.diagnostics import GraftError, first_line, nearest_beside

Kind = Literal["artifact", "model", "onnx", "peft"]
"""The kinds of folder: an artifact, a whole model, graphs for ONNX Runtime, or a PEFT adapter."""

_TOKENIZER = ("tokenizer*.json", "vocab.*", "*.model", "merges.txt", "*.tiktoken")


@dataclass(frozen=True)
class TextModel:
    """A model that generates text, with its tokenizer.

    Attributes:
        kind: what the folder contains.
        model: the model to call: a compiled model or a transformers model.
        source: the transformers model: either the model itself, or the one from which it was compiled.
        tokenizer: the transformers tokenizer.
        compiled: the compiled model; None for a whole model.
    """

    kind: Kind
    model: Any
    source: Any
    tokenizer: Any
    compiled: Compiled | None = None

    @property
    def generate(self) -> Callable[..., Any]:
        """The model's ``generate``, as in transformers."""
        method: Callable[..., Any] = self.model.generate
        return method

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        device: torch.device = self.model.device
        return device

    @property
    def text_config(self) -> Any:
        """The config of the model's text-generating part."""
        return self.source.config.get_text_config()

    @property
    def has_encoder(self) -> bool:
        """Whether the model consists of an encoder and a decoder."""
        return bool(getattr(self.source.config, "is_encoder_decoder", False))

    @property
    def positions(self) -> int | None:
        """The maximum number of tokens in a text; None if the model sets no limit."""
        limit = None if self.has_encoder else getattr(self.text_config, "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    @property
    def cache_name(self) -> str | None:
        """The name of the argument that takes a cache; None if the model takes none."""
        forward = getattr(type(self.source), "forward", None)
        return None if forward is None else cache_name(inspect.signature(forward).parameters)

    def choose(self, adapter: str) -> None:
        """Use the named adaptation of a bank in all further calls.

        Raises:
            GraftError: GC091 if the model has no bank; GC038 for a name that no bank contains.
        """
        banks = [c for c in self.compiled.spec.compose if isinstance(c, Bank)] if self.compiled is not None else []
        if not banks or self.compiled is None:
            raise GraftError("GC091", f"there is no adaptation {adapter!r} to choose: the model has no bank")
        holding = [bank for bank in banks if adapter in slot_names(self.compiled.compilation, bank)]
        for bank in holding or banks[:1]:
            self.compiled.activate(adapter, bank.name)

    def base_only(self) -> AbstractContextManager[None]:
        """Return a context manager that disables all adaptations, so that the model acts as its base.

        Raises:
            GraftError: GC090 if the model has no adaptations.
        """
        if self.compiled is None:
            raise GraftError("GC090", "a whole model has no base beside it", hint="leave out --base")
        return self.compiled.disabled()


def open_text_model(
    folder: Path,
    model: str | None = None,
    tokenizer: str | None = None,
    *,
    device: str | None = None,
) -> TextModel:
    """Load the model in a folder, in eval mode, with its tokenizer.

    Args:
        folder: an artifact, a transformers model, graphs for ONNX Runtime, or a PEFT adapter.
        model: the base of the artifact or adapter, in any form that the command line accepts; by default the base that
            the artifact names.
        tokenizer: a folder or hub id with a tokenizer; by default the tokenizer in the folder or in the base's folder.
        device: the device to move the model to; by default it stays on the device on which it was loaded.

    Raises:
        GraftError: GC032 for a folder that contains no model, GC089 if it lacks some of the model's tensors, GC142 for
            a model that does not generate text, GC146 if no tokenizer is found; otherwise as for `graftc.load`.
    """
    kind, text_model, compiled = _loaded(folder, model)
    source = text_model if compiled is None else compiled.compilation.source
    _require_generating(source, compiled)
    text_tokenizer = tokenizer_of(tokenizer, [folder, local_folder(source)])
    if device is not None:
        text_model = moved(text_model, device)
    return TextModel(kind, text_model.eval(), source, text_tokenizer, compiled)


def _loaded(folder: Path, model: str | None) -> tuple[Kind, Any, Compiled | None]:
    if not folder.is_dir():
        near = nearest_beside(folder, Path.is_dir)
        hint = f"did you mean {str(near)!r}?" if near is not None else None
        raise GraftError("GC032", f"there is no folder {str(folder)!r}", hint=hint)
    if (folder / MANIFEST).is_file() or is_checkpoint(folder):
        compiled = load(folder, model)
        return "artifact", compiled, compiled
    if is_peft(folder) and model is not None:
        base, inputs = load_model_and_inputs(model)
        compiled = import_peft(folder, base, inputs)
        return "peft", compiled, compiled
    if model is not None:
        message = f"{str(folder)!r} is not an adapter, so --model does not apply"
        raise GraftError("GC090", message, hint="leave out --model")
    if not any(folder.glob("*.safetensors")) and any((folder / name).is_file() for name in (DECODER, PAIR[1])):
        return "onnx", load_graphs(folder), None
    loaded = load_folder(folder)
    require_weights(loaded)
    return "model", loaded, None


def _require_generating(source: Any, compiled: Compiled | None) -> None:
    if compiled is not None:
        can = runner_of(compiled).can_generate()
    else:
        can = source.can_generate() and (not isinstance(source, nn.Module) or Interface(source).cache is not None)
    if not can:
        name = type(source).__name__
        raise GraftError("GC142", f"{name} does not generate", hint="use a model with a language model head")


def moved(model: Any, device: str) -> Any:
    """Move a model to a device and return it.

    Raises:
        GraftError: GC090 for an unknown device, or for the meta device.
    """
    try:
        where = torch.device(device)
        if where.type == "meta":
            raise GraftError("GC090", f"the device {device!r} computes nothing", hint="use another device, such as cpu")
        return model.to(where)
    except (RuntimeError, AssertionError) as error:
        raise GraftError("GC090", f"there is no device {device!r}: {first_line(error)}") from error


def tokenizer_of(named: str | None, places: Sequence[Path | None]) -> Any:
    """Load the tokenizer that the user named, or else the one in the first folder that has one.

    Raises:
        GraftError: GC146 if no tokenizer is found, or if it cannot be read.
    """
    if named is not None:
        return _read(named)
    place = next((p for p in places if p is not None and _has_tokenizer(p)), None)
    if place is None:
        shown = " or ".join(repr(str(p)) for p in dict.fromkeys(places) if p is not None)
        raise GraftError("GC146", f"there is no tokenizer in {shown}", hint="name a folder or hub id: --tokenizer NAME")
    return _read(str(place))


def _has_tokenizer(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in _TOKENIZER)


def _read(place: str) -> Any:
    from transformers import AutoTokenizer

    if (folder := Path(place).expanduser()).is_dir():
        place = str(folder)
        if not _has_tokenizer(folder):  # transformers would create an empty one
            raise GraftError("GC146", f"there is no tokenizer in {place!r}", hint="use a folder with a tokenizer.json")
        require_regular_files(folder, "GC146")
    hint = "name a folder or hub id: --tokenizer NAME"
    with quiet_transformers(), library_errors("GC146", f"the tokenizer of {place!r} cannot be read", hint=hint):
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)


@contextmanager
def adapted(model: TextModel, *, adapter: str | None, base: bool) -> Iterator[None]:
    """Run the block with the named adaptation of a bank, or with the base alone.

    Raises:
        GraftError: as for `TextModel.choose` and `TextModel.base_only`.
    """
    if adapter is not None:
        model.choose(adapter)
    with model.base_only() if base else nullcontext():
        yield
