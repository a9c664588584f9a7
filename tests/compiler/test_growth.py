"""The cost of compiling grows as the graph does: no step processes everything for each layer, site or adaptation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import graftc
from graftc.compiler.capture.capture import capture
from graftc.compiler.capture.request import CaptureRequest
from graftc.testing import families
from tests.kit.counting import calls

MAPS = ["attn.q", "attn.v", "ffn.up"]


def model(layers: int) -> Any:
    with torch.device("meta"):
        return families.llama(num_hidden_layers=layers)


def check_of(layers: int, adaptations: int = 1) -> Callable[[], object]:
    """Return a function that compiles a model from the cache."""
    network = model(layers)
    lora = {"method": "lora", "target": {"role": MAPS}, "rank": 2}
    spec = {"adapt": [{"name": f"a{number}", **lora} for number in range(adaptations)]}
    graftc.check(spec, network)
    return lambda: graftc.check(spec, network)


@pytest.mark.full
@pytest.mark.sample("layers")
@pytest.mark.parametrize(
    "work",
    [lambda n: check_of(6 * n), lambda n: check_of(2, 8 * n)],
    ids=["layers", "adaptations"],
)
def test_a_compile_from_the_cache_is_linear(work: Callable[[int], Callable[[], object]]) -> None:
    calls(work(1))  # pays for what a process looks up once
    one, two, four = (calls(work(n)) for n in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.1)


@pytest.mark.full
def test_a_layer_that_is_called_costs_its_tensors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compiling a deep model, including its capture, takes little longer than compiling its first layers."""
    monkeypatch.setenv("GRAFTC_CACHE", str(tmp_path))
    lora = {"method": "lora", "target": {"role": MAPS}, "rank": 2}

    def work(layers: int) -> Callable[[], object]:
        network = model(layers)
        return lambda: graftc.compile({"adapt": [lora]}, network, cache=False)

    calls(work(6))
    few, more, most = (calls(work(layers)) for layers in (6, 16, 26))
    assert most - more == pytest.approx(more - few, rel=0.1)
    assert (more - few) / 10 < few / 30


@pytest.mark.full
def test_a_capture_hardly_grows_with_layers_that_are_alike() -> None:
    few, more = (calls(lambda n=n: capture(CaptureRequest.of(model(n)))) for n in (5, 8))
    assert more - few < few / 4
    assert calls(lambda: capture(CaptureRequest.of(model(8)), alike=False)) > 2 * more
