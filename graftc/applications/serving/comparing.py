"""Compare the tokens that an engine generates with those that torch does, for one base and adapter in float32."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from graftc.applications.serving.bases import ServedBase
from graftc.applications.serving.gguf_files import gguf_updates
from graftc.records.serving.certificates import ServingRun
from graftc.runtime.api import compile, import_peft
from graftc.runtime.export.gguf.writing import package
from graftc.runtime.onnx_generation import load as load_onnx
from graftc.runtime.serving.engines import Engine, Form
from graftc.runtime.serving.running import run_engine
from graftc.runtime.sources.models import load_folder
from graftc.specs.errors.diagnostics import GraftError

TOKENS = 16
"""The number of tokens that are compared for each prompt."""

_TEXTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, there was",
    "A list of three colours:",
    "The opposite of hot is",
)
_UNCHANGED = {"adapt": [{"method": "lora", "rank": 1, "target": {"role": "attn.q"}}]}


def compared(
    engine: Engine, form: Form, path: Path, base: ServedBase | None, *, max_rank: int | None, python: Path | None
) -> ServingRun:
    """Run an engine on a folder, and compare its greedy tokens with torch's.

    Args:
        engine: the engine.
        form: what the folder is.
        path: the folder, or a GGUF file.
        base: the base of an adapter; None for whole models.
        max_rank: the largest rank with which the engine is started; None for its default.
        python: the interpreter that has the engine; the running one by default.

    Raises:
        GraftError: GC061 if the engine or the package gguf is not installed, GC079 if the engine fails, and as in
            `graftc.import_peft` for an adapter that graftc cannot compute.
    """
    where = path if base is None else base.folder
    tokenizer = tokenizer_of(where)
    prompts = prompts_for(tokenizer)
    plain = None if base is None else _greedy(load_folder(base.folder, dtype=torch.float32), prompts)
    reference = _reference(form, path, base)
    ends = _ends(tokenizer, reference)
    # Engines that are asked for a number of tokens do not end a text, and continue it with another token.
    wanted = [_until(ends, row) for row in _greedy(reference, prompts)]
    with _as_engine_reads(engine, where, base) as folder:
        answer = run_engine(
            engine.name,
            base=folder,
            adapter=None if base is None else path,
            prompts=prompts,
            tokens=TOKENS,
            max_rank=max_rank,
            python=python,
        )
    differences = [
        next(n for n, (a, b) in enumerate(zip(own, right, strict=False)) if a != b)
        for own, right in zip(answer.tokens, wanted, strict=True)
        if own[: len(right)] != right
    ]
    before = plain or [()] * len(prompts)
    return ServingRun(
        version=answer.version,
        prompts=len(prompts),
        tokens=TOKENS,
        equal=len(prompts) - len(differences),
        changed=sum(row[: len(own)] != own for row, own in zip(before, wanted, strict=True)),
        first_difference=min(differences, default=None),
    )


def tokenizer_of(base: Path) -> Any:
    """Return the tokenizer of a folder or a GGUF file; None if it has none that transformers can read."""
    from transformers import AutoTokenizer

    try:
        if base.is_file():
            return AutoTokenizer.from_pretrained(base.parent, gguf_file=base.name)
        return AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def prompts_for(tokenizer: Any) -> list[list[int]]:
    """Return the texts as tokens, or random tokens if there is no tokenizer."""
    if tokenizer is not None:
        return [list(tokenizer(text).input_ids) for text in _TEXTS]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 64, (5,), generator=generator).tolist() for _ in _TEXTS]


def _ends(tokenizer: Any, model: Any) -> frozenset[int]:
    """Return the tokens that may end a text: those of the model's configs, and the tokenizer's special tokens.

    Engines derive theirs in different ways; llama.cpp also goes by the names of special tokens.
    """
    ends: set[int] = set(getattr(tokenizer, "all_special_ids", ()))
    for name in ("config", "generation_config"):
        stated = getattr(getattr(model, name, None), "eos_token_id", None)
        ends.update(stated if isinstance(stated, list) else () if stated is None else (stated,))
    return frozenset(ends)


def _until(ends: frozenset[int], row: tuple[int, ...]) -> tuple[int, ...]:
    """Return the tokens before the first one that ends a text."""
    return tuple(itertools.takewhile(lambda token: token not in ends, row))


def _reference(form: Form, path: Path, base: ServedBase | None) -> Any:
    """Return a model that computes what a folder means."""
    if form == "onnx-generate":
        return load_onnx(path)
    if form == "gguf-model":
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    if base is None:
        return load_folder(path, dtype=torch.float32)
    model: Any = load_folder(base.folder, dtype=torch.float32)
    if form == "peft":
        return import_peft(path, model).merge()
    with torch.no_grad():
        for name, update in gguf_updates(path, base).items():
            model.get_parameter(name).add_(update)
    return model


def _greedy(model: Any, prompts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Return the most probable continuations, also after a token that ends the text."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(pad_token_id=0)  # type: ignore[no-untyped-call]
    rows = []
    for ids in prompts:
        row = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False, use_cache=True)
        rows.append(tuple(row[0, len(ids) :].tolist()))
    return rows


@contextmanager
def _as_engine_reads(engine: Engine, folder: Path, base: ServedBase | None) -> Iterator[Path]:
    """Give the base in the form that an engine reads: as it is, or as GGUF."""
    with tempfile.TemporaryDirectory(prefix="graftc-serve-") as work:
        if base is not None and "gguf-adapter" in engine.forms:
            package()
            file = Path(work) / "base.gguf"
            merged: Any = compile(_UNCHANGED, load_folder(folder, dtype=torch.float32)).merge(allow_unchanged=True)
            merged.export(file, "gguf", dtype="f32")
            yield file
        else:
            yield folder


def failure(error: GraftError) -> str:
    """Return why an engine did not answer, with the last lines that it printed."""
    return "; ".join([error.message, *map(str, error.details[-2:])])
