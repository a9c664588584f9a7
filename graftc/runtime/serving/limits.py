"""Check a PEFT folder's config and names against the table of engines, without the base."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from typing import Any, Literal

from graftc.records.serving.certificates import ServingProblem
from graftc.runtime.serving.engines import INERT, OF_THE_BASE, Engine, Treatment
from graftc.specs.claims import FoldKind
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.errors.text import shown, some
from graftc.specs.foreign.config import formats

PREFIX = "base_model.model."
"""Tensors whose names lack this prefix are not PEFT's, and most engines load them without any effect."""

_CONVERT = "graftc convert turns it into a LoRA"
_GRAPH = "graftc import-peft, and graftc export --no-merge --format onnx-generate for ONNX Runtime GenAI"
_MERGE = "merge it: graftc merge"
_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")

Kind = Literal["refused", "ignored", "wrong", "unverified"]
KINDS: Mapping[Treatment, Kind] = {"refused": "refused", "ignored": "ignored", "unverified": "unverified"}


def require_served(
    engine: Engine,
    config: Mapping[str, Any],
    keys: Iterable[str],
    *,
    max_rank: int | None = None,
) -> int:
    """Raise if an engine would reject an adapter or compute something else with it.

    Args:
        engine: the engine.
        config: the contents of ``adapter_config.json``.
        keys: keys of the tensors.
        max_rank: the maximum rank with which the engine was started; by default, the largest that it supports.

    Returns:
        The value of the engine's option for the maximum rank.

    Raises:
        GraftError: GC068, which lists every problem with its remedy.
    """
    problems = [str(problem) for problem in limit_problems(engine, config, list(keys), max_rank)]
    if problems:
        message = f"{engine.name} does not accept the adapter: {problems[0]}"
        raise GraftError("GC068", message, place=Place("adapter_config.json"), details=tuple(problems[1:]))
    needed = engine.rank_for(largest_rank(config))
    assert needed is not None
    return needed


def largest_rank(config: Mapping[str, Any]) -> int:
    """Return the largest rank that a LoRA's config defines; 0 if it defines none, or is another method's."""
    if config.get("peft_type") != "LORA":
        return 0
    patterns = (config.get("rank_pattern") or {}).values()
    return int(max(config.get("r") or 0, *patterns, 0))


def limit_problems(
    engine: Engine, config: Mapping[str, Any], keys: list[str], max_rank: int | None = None
) -> Iterator[ServingProblem]:
    """Yield the problems that follow from a config and the names of tensors."""
    kind = config.get("peft_type")
    if kind != "LORA":
        folds = any(own.claims.folds is not FoldKind.NONE for own, _ in formats().get(str(kind), ()))
        yield ServingProblem("refused", "peft_type", f"peft_type is {shown(kind)}", _CONVERT if folds else _GRAPH)
    else:
        yield from _field_problems(engine, config)
        yield from _name_problems(engine, config, keys)
    yield from _rank_problems(engine, largest_rank(config), max_rank)


def _field_problems(engine: Engine, config: Mapping[str, Any]) -> Iterator[ServingProblem]:
    served = heads_served(engine, config)
    task = config.get("task_type")
    if task in _HEADS and not served:
        reason = f"task_type is {shown(task)}, whose head is not served with an adapter"
        yield ServingProblem("ignored", "task_type", reason, _MERGE)
    for field, fact in engine.refused.items():
        value = config.get(field)
        if value and value != "none" and not (field == "modules_to_save" and served):
            remedy = fact.remedy.format(engine=engine.name, layout=engine.layout)
            yield ServingProblem(KINDS[fact.treatment], field, f"{field} is {shown(value)}", remedy)
    if config.get("target_modules") is None and not config.get("target_parameters"):
        reason = "target_modules is null or missing"
        yield ServingProblem("refused", "target_modules", reason, "list the modules that have factors")
    if engine.lists and isinstance(targets := config.get("target_modules"), str) and targets != "all-linear":
        reason = f"target_modules is the regular expression {shown(targets)}"
        yield ServingProblem("refused", "target_modules", reason, f"list the modules: {_CONVERT}")
    for field in ("r", "lora_alpha"):
        if config.get(field) is None:
            yield ServingProblem("refused", field, f"{field} is null", "set it to a number")
    start = config.get("init_lora_weights")
    if start not in OF_THE_BASE:
        reason = f"init_lora_weights is {shown(start)}, which changes the base that the factors are for"
        loaded = isinstance(start, str) and start.lower().startswith(engine.initialisers or ("\0",))
        yield ServingProblem("ignored" if loaded else "refused", "init_lora_weights", reason, _CONVERT)
    for field in sorted(name for name, value in config.items() if value and name not in {*INERT, *engine.fields}):
        reason = f"{field} is {shown(config[field])}, which is not known to have no effect"
        yield ServingProblem("unverified", field, reason, "remove the field if it has none")


def heads_served(engine: Engine, config: Mapping[str, Any]) -> bool:
    """Return whether an adapter brings heads, all of which the engine accepts."""
    saved = [str(name) for name in config.get("modules_to_save") or ()]
    return bool(saved) and all(name.rpartition(".")[2] in engine.saved for name in saved)


def _name_problems(engine: Engine, config: Mapping[str, Any], keys: list[str]) -> Iterator[ServingProblem]:
    lost = [key for key in keys if not key.startswith(PREFIX)]
    if lost:
        reason = f"{some(lost, 3)} do not begin with {PREFIX!r}, and would have no effect"
        yield ServingProblem("ignored", lost[0], reason, _CONVERT)
    whole = [key for key in keys if ".lora_" not in key and key not in lost and not key.endswith(COPIES)]
    if whole and not config.get("modules_to_save"):
        kind: Kind = "ignored" if engine.strays == "ignored" else "refused"
        yield ServingProblem(kind, whole[0], f"{some(whole, 3)} are tensors of the base", _MERGE)


COPIES = ("embed_tokens.base_layer.weight", "lm_head.base_layer.weight")
"""The names under which PEFT saves an adapted table along with its factors; engines use the base's own instead."""


def _rank_problems(engine: Engine, rank: int, max_rank: int | None) -> Iterator[ServingProblem]:
    needed = engine.rank_for(rank)
    limit = max_rank if max_rank is not None else max(engine.ranks, default=rank)
    option = engine.option or "the largest rank"
    if max_rank is not None and engine.ranks and max_rank not in engine.ranks:
        reason = f"{option} {max_rank} is not one of {', '.join(map(str, engine.ranks))}"
        yield ServingProblem("refused", "r", reason, "")
    elif needed is None or rank > limit:
        reason = f"r is {rank}, but the largest rank is {limit}"
        yield ServingProblem("refused", "r", reason, f"graftc convert --rank {limit} lowers it")


def gguf_problems(
    engine: Engine, arch: object, types: Collection[str], names: Container[str]
) -> Iterator[ServingProblem]:
    """Yield the reasons why an engine does not load a whole model in GGUF, or computes something else with it.

    Args:
        engine: the engine.
        arch: the file's architecture.
        types: the names of the types of its matrices, such as ``F16``.
        names: the names of its tensors.
    """
    if engine.architectures and arch not in engine.architectures:
        reason = f"general.architecture is {shown(arch)}; {engine.title} reads {', '.join(engine.architectures)}"
        yield ServingProblem("refused", "general.architecture", reason, "export another format: graftc export")
    odd = sorted(set(types) - set(engine.file_types)) if engine.file_types else []
    if odd:
        wanted = engine.file_types[0].lower()
        reason = f"the matrices are {some(odd)}, but {engine.title} needs {wanted}"
        remedy = f"write them as {wanted}: graftc export --format gguf --for {engine.name}"
        yield ServingProblem("refused", "general.file_type", reason, remedy)
    for name in engine.unread:
        if name in names:
            reason = f"{engine.title} ignores {name}, the factors of the rotation's frequencies"
            yield ServingProblem("ignored", name, reason, "use llama.cpp for this model")
