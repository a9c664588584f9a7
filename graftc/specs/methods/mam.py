"""MAM adapters: a prefix at every attention and an adapter parallel to every feed-forward part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.base import MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.methods.bases.composed import AdapterPart, PartsSpec, PrefixPart
from graftc.specs.methods.he_parallel import HeParallel
from graftc.specs.methods.prefix import Prefix, Reparameterization
from graftc.specs.target import Target


class MAMPrefix(PrefixPart):
    """The prefix of MAM adapters."""

    length: int = Field(default=30, ge=1, le=SIZE)
    """Number of positions in the prefix."""

    reparameterization: Reparameterization | None = Reparameterization(hidden=800)
    """The network that produces the keys and values during training; `null` trains them directly."""


class MAMAdapter(AdapterPart):
    """The parallel adapters of MAM adapters, wired as `he_parallel`; if no width is given, their bottleneck is 512."""

    scale: float | Literal["learned"] = 4.0
    """Factor applied to the result; `learned`: a trainable scalar, initialised to 1."""


class MAM(PartsSpec):
    """MAM adapters: a prefix in front of every attention's keys, and a parallel adapter at every feed-forward part.

    Both work as in `prefix` and `he_parallel`, without gates: attention is changed with a small bottleneck, the
    feed-forward part has a wide parallel one. The adapters initially change nothing; the prefix does.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.ATTENTION, SiteKind.SUBLAYER}), identity_at_init=False, folds=FoldKind.NONE
    )
    paper: ClassVar[str] = "He et al. 2022, Towards a Unified View of Parameter-Efficient Transfer Learning"
    roles: ClassVar[Mapping[str, tuple[str, ...]]] = {"prefix": ("attn",), "adapter": ("ffn.sublayer",)}

    method: Literal["mam"] = "mam"
    """The method's tag."""

    target: Target = Target(role=["attn", "ffn.sublayer"])
    """The sites of the model to adapt; by default every attention, and the feed-forward part of every layer."""

    prefix: MAMPrefix = MAMPrefix()
    """The keys and values prepended to those of every attention."""

    adapter: MAMAdapter = MAMAdapter()
    """The adapters parallel to the feed-forward parts."""

    def part_specs(self) -> Mapping[SiteKind, MethodSpec]:
        """Return a prefix for attentions and a parallel adapter for sublayers."""
        adapter = HeParallel(**self.adapter.fields({"bottleneck": 512}))
        return {SiteKind.ATTENTION: Prefix(**self.prefix.fields()), SiteKind.SUBLAYER: adapter}
