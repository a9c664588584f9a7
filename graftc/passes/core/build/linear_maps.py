"""The part of the `Builder` that changes linear maps."""

from __future__ import annotations

import torch
from torch import fx

from graftc.passes.core.build.operations import Operations
from graftc.passes.core.build.requantising import Requantising
from graftc.passes.core.build.requests import Change
from graftc.passes.core.ir.program import provenance
from graftc.passes.core.sites.sites import LinearSite, unsupported
from graftc.passes.core.sites.uses import Convolution, Dense

aten = torch.ops.aten
DROPOUTS = (torch.ops.graftc.masked_dropout.default, torch.ops.graftc.seeded_dropout.default)


class LinearMaps(Requantising, Operations):
    """Reads and changes linear maps' inputs and outputs, and applies other weights the way a map applies its own."""

    def input(self, site: LinearSite) -> fx.Node:
        """Return the site's input in the base's own layout, which `map` and `low_rank` accept.

        Changes made with `set_input` so far are not included: a site's adaptations add up in the order of insertion,
        so a later one does not see an earlier one's change to the input.
        """
        return self._read(self._input(site), "input", site)

    def _input(self, site: LinearSite) -> fx.Node:
        return self.program.edits.unchanged_input(site.use.input, str(site.key))

    def map(self, site: LinearSite, x: fx.Node, weight: fx.Node, part: str = "map") -> fx.Node:
        """Apply ``weight: [..., k, in]`` to ``x`` as the site applies its own weight, and return ``[..., k]``.

        Raises:
            GraftError: GC017 at a grouped convolution if ``weight`` is not for exactly the site's own rows, since a
                row's position determines which channels it reads.
        """
        if _has_rows(site, weight, 2):
            return self._product(x, weight, part)
        if not site.use.grouped:
            return site.use.map(self.call, x, weight, part)
        if weight.meta["val"].shape[-2] != site.out_features:
            raise unsupported(
                site, "is a grouped convolution, where only a weight for exactly its own rows can be applied"
            )
        return self._own_columns(site, site.use.map(self.call, x, self._every_row(site, weight), part))

    def low_rank(self, site: LinearSite, x: fx.Node, a: fx.Node, b: fx.Node, scale: float = 1) -> fx.Node:
        """Return ``scale * (b a) x`` for ``a: [..., rank, in]`` and ``b: [..., rows, rank]``, as ``[..., rows]``."""
        if _has_rows(site, a, 2) or _has_rows(site, b, 2):
            hidden = self._product(x, a, "down")
            if scale != 1:
                hidden = self.call(aten.mul.Tensor, hidden, scale, part="scale")
            return self._product(hidden, b, "up")
        if not site.use.grouped:
            return site.use.low_rank(self.call, x, a, b, scale)
        if isinstance(site.use, Convolution) and a.meta["val"].shape[-1] != site.in_features:
            return self._own_columns(site, site.use.across(self.call, x, a, self._every_row(site, b), scale))
        return self._own_columns(site, site.use.low_rank(self.call, x, a, self._every_row(site, b), scale))

    def _every_row(self, site: LinearSite, own: fx.Node) -> fx.Node:
        """Return a weight for all rows of a use: the site's own rows, and zeros for the others.

        All rows are needed because the groups are determined by them.
        """
        if site.columns.whole:
            return own
        shape = [site.columns.total, int(own.meta["val"].shape[-1])]
        zeros = self.call(aten.new_zeros.default, own, shape, part="all rows")
        return self._with_rows(site.columns, zeros, own, "all rows", 0)

    def _own_columns(self, site: LinearSite, result: fx.Node) -> fx.Node:
        return self._rows(site.columns, result, "own rows", -1)

    def per_row(self, site: LinearSite, value: fx.Node) -> fx.Node:
        """Return ``value: [..., rows]`` in a shape that broadcasts to `output`.

        The value has one entry for each of the site's own rows; expert axes come first.
        """
        if _has_rows(site, value, 1):
            return self.along(value, self.output(site))
        return site.use.per_row(self.call, site.use.input, value)

    def offset(self, site: LinearSite) -> fx.Node | None:
        """Return the bias that the base adds to ``W x`` at the site, broadcastable to `output`, or None."""
        addend = site.use.addend
        if addend is None:
            return self.bias(site)
        return site.use.columns_last(self.call, self._rows(site.columns, addend, "own rows", site.use.axis))

    def output(self, site: LinearSite) -> fx.Node:
        """Return the site's own rows of the current output, ``[..., rows]``."""
        return self._read(site.use.columns_last(self.call, self._own(site)), "output", site)

    def _own(self, site: LinearSite) -> fx.Node:
        """Return the site's own part of the output, in the base's layout."""
        return self._rows(site.columns, site.use.output, "own rows", site.use.axis)

    def set_output(self, site: LinearSite, own: fx.Node, part: str = "") -> None:
        """Replace the site's output with ``own`` (``[..., rows]``) for all of its readers."""
        change = Change("output", (own,), site.use.output)
        self._write(change, lambda node: self._put(site, site.use.columns_home(self.call, node), part))

    def _put(self, site: LinearSite, own: fx.Node, part: str = "") -> None:
        before, mine = site.use.output, str(site.key)
        after = self._with_rows(site.columns, before, own, part or "write rows", site.use.axis)
        self._redirect(before, after, lambda user: not _is_at(user, mine))
        site.use.output = after

    def add(self, site: LinearSite, delta: fx.Node, part: str = "add") -> None:
        """Add ``delta``, either ``[rows]`` or, like `output`, ``[..., rows]``, to the site's output."""
        self._write(Change("sum", (delta,), source=lambda: self.input(site)), lambda node: self._add(site, node, part))

    def _add(self, site: LinearSite, delta: fx.Node, part: str) -> None:
        if isinstance(site.use, Dense) or delta.meta["val"].dim() == 1:
            value = self.output(site)
            self.set_output(site, self.call(aten.add.Tensor, value, self.along(delta, value), part=part))
            return

        def put(node: fx.Node) -> None:
            node = site.use.columns_home(self.call, node)
            self._put(site, self.call(aten.add.Tensor, self._own(site), node, part=part))

        self._write(Change("output", (delta,), site.use.output), put)

    def set_input(self, site: LinearSite, node: fx.Node) -> None:
        """Replace the input of the site, and of everything inserted at it so far, with ``node``.

        The node must be computed from `input` and have the same layout.
        """
        self._write(Change("input", (node,), self._input(site)), lambda own: self._set_input(site, own))

    def _set_input(self, site: LinearSite, node: fx.Node) -> None:
        before, mine, whole = self._input(site), str(site.key), site.columns.whole
        shared = self._shared_dropouts(before, mine)
        for dropped in shared:
            again = self.call(dropped.target, node, *dropped.args[1:], part="dropout")
            self._redirect(dropped, again, lambda u: _is_at(u, mine), narrow=True)
        own = None if whole else self._own_map(site, node)
        own_reader = site.use.node if whole else None
        self._redirect(before, node, lambda u: u is own_reader or (_is_at(u, mine) and u not in shared), narrow=True)
        if own is not None:
            self._put_first(site, own)

    def _shared_dropouts(self, x: fx.Node, site: str) -> list[fx.Node]:
        """Return the inserted dropouts of ``x`` that a site shares with others.

        A dropout is shared if nodes of other sites also read it, or if it was inserted at another site.
        """
        drops = [u for u in x.users if u.target in DROPOUTS and provenance(u) is not None]
        return [u for u in drops if len({_is_at(reader, site) for reader in u.users}) > 1 or not _is_at(u, site)]

    def _own_map(self, site: LinearSite, x: fx.Node) -> fx.Node:
        """Apply the site's own rows of the base's map to ``x``, and return the result in the output's layout."""
        weight = self.weight(site)
        narrow = torch.finfo(weight.meta["val"].dtype).bits == 16
        plain = narrow and isinstance(site.use, Dense) and not _has_rows(site, weight, 2)
        if plain and (bias := self.bias(site)) is not None:
            # A separate addition would round a second time, unlike the base's own call.
            own = self.call(aten.linear.default, x, weight, bias, part="own rows")
            return site.use.columns_home(self.call, own)
        own, offset = self.map(site, x, weight, part="own rows"), self.offset(site)
        if offset is not None:
            own = self.call(aten.add.Tensor, own, offset, part="own rows")
        return site.use.columns_home(self.call, own)

    def _put_first(self, site: LinearSite, own: fx.Node) -> None:
        """Make ``own`` the site's part of the base's output, before everything inserted at the site."""
        use, before = site.use, site.use.node
        after = self._with_rows(site.columns, before, own, "write rows", use.axis)
        self._redirect(before, after, lambda user: True)
        use.output = after if use.output is before else use.output

    def scale_input(self, site: LinearSite, scale: fx.Node) -> None:
        """Multiply the input of the site, and of everything inserted at it so far, by ``scale: [entries]``.

        There is one entry per input feature, or one per channel of a convolution.

        Raises:
            GraftError: GC017 if no axis of the input corresponds to the weight's columns, as for embedding tables.
        """
        x, axis = self.input(site), site.use.scaled_axis
        if axis is None:
            reason = "looks up indices, so it has no input axis to scale"
            raise unsupported(site, reason, "scale its output, or leave it out with exclude")
        trailing = (x.meta["val"].dim() - axis if axis >= 0 else -axis) - 1
        if trailing:
            scale = self.call(aten.view.default, scale, [site.use.entries, *[1] * trailing], part="scale")
        else:
            scale = self.along(scale, x)
        self.set_input(site, self.call(aten.mul.Tensor, x, scale, part="scale"))

    def weight(self, site: LinearSite) -> fx.Node:
        """Return the site's own rows of the weight, ``[..., rows, in]``."""
        return site.own.read_operand(self.call, self._current(site.own.tensor), lambda: self._index(site.own))

    def bias(self, site: LinearSite) -> fx.Node | None:
        """Return the site's own rows of the bias, ``[rows]``, or None if it has no bias."""
        own = site.own_bias
        return None if own is None else self._rows(own, self._current(own.tensor), "bias rows")

    def is_overlaid(self, name: str) -> bool:
        """Return whether a base tensor, or some of its rows, has been replaced."""
        return self._current(name) is not self._attributes[name]

    def _current(self, name: str) -> fx.Node:
        """Return the node that now represents a base tensor: its overlay if it has one."""
        return self.program.current(self._attributes[name])


def _is_at(node: fx.Node, site: str) -> bool:
    """Return whether a node was inserted at a site."""
    return (provenance(node) or {}).get("site") == site


def _has_rows(site: LinearSite, tensor: fx.Node, axes: int) -> bool:
    """Return whether a tensor has a batch axis in addition to the expert axes and ``axes`` axes of its own."""
    return bool(tensor.meta["val"].dim() > axes + len(site.leading))
