"""The vocabulary of roles: the functions of sites in the architecture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations

from graftc.specs.claims import SiteKind
from graftc.specs.errors.diagnostics import GraftError, Place, nearest
from graftc.specs.errors.text import quoted

PREFIXES: tuple[str, ...] = ("encoder", "decoder", "cross")
"""The prefixes that a role may have: a stack (``encoder``, ``decoder``), then ``cross`` for cross-attention."""

_STACKS = ("encoder", "decoder")


@dataclass(frozen=True)
class RoleInfo:
    """One role: its name, the kind of site it names, and its meaning."""

    name: str
    kind: SiteKind
    meaning: str


_L, _S, _V = SiteKind.LINEAR, SiteKind.SUBLAYER, SiteKind.VALUE

ROLES: dict[str, RoleInfo] = {
    name: RoleInfo(name, kind, meaning)
    for name, kind, meaning in (
        ("embed", SiteKind.EMBEDDING, "the table of token embeddings"),
        ("embed.position", SiteKind.EMBEDDING, "the table of learned position embeddings"),
        ("head", _L, "the output projection or classifier"),
        ("norm", SiteKind.NORM, "normalisation scales and shifts"),
        ("attn", SiteKind.ATTENTION, "the attention node"),
        ("attn.q", _L, "the query projection"),
        ("attn.k", _L, "the key projection"),
        ("attn.v", _L, "the value projection"),
        ("attn.o", _L, "the output projection of an attention"),
        ("ffn.up", _L, "the feed-forward projection to the inner width"),
        ("ffn.gate", _L, "the gate of a gated feed-forward"),
        ("ffn.down", _L, "the feed-forward projection back to the model width"),
        ("experts", SiteKind.EXPERTS, "mixture-of-experts weights, a 3-D parameter"),
        ("attn.sublayer", _S, "an attention with its residual add"),
        ("ffn.sublayer", _S, "a feed-forward with its residual add"),
        ("router", _L, "the projection that chooses experts"),
        ("mixer", _L, "projections of a linear attention or state-space layer"),
        ("lowrank.q", _L, "the low-rank stage of the queries"),
        ("lowrank.kv", _L, "the low-rank stage of keys and values"),
        ("head.transform", _L, "the transform before a masked-language-model head"),
        ("layer.in", _V, "the input of a layer"),
        ("layer.out", _V, "the output of a layer, after its last residual add and norm"),
        ("embed.token", _V, "the token embeddings, before positions and norm are added; of two stacks, the encoder's"),
        ("embed.out", _V, "the output of the embeddings: sum, norm and dropout"),
        ("attn.kv", _V, "keys and values, heads split"),
        ("attn.probs", _V, "the attention probabilities"),
        ("ffn.mid", _V, "the inner activation of a feed-forward"),
    )
}
"""Every role by name."""


@dataclass(frozen=True)
class Role:
    """A role as written: its prefixes in order, and its name, a key of :data:`ROLES`."""

    prefixes: tuple[str, ...]
    name: str

    def __str__(self) -> str:
        return ".".join((*self.prefixes, self.name))

    @property
    def info(self) -> RoleInfo:
        """The entry of :data:`ROLES`."""
        return ROLES[self.name]


@cache
def _spellings() -> tuple[str, ...]:
    stems = [(), *((s,) for s in _STACKS), ("cross",), *((s, "cross") for s in _STACKS)]
    names = [".".join((*stem, name)) for stem in stems for name in ROLES if "cross" not in stem or "attn" in name]
    return tuple(names)


def parse_role(text: str, place: Place | None = None) -> Role:
    """Split ``decoder.cross.attn.k`` into prefixes and name.

    Raises:
        GraftError: GC012 with the nearest roles, if the text is not a role.
    """
    parts = text.split(".")
    prefixes: list[str] = []
    if parts and parts[0] in _STACKS:
        prefixes.append(parts.pop(0))
    if parts and parts[0] == "cross":
        prefixes.append(parts.pop(0))
    name = ".".join(parts)
    if name in ROLES:
        return Role(tuple(prefixes), name)
    if any(mark in text for mark in "*?["):
        hint = "roles have no wildcards; list them, for example attn.{q,k,v,o}"
        raise GraftError("GC012", f"role {quoted(text)} is unknown", place=place, hint=hint)
    reordered = ".".join(sorted(text.split("."), key=lambda part: (*PREFIXES, part).index(part)))
    if reordered in _spellings():
        close = [reordered]
    else:
        close = (nearest(text, ROLES) if not prefixes else []) or nearest(text, _spellings())
    raise GraftError(
        "GC012",
        f"role {quoted(text)} is unknown",
        place=place,
        hint=_did_you_mean(close) or "the roles are: " + ", ".join(ROLES),
        fix=(text, close[0]) if close else None,
    )


def _did_you_mean(close: list[str]) -> str | None:
    return f"did you mean {' or '.join(quoted(c) for c in close)}?" if close else None


def widen(role: str) -> frozenset[str]:
    """Return every spelling that matches a site with this full role: the role with each subset of its prefixes.

    ``decoder.cross.attn.k`` matches ``attn.k``, ``cross.attn.k``, ``decoder.attn.k`` and itself.

    Raises:
        GraftError: GC012 if the text is not a role.
    """
    parsed = parse_role(role)
    stems = [c for n in range(len(parsed.prefixes) + 1) for c in combinations(parsed.prefixes, n)]
    return frozenset(".".join((*stem, parsed.name)) for stem in stems)
