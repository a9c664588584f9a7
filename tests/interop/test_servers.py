"""Limits of servers: what is refused before anything is written, with the field and the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import graftc
from graftc.runtime.interop.layouts.convert import convert_folder
from graftc.runtime.interop.peft.servers import SERVERS, require_served, server_of
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb
from tests.families import tiny
from tests.interop.adapters import base, written

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 12, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(("name", "needed"), [("vllm", 16), ("sglang", 12)])
def test_a_plain_lora_is_served(name: str, needed: int) -> None:
    """The option that the server needs is the smallest of its values that holds the rank."""
    server = server_of(name)
    assert require_served(server, PLAIN, [KEY]) == needed
    assert require_served(server, {**PLAIN, "r": 1}, [KEY]) == 1
    assert require_served(server, {**PLAIN, "r": 9}, [KEY], max_rank=64) == (16 if name == "vllm" else 9)
    assert server.read


@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize(
    ("change", "keys", "words"),
    [
        ({"use_dora": True}, [KEY], "use_dora is true: graftc convert"),
        ({"bias": "lora_only"}, [KEY], "bias is 'lora_only': fold the biases"),
        ({"modules_to_save": ["lm_head"]}, [KEY], "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, [KEY], "rank_pattern.*graftc convert --to {name}"),
        ({"alpha_pattern": {"q_proj": 4}}, [KEY], "alpha_pattern.*graftc convert --to {name}"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, [KEY], "target_parameters.*--to {name}"),
        ({"peft_type": "IA3"}, [KEY], "peft_type is 'IA3': graftc convert"),
        ({"task_type": "SEQ_CLS"}, [KEY], "task_type is 'SEQ_CLS'.*merge"),
        ({}, [KEY, "base_model.model.lm_head.weight"], "lm_head.weight are tensors of the base"),
    ],
)
def test_what_is_refused(name: str, change: dict[str, Any], keys: list[str], words: str) -> None:
    with pytest.raises(GraftError, match=words.replace("{name}", name)) as caught:
        require_served(server_of(name), {**PLAIN, **change}, keys)
    assert caught.value.code == "GC068"


def test_ranks() -> None:
    with pytest.raises(GraftError, match=r"r is 513, the largest rank is 512: graftc convert --rank 512"):
        require_served(server_of("vllm"), {**PLAIN, "r": 513}, [KEY])
    with pytest.raises(GraftError, match=r"r is 12, the largest rank is 8"):
        require_served(server_of("sglang"), PLAIN, [KEY], max_rank=8)
    with pytest.raises(GraftError, match="--max-lora-rank 24 is none of 1, 8, 16"):
        require_served(server_of("vllm"), PLAIN, [KEY], max_rank=24)
    with pytest.raises(GraftError) as caught:
        server_of("vlm")
    assert caught.value.hint == "did you mean 'vllm'?"


def test_everything_in_the_way_is_named() -> None:
    with pytest.raises(GraftError) as caught:
        require_served(server_of("vllm"), {**PLAIN, "use_dora": True, "bias": "all", "r": 600}, [KEY])
    assert len(caught.value.details) == 2


@pytest.mark.slow
def test_an_export_for_a_server(tmp_path: Path) -> None:
    """Refused before anything is there; converted, it is served."""
    target = {"role": ["attn.q", "attn.v"]}
    compiled = graftc.compile({"adapt": [{"method": "dora", "rank": 2, "target": target}]}, tiny("llama"))
    perturb(compiled)
    with pytest.raises(GraftError, match="use_dora") as caught:
        compiled.export(tmp_path / "dora", format="peft", server="vllm")
    assert caught.value.code == "GC068" and not any(tmp_path.iterdir())
    made = compiled._graftc.convert(rank=4)
    made.compiled.export(tmp_path / "lora", format="peft", server="vllm")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 4


def test_a_conversion_for_a_server(tmp_path: Path) -> None:
    """The layout of a server keeps to its limits."""
    own = written(base("llama"), tmp_path / "own", target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 5})
    with pytest.raises(GraftError, match="rank_pattern"):
        config = json.loads((own / "adapter_config.json").read_text())
        require_served(server_of("vllm"), config, [KEY])
    convert_folder(own, tmp_path / "vllm", "vllm")
    assert require_served(server_of("vllm"), json.loads((tmp_path / "vllm/adapter_config.json").read_text()), []) == 8


@pytest.mark.full
def test_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The option that the server needs is printed; a limit that is exceeded leaves nothing behind."""
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
    assert error["code"] == "GC068" and "r is 12, the largest rank is 8" in error["message"]
    error = run_here(capsys, *words, "--max-rank", "8", "--out", "x", "--json").data["error"]
    assert error["code"] == "GC090" and "--for" in error["hint"]
    error = run_here(capsys, "export", "artifact", "-f", "onnx", "--for", "vllm", "--out", "x", "--json").data["error"]
    assert error["code"] == "GC090" and not Path("x").exists()
