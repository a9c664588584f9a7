"""The part of the `Builder` that fills in virtual tokens."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graftc.passes.core.build.base_activations import computed
from graftc.passes.core.build.masks import END
from graftc.passes.core.build.nodes import size_of
from graftc.passes.core.build.requests import Change
from graftc.passes.core.build.residual import Branches
from graftc.passes.core.build.tensors import Tensors
from graftc.passes.core.ir.program import VirtualTokens, above
from graftc.passes.core.ir.shapes import expression
from graftc.passes.core.sites.sites import ValueSite
from graftc.specs.errors.diagnostics import GraftError

aten = torch.ops.aten


class Virtual(Tensors, Branches):
    """Fills in virtual tokens, both at the embedding and at any layer."""

    def virtual(self, site: ValueSite) -> VirtualTokens:
        """Return the adaptation's virtual tokens in a site's sequence."""
        return next(v for v in self.program.virtual if v.owner == self.adaptation and site.key in v.sites)

    def fill(self, site: ValueSite, run: int, vectors: fx.Node, part: str = "tokens") -> None:
        """Use ``vectors: [length, width]``, or ``[batch, length, width]``, as the token embeddings of a run."""
        rows = self.virtual(site).rows[run]
        change = Change("tokens", (self._for_rows(vectors, rows, part),), rows)
        self._write(change, lambda own: self._redirect(rows, own, lambda user: True))

    def hold(self, site: ValueSite, run: int, vectors: fx.Node, part: str = "tokens") -> None:
        """Replace a run's values at a layer with ``vectors: [length, width]``, or ``[batch, length, width]``."""
        value, start = self.value(site), self.virtual(site).starts[run]
        expanded = self._for_rows(vectors, value, part)
        length = int(expanded.meta["val"].shape[1])
        if isinstance(start, fx.Node):
            index = self.call(aten.add.Tensor, start, self.numbers(f"offsets_{run}", torch.arange(length)), part=part)
            width = int(value.meta["val"].shape[-1])
            index = self.call(aten.expand.default, self.call(aten.unsqueeze.default, index, -1), [-1, -1, width])
            self.set_value(site, self.call(aten.scatter.src, value, 1, index, expanded, part=part))
            return
        pieces = [expanded, self.call(aten.slice.Tensor, value, 1, start + length, END, part=part)]
        if start:
            pieces.insert(0, self.call(aten.slice.Tensor, value, 1, 0, start, part=part))
        self.set_value(site, self.call(aten.cat.default, pieces, 1, part=part))

    def _for_rows(self, vectors: fx.Node, like: fx.Node, part: str) -> fx.Node:
        """Expand ``[length, width]``, or ``[1, length, width]``, to every row of ``like``."""
        value, rows = vectors.meta["val"], like.meta["val"].shape[0]
        if value.dim() == 3 and (expression(value.shape[0]) != 1 or expression(rows) == 1):
            return vectors
        sizes = [size_of(self, like, 0), -1, -1]
        if value.dim() == 2:
            vectors = self.call(aten.unsqueeze.default, vectors, 0, part=part)
        return self.call(aten.expand.default, vectors, sizes)

    def vocabulary(self, site: ValueSite) -> int:
        """Return the number of tokens in the vocabulary.

        Raises:
            GraftError: GC019 if tokens are not looked up in a table.
        """
        tables = [n.args[0] for n in above([site.node]) if n.target is aten.embedding.default]
        sizes = [int(t.meta["val"].shape[0]) for t in tables if isinstance(t, fx.Node)]
        if not sizes:
            raise GraftError("GC019", f"the embeddings at {site.key} are not looked up in a table")
        return min(sizes)

    def embedded(self, site: ValueSite, ids: Tensor) -> Tensor:
        """Return the model's token embeddings of ``ids: int64[n]``, ``[n, width]`` in float32 on the CPU."""
        given = ids[None].to(self._device())
        return computed([site.node], lambda node: given, self.store.get, given.device)[0][0].float().cpu()
