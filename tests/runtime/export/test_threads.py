"""Exports, captures and calls in several threads: each succeeds, and no thread's output is lost or intercepted."""

from __future__ import annotations

import io
import logging
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.testing import perturb, tiny
from tests.runtime.model.test_threads import at_once


class Net(nn.Module):
    """A model that is exported quickly."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> dict[str, Tensor]:
        y: Tensor = self.fc(x)
        return {"logits": y if shift is None else y + shift}


SPEC = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "*"}}]}
FULL = pytest.mark.full


def net() -> Any:
    compiled = graftc.compile(SPEC, Net().eval(), {"x": torch.zeros(2, 6)}).eval()
    perturb(compiled)
    return compiled


class Watching:
    """A thread body that keeps printing, logging and warning, and checks that the streams are its own."""

    def __init__(self) -> None:
        self.done, self.said = threading.Event(), 0

    def __call__(self) -> None:
        while not self.done.is_set() or not self.said:
            print(f"out {self.said}")
            print(f"err {self.said}", file=sys.stderr)
            logging.getLogger("torch.mine").warning("log %d", self.said)
            self.said += 1
            self.done.wait(0.002)


def beside_others(*jobs: Callable[[], Any]) -> tuple[list[Any], int]:
    """Run jobs concurrently with a printing thread, and return their results and how often that thread printed."""
    watching = Watching()
    thread = threading.Thread(target=watching)
    thread.start()
    try:
        return at_once(*jobs), watching.said
    finally:
        watching.done.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("formats", [("pt2", "pt2"), ("onnx", "pt2"), pytest.param(("onnx",) * 4, marks=FULL)])
def test_streams_stay(
    formats: tuple[Any, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """All lines of another thread are printed and none of an exporter; streams, filters and loggers are restored."""
    models = [net() for _ in formats]
    exports = [(model, tmp_path / f"{n}.{f}", f) for n, (model, f) in enumerate(zip(models, formats, strict=True))]
    jobs = [lambda export=one: export[0].export(*export[1:]) for one in exports]
    capsys.readouterr()
    before = sys.stdout, sys.stderr, list(warnings.filters), logging.root.manager.disable, torch.onnx.export
    paths, _ = beside_others(*jobs)
    assert (sys.stdout, sys.stderr, list(warnings.filters), logging.root.manager.disable, torch.onnx.export) == before
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines == [f"out {n}" for n in range(len(lines))] and lines
    assert [line for line in err.splitlines() if line.startswith("err")] == [f"err {n}" for n in range(len(lines))]
    assert [r.getMessage() for r in caplog.records if r.name == "torch.mine"] == [f"log {n}" for n in range(len(lines))]
    assert all(path.is_file() for path in paths)


def test_what_others_redirect_meanwhile(tmp_path: Path) -> None:
    """An export is not affected by a stream that another thread redirects or restores meanwhile."""
    compiled, mine, done = net(), io.StringIO(), threading.Event()
    before = sys.stdout

    def redirect() -> None:
        while not done.is_set():
            with redirect_stdout(mine):
                print("mine")
            done.wait(0.001)

    def export() -> None:
        try:
            compiled.export(tmp_path / "made.pt2", "pt2")
        finally:
            done.set()

    at_once(redirect, export)
    assert sys.stdout is before
    assert set(mine.getvalue().splitlines()) == {"mine"}


@pytest.mark.slow
def test_a_failing_export_leaves_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compiled = graftc.compile(SPEC, Net().bfloat16().eval(), {"x": torch.zeros(2, 6).bfloat16()}).eval()
    before = sys.stdout, sys.stderr, torch.onnx.export
    with pytest.raises(graftc.GraftError):
        compiled.export(tmp_path / "made.onnx")
    assert (sys.stdout, sys.stderr, torch.onnx.export) == before and not any(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


@pytest.mark.full
def test_eight_threads_of_everything(tmp_path: Path) -> None:
    """Exports of three formats, captures, new signatures, merges and generation run concurrently."""
    llama: Any = graftc.compile(
        {"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.q"}}]}, tiny("llama").eval()
    ).eval()
    perturb(llama, 0.2)
    ids = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(0))
    expected = llama.generate(ids, max_new_tokens=4, do_sample=False)
    plain = net()
    x, shift = torch.randn(3, 6), torch.randn(3, 5)
    jobs: list[Callable[[], Any]] = [
        lambda: llama.export(tmp_path / "llama", "onnx-generate"),
        lambda: llama.export(tmp_path / "llama.onnx"),
        lambda: plain.export(tmp_path / "a.onnx"),
        lambda: plain.export(tmp_path / "b.pt2", "pt2"),
        lambda: graftc.compile(SPEC, Net().eval(), {"x": torch.zeros(2, 6)}, cache=False),
        lambda: plain(x, shift)["logits"],
        lambda: [llama.generate(ids, max_new_tokens=4, do_sample=False) for _ in range(3)],
        lambda: llama.merge(),
    ]
    (folder, *_, added, generated, _), said = beside_others(*jobs)
    assert said and torch.allclose(added, plain(x)["logits"] + shift, atol=1e-5)
    assert all(torch.equal(tokens, expected) for tokens in generated)
    from graftc.runtime.onnx_generation import load

    again = load(folder).generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert torch.equal(again, expected)
