"""Names of the tensors that graftc adds, ``<module>.graftc.<adaptation>.<part>``: built and parsed only here."""

from __future__ import annotations

from typing import NamedTuple

RESERVED = "graftc"
"""The child of a module that holds what graftc adds there. A source model has no such name."""


class AdapterName(NamedTuple):
    """The components of an added tensor's name.

    Attributes:
        module: path of the module that the tensor is added to; empty for a tensor that an adaptation has once, and for
            the root.
        adaptation: name of the adaptation that the tensor belongs to.
        part: its name within the adaptation, preceded by the site's scope and parameter if there are several.
    """

    module: str
    adaptation: str
    part: str

    def __str__(self) -> str:
        return ".".join(segment for segment in (self.module, RESERVED, self.adaptation, self.part) if segment)


def adapter_name(module: str, adaptation: str, *parts: str) -> str:
    """Return the name of a tensor of an adaptation at a module; empty parts are left out."""
    return str(AdapterName(module, adaptation, ".".join(part for part in parts if part)))


def parsed(fqn: str) -> AdapterName | None:
    """Return the components of an added tensor's name; None for a base tensor's name."""
    segments = fqn.split(".")
    if RESERVED not in segments:
        return None
    at = segments.index(RESERVED)
    return AdapterName(".".join(segments[:at]), segments[at + 1], ".".join(segments[at + 2 :]))


def owner_of(fqn: str) -> str:
    """Return the adaptation that a tensor belongs to; empty for a base tensor."""
    name = parsed(fqn)
    return name.adaptation if name is not None else ""


def module_of(fqn: str) -> str:
    """Return the path of the module that a tensor belongs to, or at which it was added."""
    name = parsed(fqn)
    return name.module if name is not None else fqn.rpartition(".")[0]


def renamed(fqn: str, adaptation: str) -> str:
    """Return the name that an added tensor has in another adaptation; a base tensor's name is unchanged."""
    name = parsed(fqn)
    return str(name._replace(adaptation=adaptation)) if name is not None else fqn
