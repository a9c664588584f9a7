"""Captures that take some layers over from others, compared with captures that trace every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from graftc.compiler.capture.capture import Capture, capture
from graftc.compiler.capture.past import ENCODED, has_encoder, probe
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.capture.signature import Axis, axes_of
from graftc.passes.core.ir.past_inputs import is_cross
from graftc.passes.core.ir.printer import format_program
from tests.kit.language_models import CACHE


def taken_over(model: nn.Module, axes: Sequence[Axis] | None = None, **settings: Any) -> Capture:
    """Return a capture with layers taken over, once it is checked against one that traces every layer.

    Written out, both have the same nodes, except for the nodes' names.

    Args:
        model: any module.
        axes: the model's inputs.
        settings: settings of the request.
    """
    request = CaptureRequest.of(model, axes, **settings)
    every, result = capture(request, alike=False), capture(request)
    assert format_program(result.program) == format_program(every.program)
    assert [n.target for n in result.program.graph.nodes] == [n.target for n in every.program.graph.nodes]
    assert result.program.inputs == every.program.inputs
    assert result.program.updates == every.program.updates
    assert (result.notes, result.assigned, every.alike) == (every.notes, every.assigned, 0)
    return result


def with_past(model: nn.Module, *, crosses: bool = True) -> list[Axis]:
    """Return the inputs of a call of a transformers model with a cache.

    Args:
        model: a model that takes token ids.
        crosses: whether the cache has keys and values of an encoder, if the model has one.
    """
    ids = torch.ones(2, 4, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": ids}
    if has_encoder(model):
        inputs |= {"decoder_input_ids": ids}
    layout = probe(model, inputs, CACHE)
    if layout.pairs and crosses:  # the encoder need not run
        del inputs["input_ids"]
        inputs[ENCODED] = torch.zeros(2, 4, model.config.d_model)
    past = {
        name: torch.zeros(2, heads, 4, width, dtype=dtype)
        for name, (dtype, heads, width) in layout.heads.items()
        if crosses or not is_cross(name)
    }
    return axes_of(model, {**inputs, **past})
