"""The Builder, the only class that changes a graph.

It inserts nodes where their arguments are available, creates tensors with an initialiser, keeps ``meta["val"]``
correct, tags every node with its provenance, and records each replacement so that folding can undo it. Each of its
base classes covers one subject; the operations that compositions intercept are its `Seams`.
"""

from __future__ import annotations

from graftc.passes.core.build.attention import Attentions
from graftc.passes.core.build.initial import Initialiser
from graftc.passes.core.build.linear_maps import LinearMaps
from graftc.passes.core.build.nodes import Seams
from graftc.passes.core.build.operations import DropoutScope
from graftc.passes.core.sites.sites import Site

__all__ = ["Builder", "DropoutScope", "Initialiser"]


class Builder(LinearMaps, Attentions):
    """Inserts one adaptation into one Program; see `Nodes` for the arguments."""

    def within(self, seams: Seams, adaptation: str, method: str) -> Builder:
        """Return a builder for an adaptation that this builder's adaptation composes.

        If both adaptations have the same name, both builders record tensors in the same ``parts``.
        """
        builder = Builder(self.program, self.store, adaptation, method, self.initial, seams=seams, within=self)
        builder.find_places = self.find_places
        if adaptation == self.adaptation:
            builder.parts = self.parts
        return builder

    @property
    def composed(self) -> bool:
        """Whether several adaptations are built at once."""
        return self.seams.composed

    @property
    def site(self) -> Site:
        """The current site, to which new nodes belong."""
        assert self._site is not None
        return self._site

    @property
    def without_values(self) -> bool:
        """Whether the base is on the meta device, where tensors have shapes but no values."""
        return self.store.device().type == "meta"
