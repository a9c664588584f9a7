"""The passes of plugins, as a manifest records them. Does not import torch."""

from __future__ import annotations

from graftc.runtime.artifact.fields import Count, Record


class RecordedFigure(Record):
    """A figure that a pass of a plugin reported."""

    name: str
    """What it is."""

    site: str
    """The place that it is of; empty where it is of the whole model."""

    layer: Count | None
    """Index of the place's layer."""

    stack: str
    """Path of the list of layers."""

    value: float
    """The number."""


class RecordedPass(Record):
    """A pass of a plugin that the graphs went through."""

    pipeline: str
    """The pipeline that it was added to."""

    name: str
    """Its name."""

    distribution: str
    """The package that brings it."""

    version: str
    """The package's version."""

    rewrites: bool
    """Whether it may change graphs."""

    figures: tuple[RecordedFigure, ...]
    """What it reported, of the first signature."""
