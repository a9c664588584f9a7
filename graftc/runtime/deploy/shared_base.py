"""Several adapted models over one new base: what all of them train in full is folded into it, the rest is LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from graftc.files.writing import staged
from graftc.passes.core.weights.store import Store
from graftc.runtime.deploy.convert import Converted, Converting, output_differences
from graftc.runtime.deploy.merged import Merged
from graftc.runtime.deploy.merged_folder import write_merged
from graftc.runtime.deploy.merging import Merging
from graftc.runtime.deploy.partial import lacking
from graftc.runtime.interop.peft.exporting import PeftExport, is_exported, prepared, write_peft
from graftc.runtime.interop.peft.plain import plain
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.runner import ModelRoot, runner_of
from graftc.specs.errors.calls import public
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import quoted, some

BASE = "base"
"""The name of the base's folder."""

NAME_BYTES = 255
"""The maximum length of the name of a folder, in bytes of UTF-8."""


@dataclass(frozen=True)
class SharedBase:
    """A base with what several models share, and a LoRA for each of them.

    Attributes:
        base: the base: the merged part of every model.
        adapters: by name, the model with its LoRA on that base, and its differences from the original.
    """

    base: Merged[Any]
    adapters: Mapping[str, Converted]

    @property
    def ranks(self) -> Mapping[str, int]:
        """The largest rank of each adapter."""
        specs = {
            name: [spec for own in runner_of(made.compiled).compilation.main.resolved for _, spec in own.places]
            for name, made in self.adapters.items()
        }
        return {name: max((getattr(spec, "rank", 1) for spec in own), default=1) for name, own in specs.items()}

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write a folder with the model folder ``base`` and a PEFT folder for each adapter.

        Raises:
            GraftError: GC115 if PEFT cannot express what is left of a model, GC063 and GC064 for the destination.
        """
        to = Path(path)
        exports = {name: _export(converted, to / BASE) for name, converted in self.adapters.items()}
        with staged(to, force=force, replaceable=is_shared) as folder:
            folder.mkdir()
            write_merged(self.base, folder / BASE)
            for name, export in exports.items():
                write_peft(export, folder / name)
        return to


@public("graftc.share_base")
@torch.no_grad()
def share_base(models: Mapping[str, ModelRoot | AdaptedRunner], into_base: Sequence[str] = ("trained",)) -> SharedBase:
    """Fold what several models share into one base, and turn the rest of each into LoRA.

    The models need the same base, and what is folded must give the same tensors in all of them, bit for bit: a head
    that was trained once and reused, norms, added tokens.

    Args:
        models: at least two compiled models, by the names of their folders: printable text without slashes.
        into_base: what to fold in each model that has it: adaptations, ``trained`` for the ``train:`` list, or
            ``tokens``.

    Raises:
        GraftError: GC002 for a name that no folder can have, GC005 for that of the base's folder, GC050 for a model
            that has nothing to fold, GC066 if the models' tensors differ, which are named, or if the rest of one cannot
            be a LoRA; GC073 for fewer than two models; as in `Compiled.merge_partially`.
    """
    if len(models) < 2:
        raise GraftError("GC073", "sharing a base needs at least two models", hint="convert one with into_base")
    for name in models:
        _check_name(name)
    for name, model in models.items():
        _require_something(name, runner_of(model), into_base)
    first: tuple[str, Merged[Any]] | None = None
    adapters = {}
    for name, model in models.items():
        runner: AdaptedRunner = runner_of(model)
        partial = Merging(runner).merge_partially(only=into_base)
        if first is None:
            first = name, partial.merged
        else:
            _require_same(*first, name, partial.merged)
        rest: AdaptedRunner = runner_of(partial.compiled)
        others = [str(own.name) for own in rest.spec.adapt if own.method != "lora"]
        converted = Converting(rest).convert(others) if others else Converted(partial.compiled, (), {}, 0.0)
        outputs, largest = output_differences(runner, runner_of(converted.compiled))
        adapters[name] = replace(converted, outputs=outputs, largest_output=largest)
    assert first is not None
    return SharedBase(first[1], adapters)


def _check_name(name: object) -> None:
    """Check the name of a model's folder.

    Raises:
        GraftError: GC002 if it is not the name of a folder, but for example a path; GC005 if it is that of the base.
    """
    if (
        not isinstance(name, str)
        or not name.isprintable()
        or not name.strip()
        or len(name.encode(errors="replace")) > NAME_BYTES
        or Path(name).name != name
        or name == ".."
    ):
        what = quoted(name, 40) if isinstance(name, str) else repr(name)
        hint = f"use 1 to {NAME_BYTES} printable bytes without slashes"
        raise GraftError("GC002", f"{what} is not a name of a folder", hint=hint)
    if name.casefold() == BASE:  # some file systems do not tell them apart
        raise GraftError("GC005", f"{BASE!r} is the name of the base's folder", hint="give the model another name")


def _require_something(name: str, runner: AdaptedRunner, into_base: Sequence[str]) -> None:
    """Raise unless a model has something to fold.

    Raises:
        GraftError: GC050.
    """
    if (reason := lacking(runner.spec, into_base)) is not None:
        hint = "it needs the base as it is: leave it out, or name in into_base what it has"
        raise GraftError("GC050", f"{name!r} {reason}", hint=hint)


def _require_same(first: str, one: Merged[Any], name: str, other: Merged[Any]) -> None:
    """Raise unless two merged models have the same tensors.

    Raises:
        GraftError: GC066, which lists those that differ.
    """
    a, b = (
        {name: tensor for name, tensor in runner_of(merged).folded_state_dict().items() if not Store.is_adapter(name)}
        for merged in (one, other)
    )
    wrong = [own for own in dict.fromkeys((*a, *b)) if own not in a or own not in b or not torch.equal(a[own], b[own])]
    if wrong:
        folded = {*runner_of(one).changed, *runner_of(other).changed}
        trained = [own for own in wrong if own in folded]
        what = "train different values" if trained else "have different bases"
        message = f"{first!r} and {name!r} cannot share a base, because they {what}: {some(trained or wrong, 3)}"
        hint = "fold only what they share; a model that has more needs a base of its own (into_base)"
        raise GraftError("GC066", message, hint=hint, details=tuple((trained or wrong)[3:30]))


def _export(converted: Converted, base: Path) -> PeftExport:
    compilation = runner_of(converted.compiled).compilation
    export = plain(prepared(compilation), compilation)
    return replace(export, config={**export.config, "base_model_name_or_path": str(base)})


def is_shared(path: Path) -> bool:
    """Return whether a folder is empty, or holds a base and adapters that graftc wrote."""
    parts = list(path.iterdir()) if path.is_dir() else [path]
    return all(part.is_dir() and (part.name == BASE or is_exported(part)) for part in parts)
