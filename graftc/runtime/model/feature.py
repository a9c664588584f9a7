"""The base class of what a compiled model offers beside calls."""

from __future__ import annotations

from graftc.runtime.model.adapted import AdaptedRunner


class Feature:
    """Something that a compiled model offers. It is created whenever it is requested, and keeps nothing of its own.

    Args:
        runner: the Runner of the model.
    """

    def __init__(self, runner: AdaptedRunner) -> None:
        self.runner = runner
