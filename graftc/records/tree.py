"""The module tree of a model with what was added to it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from graftc.records.fields import MethodTag, Trainable
from graftc.specs.errors.markup import Html, bullets, folded, joined, tag
from graftc.specs.records.record import Record, stated


@dataclass(frozen=True)
class TreeTensor(Record):
    """A tensor of a module, or one that an adaptation has there."""

    name: str
    """Within its module, or within the adaptation."""

    dtype: str
    """Its element type, such as `f32`."""

    shape: tuple[int, ...]
    """Its sizes."""

    trainable: Trainable

    parameter: bool
    """Whether it is a parameter; a buffer otherwise."""

    tied: str | None = None
    """The name that owns it; null where this one does."""

    rows: str = ""
    """The rows of the base tensor that it stands in for; empty for all of them."""

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        if self.tied is not None:
            return f"{self.name} = {self.tied}"
        mark = "*" if self.trainable else ""
        notes = [f"rows {self.rows}"] if self.rows else []
        notes += [] if self.parameter else ["buffer"]
        return f"{self.name}{mark} {self.dtype}[{', '.join(map(str, self.shape))}]" + (
            f" ({', '.join(notes)})" if notes else ""
        )


@dataclass(frozen=True)
class Addition(Record):
    """The tensors of one adaptation in a module."""

    adaptation: str
    """Its name."""

    method: MethodTag

    tensors: tuple[TreeTensor, ...]
    """Its tensors there; none where several places share them."""

    def __str__(self) -> str:
        whose = self.adaptation if self.adaptation == self.method else f"{self.adaptation} ({self.method})"
        tensors = ", ".join(map(str, self.tensors)) or "no tensors of its own here"
        return f"+ {whose}: {tensors}"


@dataclass(frozen=True)
class TreeNode(Record, published="TreeData", behind={"paths": ("alike",)}):
    """A module, or several layers that are alike."""

    name: str
    """Its name below its parent; of the root, the class of the model."""

    paths: tuple[str, ...]
    """Its path, or those of the layers."""

    roles: tuple[str, ...]
    """Roles of what is adapted in the module itself."""

    base_parameters: Annotated[int, Ge(0)]
    """Elements of base parameters in it and below, in one of the layers."""

    trainable_parameters: Annotated[int, Ge(0)]
    """Elements that were added there and train, in one of the layers."""

    tensors: tuple[TreeTensor, ...]
    """The module's own tensors of the base."""

    added: tuple[Addition, ...]
    """The tensors of adaptations in the module itself."""

    children: tuple[TreeNode, ...]
    """Modules below it."""

    @stated
    def alike(self) -> Annotated[int, Ge(1)]:
        """How many layers it stands for."""
        return len(self.paths)

    def lines(self) -> list[str]:
        """Return the tree as aligned lines: module, base and trained parameters, roles and tensors."""
        rows = list(self.rows(0))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = []
        for name, base, trained, details in rows:
            numbers = f"{base.rjust(widths[1])}  {trained.rjust(widths[2])}"
            lines.append(f"{name.ljust(widths[0])}  {numbers}  {details}".rstrip())
        return lines

    def text(self) -> str:
        """Return the `lines` as one text, with a legend if anything trains."""
        legend = ["", "* trains"] if self.trainable_parameters else []
        return "\n".join([*self.lines(), *legend]) + "\n"

    def __str__(self) -> str:
        return self.text()

    def rows(self, depth: int) -> Iterator[tuple[str, str, str, str]]:
        """Yield the lines of a table, each as its columns; ``depth`` is that of the node."""
        if depth == 0:
            yield "module", "base", "trained", "roles and tensors"
        times = f"{self.alike} x " if self.alike > 1 else ""
        base, trained = (f"{times}{n:,}" if n else "" for n in (self.base_parameters, self.trainable_parameters))
        roles = f"[{', '.join(self.roles)}] " if self.roles else ""
        yield "  " * depth + self.name, base, trained, roles + ", ".join(map(str, self.tensors))
        for addition in self.added:
            yield "", "", "", str(addition)
        for child in self.children:
            yield from child.rows(depth + 1)

    def _repr_html_(self) -> str:
        """Return HTML for notebooks: the tree, with the contents of every module collapsed."""
        times = f"{self.alike} x " if self.alike > 1 else ""
        base, trained = f"{times}{self.base_parameters:,}", f"{times}{self.trainable_parameters:,}"
        counts = [f"{base} base"] if self.base_parameters else []
        counts += [tag("b", f"{trained} trained")] if self.trainable_parameters else []
        roles = [f"[{', '.join(self.roles)}]"] if self.roles else []
        line = joined([tag("code", self.name), *roles, joined(counts, ", ")], " ")
        contents = bullets([*map(str, self.tensors), *map(str, self.added)])
        return folded(line, Html(contents + "".join(child._repr_html_() for child in self.children)))
