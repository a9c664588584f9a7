"""Names of the tensors that graftc adds, ``<module>.graftc.<adaptation>.<part>``: made and read here alone."""

from __future__ import annotations

from typing import NamedTuple

RESERVED = "graftc"
"""The child of a module that holds what graftc adds there. A source model has no such name."""


class AdapterName(NamedTuple):
    """What the name of an added tensor says.

    Attributes:
        module: path of the module that it is at; empty for what an adaptation has once, and for the root.
        adaptation: whose it is.
        part: its name within the adaptation, with the site's scope and parameter in front where there are several.
    """

    module: str
    adaptation: str
    part: str

    def __str__(self) -> str:
        return ".".join(segment for segment in (self.module, RESERVED, self.adaptation, self.part) if segment)


def adapter_name(module: str, adaptation: str, *parts: str) -> str:
    """The name of a tensor of an adaptation at a module; empty parts are left out."""
    return str(AdapterName(module, adaptation, ".".join(part for part in parts if part)))


def parsed(fqn: str) -> AdapterName | None:
    """What the name of a tensor says; None for a base tensor's."""
    segments = fqn.split(".")
    if RESERVED not in segments:
        return None
    at = segments.index(RESERVED)
    return AdapterName(".".join(segments[:at]), segments[at + 1], ".".join(segments[at + 2 :]))


def owner_of(fqn: str) -> str:
    """The adaptation that a tensor belongs to; empty for one of the base."""
    name = parsed(fqn)
    return name.adaptation if name is not None else ""


def module_of(fqn: str) -> str:
    """Path of the module that a tensor belongs to, or at which it was added."""
    name = parsed(fqn)
    return name.module if name is not None else fqn.rpartition(".")[0]


def renamed(fqn: str, adaptation: str) -> str:
    """The name that an added tensor has in another adaptation; a base tensor's stays."""
    name = parsed(fqn)
    return str(name._replace(adaptation=adaptation)) if name is not None else fqn
