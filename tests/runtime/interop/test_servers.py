"""Limits of servers: exports beyond them are refused before anything is written, naming the field and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import graftc
from graftc.runtime.interop.layouts.convert import AdapterSource, convert_folder
from graftc.runtime.serving.engines import PEFT_ENGINES, engine_of
from graftc.runtime.serving.limits import require_served
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb
from graftc.testing.families import tiny
from tests.runtime.interop.adapters import base, written

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 12, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
PATTERNS = ["vllm", "mistralrs"]
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(("name", "needed"), [("vllm", 16), ("sglang", 12), ("mistralrs", 12)])
def test_a_plain_lora_is_served(name: str, needed: int) -> None:
    """The required option of the server is its smallest value that covers the rank."""
    server = engine_of(name)
    assert require_served(server, PLAIN, [KEY]) == needed
    assert require_served(server, {**PLAIN, "r": 1}, [KEY]) == 1
    assert require_served(server, {**PLAIN, "r": 9}, [KEY], max_rank=64) == (16 if name == "vllm" else 9)
    assert server.read


@pytest.mark.parametrize("name", PEFT_ENGINES)
@pytest.mark.parametrize(
    ("change", "keys", "words"),
    [
        ({"use_dora": True}, [KEY], "use_dora is true: graftc convert"),
        ({"bias": "lora_only"}, [KEY], "bias is 'lora_only': fold the biases"),
        ({"modules_to_save": ["lm_head"]}, [KEY], "modules_to_save"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, [KEY], "target_parameters.*--to {layout}"),
        ({"init_lora_weights": "pissa"}, [KEY], "init_lora_weights is 'pissa'.*base"),
        ({"init_lora_weights": "pissa_niter_4"}, [KEY], "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, [KEY], "init_lora_weights is 'olora'"),
        ({"init_lora_weights": "corda"}, [KEY], "init_lora_weights is 'corda'"),
        ({"modules_to_save": ["score", "lm_head"]}, [KEY], "modules_to_save"),
        ({}, ["model.layers.0.self_attn.q_proj.lora_A.weight"], "would have no effect"),
        ({}, [KEY, "model.layers.0.self_attn.q_proj.lora_A.weight"], "would have no effect"),
        ({"peft_type": "IA3"}, [KEY], "peft_type is 'IA3': graftc convert"),
        ({"task_type": "SEQ_CLS"}, [KEY], "task_type is 'SEQ_CLS'.*merge"),
        ({}, [KEY, "base_model.model.lm_head.weight"], "lm_head.weight are tensors of the base"),
    ],
)
def test_what_is_refused(name: str, change: dict[str, Any], keys: list[str], words: str) -> None:
    with pytest.raises(GraftError, match=words.replace("{layout}", engine_of(name).layout)) as caught:
        require_served(engine_of(name), {**PLAIN, **change}, keys)
    assert caught.value.code == "GC068"


@pytest.mark.parametrize("name", PEFT_ENGINES)
@pytest.mark.parametrize(
    ("change", "taken", "words"),
    [
        ({"rank_pattern": {"q_proj": 4}}, [*PATTERNS, "tensorrt-llm"], "rank_pattern.*graftc convert --to {layout}"),
        ({"alpha_pattern": {"q_proj": 4}}, PATTERNS, "alpha_pattern.*graftc convert --to {layout}"),
        ({"use_rslora": True}, [*PATTERNS, "tensorrt-llm"], "use_rslora is true.*--for {name}"),
        ({"modules_to_save": ["score"], "task_type": "SEQ_CLS"}, ["vllm"], "task_type is 'SEQ_CLS'"),
        ({"modules_to_save": ["classifier"]}, ["vllm"], "modules_to_save"),
        ({"init_lora_weights": "gaussian"}, list(PEFT_ENGINES), ""),
        ({"init_lora_weights": "orthogonal"}, list(PEFT_ENGINES), ""),
        ({"init_lora_weights": False}, list(PEFT_ENGINES), ""),
    ],
)
def test_where_servers_differ(name: str, change: dict[str, Any], taken: list[str], words: str) -> None:
    if name in taken:
        assert require_served(engine_of(name), {**PLAIN, **change}, [KEY]) >= 12
        return
    wanted = words.replace("{name}", name).replace("{layout}", engine_of(name).layout)
    with pytest.raises(GraftError, match=wanted) as caught:
        require_served(engine_of(name), {**PLAIN, **change}, [KEY])
    assert caught.value.code == "GC068"


def test_the_largest_of_a_pattern() -> None:
    config = {**PLAIN, "rank_pattern": {"q_proj": 40, "v_proj": 2}}
    assert require_served(engine_of("vllm"), config, [KEY]) == 64
    with pytest.raises(GraftError, match="r is 40, but the largest rank is 16"):
        require_served(engine_of("vllm"), config, [KEY], max_rank=16)


def as_engines_do(folder: Path, model: Any) -> Any:
    """Return the model with ``alpha / rank * B A`` added, using only names, ``r``, ``lora_alpha`` and patterns."""
    import torch
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, down in tensors.items():
        path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if not key.endswith("lora_A.weight"):
            continue
        up = tensors[key.replace("lora_A", "lora_B")]
        rank = (config.get("rank_pattern") or {}).get(path, config["r"])
        alpha = (config.get("alpha_pattern") or {}).get(path, config["lora_alpha"])
        assert rank == len(down)
        with torch.no_grad():
            model.get_submodule(path).weight += alpha / rank * (up @ down)
    return model


LORAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "pissa, rslora": {"init": "pissa", "rslora": True},
    "rslora, ranks": {"rslora": True, "overrides": [{"role": "attn.v", "rank": 5}]},
    "pissa, scales": {"init": "pissa", "overrides": [{"role": "attn.v", "alpha": 3, "rank": 2}]},
}


@pytest.mark.sample("rslora, ranks-sglang", "pissa, rslora-tensorrt-llm")
@pytest.mark.slow
@pytest.mark.parametrize("name", PEFT_ENGINES)
@pytest.mark.parametrize("kind", LORAS)
def test_what_is_written_for_a_server(kind: str, name: str, tmp_path: Path) -> None:
    """An engine that knows only ``alpha / rank`` computes the model's outputs over the base, and so does PEFT.

    Anything that the server does not read is refused before anything is written.
    """
    import torch

    lora = {"method": "lora", "rank": 3, "alpha": 5, "target": {"role": ["attn.q", "attn.v"]}, **LORAS[kind]}
    compiled: Any = graftc.compile({"adapt": [lora]}, tiny("llama").eval()).eval()
    perturb(compiled, 0.2)
    if "overrides" in lora and name not in PATTERNS:
        with pytest.raises(GraftError, match="_pattern") as caught:
            compiled.export(tmp_path / "served", "peft", server=name)
        assert caught.value.code == "GC068" and not any(tmp_path.iterdir())
        return
    compiled.export(tmp_path / "served", "peft", server=name)
    config = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
    assert config["use_rslora"] is False and config["r"] == (6 if "init" in lora else 3)
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = compiled(input_ids=ids).logits
        base = tiny("llama").eval()(input_ids=ids).logits
        served = as_engines_do(tmp_path / "served", tiny("llama").eval())(input_ids=ids).logits
    assert torch.allclose(served, expected, atol=1e-4) and not torch.allclose(base, expected, atol=1e-2)
    peft = pytest.importorskip("peft")
    loaded = peft.PeftModel.from_pretrained(tiny("llama").eval(), tmp_path / "served").eval()
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids).logits, expected, atol=1e-4)


def test_ranks() -> None:
    with pytest.raises(GraftError, match=r"r is 513, but the largest rank is 512: graftc convert --rank 512"):
        require_served(engine_of("vllm"), {**PLAIN, "r": 513}, [KEY])
    with pytest.raises(GraftError, match=r"r is 12, but the largest rank is 8"):
        require_served(engine_of("sglang"), PLAIN, [KEY], max_rank=8)
    with pytest.raises(GraftError, match="--max-lora-rank 24 is not one of 1, 8, 16"):
        require_served(engine_of("vllm"), PLAIN, [KEY], max_rank=24)
    with pytest.raises(GraftError) as caught:
        engine_of("vlm")
    assert caught.value.hint == "did you mean 'vllm'?"


def test_everything_in_the_way_is_named() -> None:
    with pytest.raises(GraftError) as caught:
        require_served(engine_of("vllm"), {**PLAIN, "use_dora": True, "bias": "all", "r": 600}, [KEY])
    assert len(caught.value.details) == 2


@pytest.mark.slow
def test_an_export_for_a_server(tmp_path: Path) -> None:
    """An export is refused before anything is written; after conversion it succeeds."""
    target = {"role": ["attn.q", "attn.v"]}
    compiled = graftc.compile({"adapt": [{"method": "dora", "rank": 2, "target": target}]}, tiny("llama"))
    perturb(compiled)
    with pytest.raises(GraftError, match="use_dora") as caught:
        compiled.export(tmp_path / "dora", format="peft", server="vllm")
    assert caught.value.code == "GC068" and not any(tmp_path.iterdir())
    conversion = compiled._graftc.convert(rank=4)
    conversion.compiled.export(tmp_path / "lora", format="peft", server="vllm")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.slow
def test_a_conversion_for_a_server(tmp_path: Path) -> None:
    """A conversion to a server's layout respects its limits."""
    own = written(base("llama"), tmp_path / "own", target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 5})
    with pytest.raises(GraftError, match="rank_pattern"):
        config = json.loads((own / "adapter_config.json").read_text())
        require_served(engine_of("sglang"), config, [KEY])
    convert_folder(AdapterSource.of(own), tmp_path / "vllm", "vllm")
    assert require_served(engine_of("vllm"), json.loads((tmp_path / "vllm/adapter_config.json").read_text()), []) == 8


@pytest.mark.full
def test_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The option that the server needs is printed; exceeding a limit leaves nothing behind."""
    from tests.cli.support import run_here

    monkeypatch.chdir(tmp_path)
    tiny("llama").save_pretrained("base")
    from transformers import LlamaForCausalLM

    lora = {"method": "lora", "rank": 12, "target": {"role": ["attn.q"]}}
    graftc.compile({"adapt": [lora]}, LlamaForCausalLM.from_pretrained("base")).save("artifact", certify=False)
    words = ["export", "artifact", "--format", "peft"]
    outcome = run_here(capsys, *words, "--for", "vllm", "--out", "served")
    assert outcome.status == 0 and "the server needs:     --max-lora-rank 16" in outcome.out
    assert run_here(capsys, *words, "--for", "vllm", "--dry-run", "--json").data["max_rank"] == 16
    error = run_here(capsys, *words, "--for", "vllm", "--max-rank", "8", "--out", "x", "--json").data["error"]
    assert error["code"] == "GC068" and "r is 12, but the largest rank is 8" in error["message"]
    error = run_here(capsys, *words, "--max-rank", "8", "--out", "x", "--json").data["error"]
    assert error["code"] == "GC090" and "--for" in error["hint"]
    error = run_here(capsys, "export", "artifact", "-f", "onnx", "--for", "vllm", "--out", "x", "--json").data["error"]
    assert error["code"] == "GC090" and not Path("x").exists()
