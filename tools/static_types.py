"""Assertions on the types that type checkers infer for the Python interface.

Nothing here runs: mypy checks this module with the others, and fails if a type is lost or becomes `Any`.
"""

from __future__ import annotations

from typing import Any, assert_type

import torch
from torch import nn

import graftc
from graftc import Certificate, Compiled, Merged, Report, Selection
from graftc.compiler.capture.interface import ExampleInputs
from graftc.compiler.roles.structure import Structure
from graftc.runtime.deploy.partial import Partial


class Model(nn.Module):
    """A stand-in for a class of transformers."""


def models(model: Model, inputs: ExampleInputs) -> None:
    """Assert that the class of the source model is kept until `to_transformers` returns an instance of it."""
    compiled = graftc.compile("spec.yaml", model, inputs)
    assert_type(compiled, Compiled[Model])
    assert_type(compiled.train(), Compiled[Model])
    assert_type(compiled.merge(), Merged[Model])
    assert_type(compiled.merge().to_transformers(), Model)
    assert_type(compiled.merge().certificate, Certificate)
    assert_type(compiled.merge_partially(), Partial[Model, Compiled[Model]])
    assert_type(compiled.merge_partially().compiled, Compiled[Model])
    assert_type(graftc.load("artifact", model), Compiled[Model])
    assert_type(compiled.report, Report)
    assert_type(graftc.check("spec.yaml", model), Report)
    assert_type(graftc.select(compiled), Selection)


def unknown_models() -> None:
    """Assert that an artifact alone does not determine the class of its base."""
    assert_type(graftc.load("artifact"), Compiled[Any])
    assert_type(graftc.load("artifact", "tiny-bert"), Compiled[Any])
    assert_type(graftc.load("artifact").merge().to_transformers(), Any)


def attributes(compiled: Compiled) -> None:
    """Assert the types of the Runner's attributes; the result of a call has none, as for every `torch.nn.Module`."""
    assert_type(compiled.base_model, nn.Module)
    assert_type(compiled.device, torch.device)
    assert_type(compiled.dtype, torch.dtype)
    assert_type(compiled.spec, graftc.Spec)
    assert_type(compiled.structure, Structure)
    assert_type(compiled(), Any)


def any_model(compiled: Compiled[Model]) -> Compiled[nn.Module]:
    """Accept a compiled model of a class as one of any of its base classes."""
    return compiled
