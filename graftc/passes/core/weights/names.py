"""Build and parse the names of tensors that graftc adds: ``<module>.graftc.<adaptation>.<part>``."""

from __future__ import annotations

from typing import NamedTuple

RESERVED = "graftc"
"""The name of the child in which a module keeps graftc's additions. Source models may not use this name."""


class AdapterName(NamedTuple):
    """The components of an added tensor's name.

    Attributes:
        module: path of the module to which the tensor is added; empty for the root, and for a tensor that all sites of
            the adaptation share.
        adaptation: name of the adaptation to which the tensor belongs.
        part: the tensor's name within the adaptation, preceded by the site's scope and parameter if a module has
            several.
    """

    module: str
    adaptation: str
    part: str

    def __str__(self) -> str:
        return ".".join(segment for segment in (self.module, RESERVED, self.adaptation, self.part) if segment)


def adapter_name(module: str, adaptation: str, *parts: str) -> str:
    """Return the name of an adaptation's tensor within a module; empty parts are left out."""
    return str(AdapterName(module, adaptation, ".".join(part for part in parts if part)))


def parsed(fqn: str) -> AdapterName | None:
    """Return the components of an added tensor's name; None for a base tensor's name."""
    segments = fqn.split(".")
    if RESERVED not in segments:
        return None
    at = segments.index(RESERVED)
    return AdapterName(".".join(segments[:at]), segments[at + 1], ".".join(segments[at + 2 :]))


def owner_of(fqn: str) -> str:
    """Return the adaptation to which a tensor belongs; empty for a base tensor."""
    name = parsed(fqn)
    return name.adaptation if name is not None else ""


def module_of(fqn: str) -> str:
    """Return the path of the module to which a tensor belongs or was added."""
    name = parsed(fqn)
    return name.module if name is not None else fqn.rpartition(".")[0]


def renamed(fqn: str, adaptation: str) -> str:
    """Return the name of an added tensor under another adaptation; a base tensor's name is returned unchanged."""
    name = parsed(fqn)
    return str(name._replace(adaptation=adaptation)) if name is not None else fqn
