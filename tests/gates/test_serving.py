"""The engines themselves: folders that `graftc serve-check` refuses are computed otherwise, those that pass as meant.

Each engine that is installed runs, in one process, every folder that the generator makes for it. `GRAFTC_VLLM` names
the interpreter that has vLLM.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor

import graftc
from graftc.runtime.serving.running import run_engine
from tests.applications.serving.peft_folders import saved_base, shapes_of
from tests.applications.serving.seeded_folders import DEFECTS, GOOD, SeededCase, cases

pytestmark = pytest.mark.gate

PACKAGES = {"llama.cpp": "xllamacpp", "mistralrs": "mistralrs", "openvino": "openvino_genai"}
TEXTS = ("The capital of France is", "A list of three colours:")
TOKENS = 12
Rows: TypeAlias = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small LLaMA with SmolLM2's tokenizer, which some engines need; beside it, the same as GGUF."""
    from transformers import AutoTokenizer

    from graftc.applications.demo.decoder import find_decoder

    folder = tmp_path_factory.mktemp("bases") / "base"
    sizes = {"vocab_size": 49152, "hidden_size": 128, "intermediate_size": 192, "initializer_range": 0.2}
    saved_base(folder, **sizes)
    AutoTokenizer.from_pretrained(find_decoder()).save_pretrained(folder)
    unchanged = {"adapt": [{"method": "lora", "rank": 1, "target": {"role": "attn.q"}}]}
    merged: Any = graftc.compile(unchanged, model_of(folder)).merge(allow_unchanged=True)
    for dtype in ("f32", "f16"):
        merged.export(folder.with_suffix(f".{dtype}.gguf"), "gguf", dtype=dtype)
    return folder


def model_of(folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prompts_of(folder: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [list(tokenizer(text).input_ids) for text in TEXTS]


def meant(folder: Path, updates: Mapping[str, Tensor]) -> Rows:
    """Return the tokens that torch generates with updates added to the base's weights."""
    model = model_of(folder)
    with torch.no_grad():
        for name, update in updates.items():
            model.get_parameter(name).add_(update)
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    model.generation_config.eos_token_id = None
    rows = [model.generate(torch.tensor([ids]), pad_token_id=0, **options) for ids in prompts_of(folder)]
    return [tuple(row[0, -TOKENS:].tolist()) for row in rows]


def answers(
    engine: str, base: Path, own: Sequence[SeededCase], python: Path | None
) -> dict[str, list[tuple[int, ...]]]:
    """Return the tokens that an engine generates for each case.

    The base is not among them: on processors, vLLM 0.32 answers a prompt without an adapter with the last one's if all
    are in one batch.
    """
    forms = {"llama.cpp": ".f32.gguf", "openvino": ".f16.gguf"}
    files = {case.name: case.path for case in own}
    if engine == "openvino":
        files = {name: path / "adapter_model.safetensors" for name, path in files.items()}
    prompts = prompts_of(base)
    answer = run_engine(
        engine,
        base=base.with_suffix(forms[engine]) if engine in forms else base,
        adapters=files,
        prompts=prompts * len(files),
        chosen=[name for name in files for _ in prompts],
        tokens=TOKENS,
        max_rank=64,
        python=python,
        limit=3000,
    )
    rows = iter(answer.tokens)
    return {name: [next(rows) for _ in prompts] for name in files}


@pytest.mark.parametrize("engine", ["llama.cpp", "mistralrs", "openvino", "vllm"])
def test_in_the_engine(engine: str, base: Path, tmp_path: Path) -> None:
    """Of the forty and forty folders, the engine computes those otherwise that are refused, and the rest as meant."""
    interpreter = os.environ.get("GRAFTC_VLLM") if engine == "vllm" else None
    if interpreter is None and importlib.util.find_spec(PACKAGES.get(engine, engine)) is None:
        pytest.skip(f"{engine} is not installed")
    shapes = shapes_of(base)
    bad, good = (
        [c for c in cases(table, tmp_path / name, base, shapes) if c.engine == engine]
        for table, name in ((DEFECTS, "bad"), (GOOD, "good"))
    )
    found = answers(engine, base, [*bad, *good], Path(interpreter) if interpreter is not None else None)
    plain = meant(base, {})
    for case in (*bad, *good):
        wanted = meant(base, case.updates)
        if case in good:
            assert wanted != plain and found[case.name] == wanted, case.name
        else:
            assert wanted != found[case.name], case.name
    passed = {case.name: graftc.serve_check(case.path, engine, base=base).passed for case in (*bad, *good)}
    assert passed == {case.name: case in good for case in (*bad, *good)}


def test_peft_is_of_the_same_opinion(base: Path, tmp_path: Path) -> None:
    """PEFT computes what the folders mean, of all kinds that it loads: with fields that engines do not read, too."""
    from peft import PeftModel

    ids = torch.tensor(prompts_of(base)[:1])
    shapes = shapes_of(base)
    loaded = {"rslora", "own_alpha", "not_selected", "one_layer", "nothing"}
    for case in cases({**DEFECTS, "llama.cpp": ()}, tmp_path, base, shapes):
        if case.name.split("-")[-2] not in loaded:
            continue
        model = model_of(base)
        with torch.no_grad():
            for name, update in case.updates.items():
                model.get_parameter(name).add_(update)
            wanted = model(ids).logits
            found = PeftModel.from_pretrained(model_of(base), case.path).eval()(ids).logits
        assert torch.allclose(found, wanted, atol=1e-3, rtol=1e-4), case.name
