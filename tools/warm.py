"""What the server of `tools.forked` does before it forks."""

from __future__ import annotations

import importlib
import pkgutil

import torch
import transformers

import graftc

_PLUGINS = ("graftc.axolotl",)
"""Modules that only other packages import, which need not be installed."""


def warm_up(*skipped: str) -> None:
    """Use one thread, import all of graftc, and what torch and transformers import only at the first capture.

    All modules except plugins for other packages are imported at once, so that a run sees one state of the sources
    even if they are edited meanwhile.

    Args:
        skipped: the beginnings of names of further modules that are left out.
    """
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    for module in pkgutil.walk_packages(graftc.__path__, "graftc."):
        if not module.name.startswith(("graftc.__main__", *_PLUGINS, *skipped)):
            importlib.import_module(module.name)
    graftc.roles(torch.nn.Sequential(torch.nn.Linear(4, 4)), {"input": torch.ones(2, 4)}, cache=False)
    importlib.import_module("transformers.exporters.exporter_dynamo")
