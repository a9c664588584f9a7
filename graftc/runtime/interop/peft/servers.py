"""What servers take of PEFT's folders, as data, and the check of one before it is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from graftc.specs.errors.diagnostics import GraftError, Place, alternatives
from graftc.specs.errors.text import shown, some

__all__ = ["SERVERS", "Server", "require_served", "server_of"]

_CONVERT = "graftc convert makes a LoRA of it"
_MERGE = "merge it: graftc merge"
_UNIFORM = "graftc convert --to {server} gives all maps one rank and one scale"
_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


@dataclass(frozen=True)
class Server:
    """The limits of one server.

    Attributes:
        name: what the command line calls it.
        read: from which version of which files they were read.
        ranks: the values that its largest rank may have; empty where any will do.
        refused: fields of the config that have to be off, with the way out.
        option: how it is told the largest rank.
    """

    name: str
    read: str
    ranks: tuple[int, ...]
    refused: Mapping[str, str]
    option: str

    def rank_for(self, rank: int) -> int | None:
        """The smallest largest rank that holds adapters of a rank; None where none does."""
        return rank if not self.ranks else min((r for r in self.ranks if r >= rank), default=None)


_COMMON: Mapping[str, str] = MappingProxyType(
    {
        "use_dora": _CONVERT,
        "modules_to_save": f"fold it into the base (graftc convert --into-base trained), or {_MERGE}",
        "trainable_token_indices": _MERGE,
        "target_parameters": "graftc convert --to {server} lays out the experts as it reads them",
        "rank_pattern": _UNIFORM,
        "alpha_pattern": _UNIFORM,
        "layer_replication": _MERGE,
        "lora_bias": _MERGE,
        "bias": f"fold the biases into the base, or {_MERGE}",
    }
)

SERVERS: Mapping[str, Server] = MappingProxyType(
    {
        "vllm": Server(
            "vllm",
            "vLLM 0.27.1: config/lora.py, lora/peft_helper.py, lora/lora_model.py",
            (1, 8, 16, 32, 64, 128, 256, 320, 512),
            _COMMON,
            "--max-lora-rank",
        ),
        "sglang": Server("sglang", "SGLang 0ceb81f: srt/lora/lora_config.py, lora.py", (), _COMMON, "--max-lora-rank"),
    }
)
"""Every server by its name."""


def server_of(name: str) -> Server:
    """A server by its name.

    Raises:
        GraftError: GC068 for a name that is none.
    """
    found = SERVERS.get(name)
    if found is None:
        hint = alternatives(name, SERVERS, "servers")
        raise GraftError("GC068", f"no limits are known of a server {name!r}", hint=hint)
    return found


def require_served(
    server: Server,
    config: Mapping[str, Any],
    keys: Iterable[str],
    *,
    max_rank: int | None = None,
) -> int:
    """Refuse what a server would refuse, or compute otherwise.

    Args:
        server: which.
        config: what ``adapter_config.json`` holds.
        keys: of the tensors.
        max_rank: what the server was started with; by default its largest.

    Returns:
        The value of the server's option for the largest rank.

    Raises:
        GraftError: GC068 with every field that is in the way, and the way out.
    """
    problems = list(_problems(server, config, list(keys)))
    rank = int(config.get("r") or 0)
    needed = server.rank_for(rank)
    limit = max_rank if max_rank is not None else max(server.ranks, default=rank)
    if max_rank is not None and server.ranks and max_rank not in server.ranks:
        problems.append(f"{server.option} {max_rank} is none of {', '.join(map(str, server.ranks))}")
    elif needed is None or rank > limit:
        problems.append(f"r is {rank}, the largest rank is {limit}: graftc convert --rank {limit} lowers it")
    if problems:
        message = f"{server.name} does not take the adapter: {problems[0]}"
        raise GraftError("GC068", message, place=Place("adapter_config.json"), details=tuple(problems[1:]))
    assert needed is not None
    return needed


def _problems(server: Server, config: Mapping[str, Any], keys: list[str]) -> Iterable[str]:
    kind = config.get("peft_type")
    if kind != "LORA":
        yield f"peft_type is {shown(kind)}: {_CONVERT}"
        return
    if config.get("task_type") in _HEADS:
        yield f"task_type is {shown(config['task_type'])}, whose head is not served with an adapter: {_MERGE}"
    for field, way in server.refused.items():
        value = config.get(field)
        if value and value != "none":
            yield f"{field} is {shown(value)}: {way.format(server=server.name)}"
    whole = [key for key in keys if ".lora_" not in key]
    if whole and not config.get("modules_to_save"):
        yield f"{some(whole, 3)} are tensors of the base: {_MERGE}"
