"""Statements about folders that engines load: every tensor, its scale, and every reason against serving it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import graftc
from graftc.runtime.interop.layouts.convert import AdapterSource, convert_folder
from graftc.runtime.serving.engines import ENGINES, PEFT_ENGINES
from graftc.specs.errors.diagnostics import GraftError
from tests.applications.serving.peft_folders import changed, peft_folder, saved_base, shapes_of
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


HOSTILE_FIELDS: list[dict[str, Any]] = [
    *({"r": value} for value in ("4", 4.0, [4], True, 0, -1, {})),
    *({"lora_alpha": value} for value in ("6", True, [], {}, [6])),
    *({"rank_pattern": value} for value in ([], "x", 4, {"q_proj": "x"}, {"q_proj": None}, {"q_proj": 4.0}, {"q": 0})),
    *({"alpha_pattern": value} for value in ([], "x", 6, {"q_proj": "x"}, {"q_proj": None}, {"q_proj": True})),
    *({field: value} for field in ("use_rslora", "use_dora", "lora_bias", "use_qalora") for value in ("false", 0, [])),
    *({"bias": value} for value in (None, 7, [])),
    *({"init_lora_weights": value} for value in (0, 1, [], {})),
]


@pytest.mark.parametrize("fields", HOSTILE_FIELDS, ids=str)
def test_fields_of_the_wrong_type(base: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    """A field that PEFT could not have written is an error that names it, before anything is replayed."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({**CONFIG, **fields}), encoding="utf-8")
    for engine in PEFT_ENGINES:
        with pytest.raises(GraftError, match=next(iter(fields))) as caught:
            graftc.serve_check(tmp_path, engine, base=base)
        assert caught.value.code == "GC111"


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
def test_null_fields(base: Path, tmp_path: Path, field: str) -> None:
    """A config without a rank or an alpha is refused, although PEFT has defaults."""
    folder = _stored(tmp_path, base, **{field: None})
    assert f"{field} is null" in [problem.reason for problem in graftc.serve_check(folder, "vllm").problems]


HOSTILE_FACTORS: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    "one axis": ("refused", "have to be matrices", lambda t: t.flatten()),
    "no axis": ("refused", "have to be matrices", lambda t: t.sum()),
    "three axes": ("refused", "have to be matrices", lambda t: t[None]),
    "nan": ("wrong", "NaN or infinity", lambda t: t.where(t != t.flatten()[-1], torch.nan)),
    "infinite": ("wrong", "NaN or infinity", lambda t: t.where(t != t.flatten()[0], -torch.inf).bfloat16()),
    "int8": ("unverified", "I8", lambda t: t.to(torch.int8)),
    "int64": ("unverified", "I64", lambda t: t.to(torch.int64)),
    "bool": ("unverified", "BOOL", lambda t: t > 0),
    "float8": ("unverified", "F8_E4M3", lambda t: t.to(torch.float8_e4m3fn)),
    "float64": ("unverified", "F64", lambda t: t.double()),
    "complex": ("unverified", "C64", lambda t: t.to(torch.complex64)),
}


@pytest.mark.parametrize("name", HOSTILE_FACTORS)
@pytest.mark.parametrize("part", ["A", "B"])
def test_unusable_factors(base: Path, tmp_path: Path, name: str, part: str) -> None:
    """One unusable factor is a problem of its module, whose tensors are not applied; the others are."""
    kind, reason, change = HOSTILE_FACTORS[name]
    folder = _stored(tmp_path, base)
    file, key = (
        folder / "adapter_model.safetensors",
        f"base_model.model.model.layers.1.self_attn.q_proj.lora_{part}.weight",
    )
    tensors = load_file(file)
    save_file({**tensors, key: change(tensors[key]).contiguous()}, file)
    certificate = graftc.serve_check(folder, "vllm")
    (problem,) = certificate.problems
    assert (problem.kind, problem.place) == (kind, "model.layers.1.self_attn.q_proj") and reason in problem.reason
    assert not certificate.passed and (certificate.applied, certificate.total) == (10, 12)


def test_stored_factors_pass(base: Path, tmp_path: Path) -> None:
    """The folder that other tests damage is served, also in half precision."""
    folder = _stored(tmp_path, base)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        file = folder / "adapter_model.safetensors"
        save_file({key: tensor.to(dtype) for key, tensor in load_file(file).items()}, file)
        certificate = graftc.serve_check(folder, "vllm")
        assert certificate.passed and certificate.applied == 12
        assert {(site.rank, site.scale, site.defined) for site in certificate.sites} == {(4, 1.5, 1.5)}


@pytest.mark.parametrize("engine", PEFT_ENGINES)
def test_no_targets(base: Path, tmp_path: Path, engine: str) -> None:
    """A config has to say which modules it adapts, as null and as a field that is not there."""
    folder = _stored(tmp_path, base, target_modules=None)
    for _ in range(2):
        problems = graftc.serve_check(folder, engine).problems
        assert [(problem.kind, problem.place) for problem in problems] == [("refused", "target_modules")]
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({k: v for k, v in config.items() if k != "target_modules"}), encoding="utf-8")


@pytest.mark.parametrize("engine", PEFT_ENGINES)
def test_missing_factors(base: Path, tmp_path: Path, engine: str) -> None:
    """Modules that the config selects need factors; what it leaves out does not."""
    folder = _stored(tmp_path, base)
    file = folder / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "layers.0" not in key}, file)
    certificate = graftc.serve_check(folder, engine)
    (problem,) = certificate.problems
    assert (problem.kind, problem.place) == ("wrong", "model.layers.0.self_attn.q_proj")
    assert "selects 3 modules whose factors are not in the file" in problem.reason
    assert (certificate.applied, certificate.total, certificate.passed) == (6, 12, False)
    lacking = {tensor.name for tensor in certificate.tensors if not tensor.applied}
    assert "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight" in lacking and len(lacking) == 6
    changed(folder, layers_to_transform=[1])
    certificate = graftc.serve_check(folder, engine)
    assert certificate.passed and (certificate.applied, certificate.total) == (6, 6)


@pytest.mark.parametrize("to", ["peft", "vllm", "sglang"])
def test_a_converted_layer(base: Path, tmp_path: Path, to: str) -> None:
    """A conversion of an adapter of one layer selects only the modules of that layer."""
    (tmp_path / "own").mkdir()
    folder = _stored(tmp_path / "own", base, target_modules=[f"layers.1.self_attn.{name}_proj" for name in "qkv"])
    file = folder / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "layers.1" in key}, file)
    convert_folder(AdapterSource.of(folder), tmp_path / "out", to)
    for engine in PEFT_ENGINES:
        certificate = graftc.serve_check(tmp_path / "out", engine, base=base)
        assert certificate.passed and (certificate.applied, certificate.total) == (6, 6)


@pytest.mark.parametrize(
    ("fields", "kind", "applied"),
    [
        ({"lora_alpha": 0}, "ignored", 0),
        ({"lora_alpha": -6}, "unverified", 0),
        ({"alpha_pattern": {"q_proj": 0}}, "ignored", 8),
        ({"lora_alpha": 0, "alpha_pattern": {"(q|k|v)_proj": 6}}, None, 12),
    ],
)
def test_alphas_that_are_not_positive(
    base: Path, tmp_path: Path, fields: dict[str, Any], kind: str | None, applied: int
) -> None:
    """A scale of zero leaves the base as it is, and no trained adapter has a negative one."""
    certificate = graftc.serve_check(_stored(tmp_path, base, **fields), "vllm")
    assert [problem.kind for problem in certificate.problems] == ([] if kind is None else [kind])
    assert (certificate.applied, certificate.total) == (applied, 12)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"<old>": 5, "<new>": 96}', "added_tokens.json adds <new> to a vocabulary of 96"),
        ('{"<old>": 95}', None),
        ("not JSON", None),
        ('["<new>"]', "is not a mapping"),
        ('{"<new>": "96"}', "is not a mapping"),
    ],
)
def test_added_tokens(base: Path, tmp_path: Path, content: str, problem: str | None) -> None:
    """SGLang refuses tokens beyond the base's vocabulary; the others do not read the file."""
    folder = _stored(tmp_path, base)
    (folder / "added_tokens.json").write_text(content)
    for engine in PEFT_ENGINES:
        found = graftc.serve_check(folder, engine).problems
        if engine != "sglang" or problem is None:
            assert not found
            continue
        assert [(p.kind, p.place) for p in found] == [("refused", "added_tokens.json")] and problem in found[0].reason


@pytest.mark.parametrize(("rank", "needed"), [(4, None), (256, None), (257, "--lora-max-rank 257")])
def test_the_rank_of_mistralrs(base: Path, tmp_path: Path, rank: int, needed: str | None) -> None:
    """mistral.rs has to be told of ranks above 256."""
    folder = _stored(tmp_path, base, rank=rank)
    certificate = graftc.serve_check(folder, "mistralrs")
    assert certificate.passed and certificate.needs == needed
    assert ENGINES["tensorrt-llm"].option_for(rank) == f"lora_config.max_lora_rank {rank}"


def test_no_factors(base: Path, tmp_path: Path) -> None:
    """A file without tensors would leave the base as it is."""
    folder = _stored(tmp_path, base)
    save_file({}, folder / "adapter_model.safetensors")
    for engine in PEFT_ENGINES:
        certificate = graftc.serve_check(folder, engine)
        assert [(p.kind, p.place) for p in certificate.problems] == [("ignored", "adapter_model.safetensors")]
        assert not certificate.passed and certificate.total == 0


def test_other_methods_with_lora_fields(base: Path, tmp_path: Path) -> None:
    """Fields of the same name belong to the other method, and are not read as LoRA's."""
    folder = _stored(tmp_path, base, peft_type="ADALORA", rank_pattern={"a": [True]}, r="x")
    assert [p.place for p in graftc.serve_check(folder, "vllm").problems] == ["peft_type"]


@pytest.mark.parametrize(("kind", "way_out"), [("LOHA", "turns it into a LoRA"), ("PROMPT_TUNING", "onnx-generate")])
def test_the_way_out_of_another_method(base: Path, tmp_path: Path, kind: str, way_out: str) -> None:
    """A method that changes no weight cannot become a LoRA."""
    (problem,) = graftc.serve_check(_stored(tmp_path, base, peft_type=kind), "vllm").problems
    assert problem.place == "peft_type" and way_out in problem.remedy


@pytest.mark.parametrize("content", [b"text", b"", b"GGUF", b"GGUF" + b"\0" * 60])
def test_a_file_that_is_not_gguf(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "file.txt").write_bytes(content)
    with pytest.raises(GraftError, match="as GGUF") as caught:
        graftc.serve_check(tmp_path / "file.txt", "llama.cpp")
    assert caught.value.code == "GC113" and "a GGUF adapter or a GGUF model" in str(caught.value.hint)


@pytest.mark.parametrize("named", ["", None])
def test_a_base_that_is_not_named(base: Path, tmp_path: Path, named: str | None) -> None:
    with pytest.raises(GraftError, match="base_model_name_or_path") as caught:
        graftc.serve_check(_stored(tmp_path, base, base_model_name_or_path=named), "vllm")
    assert caught.value.code == "GC069"


CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj"]}


def _stored(folder: Path, base: Path, rank: int = 4, **fields: Any) -> Path:
    """Write an adapter for q, k and v of `base`, without PEFT."""
    config = {**CONFIG, "r": rank, "base_model_name_or_path": str(base), **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = {path: shape for path, shape in shapes_of(base).items() if path.endswith(("q_proj", "k_proj", "v_proj"))}
    tensors = {}
    for path, (rows, columns) in shapes.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(rank, columns)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(rows, rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
