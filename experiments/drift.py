"""Compute a cell in an environment with other versions of transformers and PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments import classifying, parity
from experiments.environments import call

MODULES = {"parity": parity, "encoder": classifying}
"""The modules that compute the cells of other parts, imported so that the digests of these cells cover them."""


def figures(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of another part's cell, in an environment.

    Args:
        cell: ``settings``: the other ``cell`` as data, its ``part``, and the versions of the ``environment``.
    """
    settings = cell["settings"]
    function = f"{MODULES[settings['part']].__name__}:figures"
    outcome: dict[str, Any] = call(function, settings["cell"], settings["environment"])
    return outcome
