"""What is stated about folders that engines load: every tensor, its scale, and every reason against serving it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import graftc
from graftc.runtime.serving.engines import ENGINES, PEFT_ENGINES
from graftc.specs.errors.diagnostics import GraftError
from tests.applications.serving.peft_folders import peft_folder, saved_base, shapes_of
from tests.applications.serving.seeded_folders import DEFECTS, GOOD, cases
from tests.cli.support import run_here
from tests.cli.test_schemas import valid

SCALES: list[tuple[dict[str, Any], dict[str, tuple[int, float]]]] = [
    ({}, {"q_proj": (4, 1.5), "v_proj": (4, 1.5)}),
    ({"use_rslora": True}, {"q_proj": (4, 3.0), "v_proj": (4, 3.0)}),
    ({"rank_pattern": {"q_proj": 2}}, {"q_proj": (2, 3.0), "v_proj": (4, 1.5)}),
    ({"alpha_pattern": {"v_proj": 3}}, {"q_proj": (4, 1.5), "v_proj": (4, 0.75)}),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.mark.slow
@pytest.mark.parametrize("engine", PEFT_ENGINES)
@pytest.mark.parametrize(("options", "scales"), SCALES)
def test_scales(
    base: Path, tmp_path: Path, engine: str, options: dict[str, Any], scales: dict[str, tuple[int, float]]
) -> None:
    """An engine that reads a field has PEFT's scale at every site; any other is refused, and the field is named."""
    certificate = graftc.serve_check(peft_folder(base, tmp_path / "adapter", **options), engine)
    lacking = [field for field in options if field in ENGINES[engine].refused]
    assert certificate.total == 8
    assert {problem.place for problem in certificate.problems} >= set(lacking)
    if lacking:
        assert not certificate.passed and certificate.applied < 8
        return
    assert certificate.passed and certificate.applied == 8 and certificate.base == str(base)
    for site in certificate.sites:
        wanted = scales[site.site.rpartition(".")[2]]
        assert (site.rank, site.scale, site.defined) == (wanted[0], pytest.approx(wanted[1]), site.scale)


@pytest.mark.slow
def test_a_name_that_the_base_lacks(base: Path, tmp_path: Path) -> None:
    """Two of eight tensors have another layer's name: they are stated, and so is what the engine does with them."""
    folder = peft_folder(base, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    save_file({k.replace("layers.1.self_attn.q", "layers.7.self_attn.q"): t for k, t in load_file(file).items()}, file)
    for engine, kind in (("vllm", "ignored"), ("mistralrs", "refused")):
        certificate = graftc.serve_check(folder, engine)
        assert (certificate.applied, certificate.total, certificate.passed) == (6, 8, False)
        assert [(p.kind, p.place) for p in certificate.problems] == [(kind, "model.layers.7.self_attn.q_proj")]
        lost = [tensor.name for tensor in certificate.tensors if not tensor.applied]
        assert len(lost) == 2 and all("layers.7" in name for name in lost)


@pytest.mark.slow
def test_on_the_command_line(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit status is that of other negative results, and the JSON conforms to its schema."""
    folder = peft_folder(base, tmp_path / "adapter", use_rslora=True)
    outcome = run_here(capsys, "serve-check", str(folder), "--engine", "vllm")
    assert (
        outcome.status == 0 and "8 of 8 tensors applied at 4 sites" in outcome.out and "scale 3, rank 4" in outcome.out
    )
    outcome = run_here(capsys, "serve-check", str(folder), "--engine", "sglang")
    assert outcome.status == 1 and "use_rslora is true" in outcome.out and "NOT served" in outcome.out
    data = valid("serve-check", run_here(capsys, "serve-check", str(folder), "-e", "sglang", "--json"))
    assert data["certificate"]["applied"] == 0 and data["certificate"]["passed"] is False


def test_an_unknown_engine_and_folder(tmp_path: Path) -> None:
    with pytest.raises(GraftError) as caught:
        graftc.serve_check(tmp_path, "vlm")
    assert caught.value.code == "GC068" and caught.value.hint == "did you mean 'vllm'?"
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(GraftError) as caught:
            graftc.serve_check(path, "vllm")
        assert caught.value.code == "GC110"
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    with pytest.raises(GraftError, match="base") as caught:
        graftc.serve_check(tmp_path, "vllm")
    assert caught.value.code == "GC069"


@pytest.mark.slow
def test_seeded_folders(base: Path, tmp_path: Path) -> None:
    """Forty folders that engines load and compute otherwise are refused, and forty good ones pass.

    `tests/gates/test_serving.py` shows in the engines that the former are computed otherwise, and the latter as meant.
    """
    shapes = shapes_of(base)
    bad = list(cases(DEFECTS, tmp_path / "bad", base, shapes))
    good = list(cases(GOOD, tmp_path / "good", base, shapes))
    assert len(bad) == len(good) == 40
    assert [case.name for case in bad if graftc.serve_check(case.path, case.engine, base=base).passed] == []
    found = {case.name: graftc.serve_check(case.path, case.engine, base=base) for case in good}
    assert {name: [str(p) for p in each.problems] for name, each in found.items() if not each.passed} == {}
    for case in good:
        each = found[case.name]
        assert each.applied == each.total == 2 * len(case.updates)
