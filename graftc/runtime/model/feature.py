"""The base class of the features that a compiled model offers besides calls."""

from __future__ import annotations

from graftc.runtime.model.adapted import AdaptedRunner


class Feature:
    """A feature of a compiled model. A new instance is created for each request, and keeps no state of its own.

    Args:
        runner: the Runner of the model.
    """

    def __init__(self, runner: AdaptedRunner) -> None:
        self.runner = runner
