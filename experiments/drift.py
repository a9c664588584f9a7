"""Compute a cell in an environment with other versions of transformers and PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.environments import call


def figures(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of another part's cell, in an environment.

    Args:
        cell: ``settings``: the other ``cell`` as data, its ``part``, and the versions of the ``environment``.
    """
    settings = cell["settings"]
    own: dict[str, Any] = call(f"experiments.drift:{settings['part']}", settings["cell"], settings["environment"])
    return own


def parity(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a cell that compares with PEFT."""
    from experiments.parity import figures as compared

    return compared(cell)


def encoder(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a cell that trains an encoder."""
    from experiments.classifying import figures as trained

    return trained(cell)
