"""Servers' limits for PEFT folders, as data, and a check of a folder before it is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from graftc.specs.errors.diagnostics import GraftError, Place, alternatives
from graftc.specs.errors.text import shown, some

_CONVERT = "graftc convert turns it into a LoRA"
_MERGE = "merge it: graftc merge"
_UNIFORM = "graftc convert --to {layout} gives all maps one rank and one scale"
_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


@dataclass(frozen=True)
class Server:
    """One server's limits.

    Attributes:
        name: name of the server on the command line.
        read: version of the server from whose source the limits were taken.
        ranks: allowed values of the maximum rank; empty if there is no restriction.
        refused: config fields that must be off, each with a remedy.
        option: the option that sets the maximum rank; None if there is none.
        layout: the layout of ``graftc convert`` that the server reads.
        saved: names of the heads that the server accepts along with an adapter (``modules_to_save``).
    """

    name: str
    read: str
    ranks: tuple[int, ...]
    refused: Mapping[str, str]
    option: str | None
    layout: str
    saved: tuple[str, ...] = ()

    def rank_for(self, rank: int) -> int | None:
        """Return the smallest allowed maximum rank that covers an adapter's rank; None if none does."""
        return rank if not self.ranks else min((r for r in self.ranks if r >= rank), default=None)


_UNEVEN: Mapping[str, str] = MappingProxyType({"rank_pattern": _UNIFORM, "alpha_pattern": _UNIFORM})
_PLAIN: Mapping[str, str] = MappingProxyType(
    {"use_rslora": "export the artifact for the server (--for {server}), which writes the scale as alpha / rank"}
)
_COMMON: Mapping[str, str] = MappingProxyType(
    {
        "use_dora": _CONVERT,
        "modules_to_save": f"fold it into the base (graftc convert --into-base trained), or {_MERGE}",
        "trainable_token_indices": _MERGE,
        "target_parameters": "graftc convert --to {layout} lays out the experts as it reads them",
        "layer_replication": _MERGE,
        "lora_bias": _MERGE,
        "bias": f"fold the biases into the base, or {_MERGE}",
    }
)

SERVERS: Mapping[str, Server] = MappingProxyType(
    {
        "vllm": Server(
            "vllm",
            "vLLM 0.32",
            (1, 8, 16, 32, 64, 128, 256, 320, 512),
            _COMMON,
            "--max-lora-rank",
            "vllm",
            ("classifier", "score"),
        ),
        "sglang": Server("sglang", "SGLang 0ceb81f", (), {**_COMMON, **_UNEVEN, **_PLAIN}, "--max-lora-rank", "sglang"),
        "mistralrs": Server("mistralrs", "mistral.rs 0.9.5", (), {**_COMMON, **_UNEVEN}, None, "vllm"),
    }
)
"""All servers, by name. Anything that a server is not known to read correctly is refused."""

_OF_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base unchanged; others are relative to a modified base, which no server has."""

_PREFIX = "base_model.model."
"""Tensors whose names lack this prefix are loaded but have no effect."""


def server_of(name: str) -> Server:
    """Return the server with a given name.

    Raises:
        GraftError: GC068 for an unknown server.
    """
    server = SERVERS.get(name)
    if server is None:
        hint = alternatives(name, SERVERS, "servers")
        raise GraftError("GC068", f"the limits of a server {name!r} are not known", hint=hint)
    return server


def require_served(
    server: Server,
    config: Mapping[str, Any],
    keys: Iterable[str],
    *,
    max_rank: int | None = None,
) -> int:
    """Raise if a server would reject an adapter or compute something else with it.

    Args:
        server: the server.
        config: the contents of ``adapter_config.json``.
        keys: keys of the tensors.
        max_rank: the maximum rank with which the server was started; by default, the largest that it supports.

    Returns:
        The value of the server's option for the maximum rank.

    Raises:
        GraftError: GC068, which lists every problem with its remedy.
    """
    problems = list(_problems(server, config, list(keys)))
    rank = int(config.get("r") or 0)
    rank = max([rank, *(value for value in (config.get("rank_pattern") or {}).values() if isinstance(value, int))])
    needed = server.rank_for(rank)
    limit = max_rank if max_rank is not None else max(server.ranks, default=rank)
    if max_rank is not None and server.ranks and max_rank not in server.ranks:
        problems.append(
            f"{server.option or 'the largest rank'} {max_rank} is not one of {', '.join(map(str, server.ranks))}"
        )
    elif needed is None or rank > limit:
        problems.append(f"r is {rank}, but the largest rank is {limit}: graftc convert --rank {limit} lowers it")
    if problems:
        message = f"{server.name} does not accept the adapter: {problems[0]}"
        raise GraftError("GC068", message, place=Place("adapter_config.json"), details=tuple(problems[1:]))
    assert needed is not None
    return needed


def _problems(server: Server, config: Mapping[str, Any], keys: list[str]) -> Iterable[str]:
    kind = config.get("peft_type")
    if kind != "LORA":
        yield f"peft_type is {shown(kind)}: {_CONVERT}"
        return
    saved = [str(name) for name in config.get("modules_to_save") or ()]
    served = bool(saved) and all(name.rpartition(".")[2] in server.saved for name in saved)
    if config.get("task_type") in _HEADS and not served:
        yield f"task_type is {shown(config['task_type'])}, whose head is not served with an adapter: {_MERGE}"
    for field, way in server.refused.items():
        value = config.get(field)
        if value and value != "none" and not (field == "modules_to_save" and served):
            yield f"{field} is {shown(value)}: {way.format(server=server.name, layout=server.layout)}"
    start = config.get("init_lora_weights")
    if start not in _OF_THE_BASE:
        yield f"init_lora_weights is {shown(start)}, which changes the base that the factors are for: {_CONVERT}"
    lost = [key for key in keys if not key.startswith(_PREFIX)]
    if lost:
        yield f"{some(lost, 3)} do not begin with {_PREFIX!r}, and would have no effect: {_CONVERT}"
    whole = [key for key in keys if ".lora_" not in key and key not in lost]
    if whole and not saved:
        yield f"{some(whole, 3)} are tensors of the base: {_MERGE}"
