"""Releases of libraries that a test needs, where the oldest ones that graftc supports lack something."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
from packaging.version import Version

_NAMES = {"peft": "PEFT"}
_SINCE = {"GraloraConfig": "0.19", "LilyConfig": "0.19", "HiraConfig": "0.20"}
"""The releases of PEFT that first had methods which the oldest supported one lacks, by the names of their configs."""
_DRAWN = "earlier ones compare a number drawn for each layer with layerdrop in training, which is in no graph"
_GRAPHS = {
    "falcon": ("5.14", "earlier ones map a function over indices to make its masks, which is in no graph"),
    **dict.fromkeys(("bart", "whisper"), ("5.23", _DRAWN)),
}
"""Releases of transformers with which models of a family are single graphs, and why they are taken apart before."""


def is_older(library: str, release: str) -> bool:
    """Return whether the installed library is older than a release."""
    return Version(version(library)) < Version(release)


def needs(library: str, release: str, why: str) -> None:
    """Skip a test if the installed library is older than a release.

    Args:
        library: the name of its distribution.
        release: the first release with which the test passes.
        why: what earlier ones do or lack: ``earlier ones ignore it``.
    """
    if is_older(library, release):
        pytest.skip(f"needs {_NAMES.get(library, library)} {release}: {why}")


def needs_one_graph(family: str) -> None:
    """Skip a test of one graph if models of a family are not one with the installed transformers."""
    if family in _GRAPHS:
        needs("transformers", *_GRAPHS[family])


def peft_config(kind: str, **fields: Any) -> Any:
    """Return a config of PEFT; skip the test if the installed release does not have its class yet.

    Args:
        kind: the name of the class.
        fields: its fields.
    """
    peft = pytest.importorskip("peft")
    if kind in _SINCE and not hasattr(peft, kind):
        pytest.skip(f"needs PEFT {_SINCE[kind]}: earlier ones have no {kind}")
    return getattr(peft, kind)(**fields)
