"""Captures in which some layers are taken over from others, held against those for which every layer is traced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from graftc.compiler.capture.capture import Capture, capture
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.capture.signature import Axis
from graftc.passes.core.ir.printer import format_program


def taken_over(model: nn.Module, axes: Sequence[Axis] | None = None, **settings: Any) -> Capture:
    """The capture with layers taken over; it is equal to the one without, node by node.

    Args:
        model: any module.
        axes: its inputs.
        settings: of the request.
    """
    request = CaptureRequest.of(model, axes, **settings)
    every, found = capture(request, alike=False), capture(request)
    assert format_program(found.program) == format_program(every.program)
    assert [n.name for n in found.program.graph.nodes] == [n.name for n in every.program.graph.nodes]
    assert found.program.inputs == every.program.inputs
    assert found.program.updates == every.program.updates
    assert (found.notes, found.assigned, every.alike) == (every.notes, every.assigned, 0)
    return found
