"""A spec that asks for a chunked loss, and graphs that compute it as a whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from graftc.passes.lowering.chunk_losses import STEP
from graftc.passes.lowering.requested_loss import warn_of_whole
from graftc.records.graphs import LoweringOutcome
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftWarning
from tests.kit.refusals import no_warning

LOGITS, LOSS = (2, 3, 5), ()


def asked(loss: str, shapes: list[tuple[int, ...]], *outcomes: LoweringOutcome) -> None:
    """Warn as for a graph with outputs of these shapes."""
    outputs = [SimpleNamespace(meta={"val": torch.empty(shape)}) for shape in shapes]
    program: Any = SimpleNamespace(output_node=SimpleNamespace(all_input_nodes=outputs))
    warn_of_whole(
        Spec.model_validate({"adapt": [{"method": "bitfit"}], "memory": {"loss": loss}}), program, list(outcomes)
    )


@pytest.mark.parametrize("shapes", [[LOSS], [LOSS, LOGITS]])
@pytest.mark.parametrize("outcomes", [(), (LoweringOutcome(STEP, "head", False, "it has a bias"),)])
def test_a_loss_that_stays_whole(shapes: list[tuple[int, ...]], outcomes: tuple[LoweringOutcome, ...]) -> None:
    with pytest.warns(GraftWarning, match="GC151.*head: it has a bias" if outcomes else "GC151.*not a cross-entropy"):
        asked("chunked", shapes, *outcomes)


def test_nothing_to_say() -> None:
    """Graphs without a loss have none to compute; otherwise the loss is chunked, or nobody has asked for that."""
    with no_warning():
        asked("chunked", [LOGITS])
        asked("chunked", [])
        asked("chunked", [LOSS], LoweringOutcome(STEP, "head", True))
        asked("whole", [LOSS])
        asked("auto", [LOSS])
