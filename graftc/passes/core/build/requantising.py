"""The part of the `Builder` that lets an adaptation choose the codes of the packed weights that it is applied to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cache, partial

import torch
from torch import Tensor

from graftc.passes.core.build.initial import Correction
from graftc.passes.core.build.tensors import Tensors
from graftc.passes.core.ir.shapes import raw_bytes
from graftc.passes.core.sites.sites import LinearSite, unsupported
from graftc.passes.core.weights.tensor_edits import EditMode
from graftc.specs.errors.diagnostics import GraftError

SUBTRACTED = ("subtracted_down", "subtracted_up")
"""Parts that store the factors of the product that was subtracted before packing, in float32."""

ORIGINAL = "original_digest"
"""Part that stores the SHA-256 of the rows before packing, as ``uint8[32]``."""

REQUANTISED_PARTS = (*SUBTRACTED, ORIGINAL)


class Requantising(Tensors):
    """Packs base weights again, less a product of two factors that an adaptation adds back.

    The codes belong to the base: all other adaptations, and calls with the adaptation disabled, read the new ones. The
    adaptation stores the factors, so that the same codes follow from the original weights when it is loaded.
    """

    def quantisation_error(self, site: LinearSite) -> Tensor:
        """Return what quantising took from the site's own rows and no adaptation adds so far, for use in initialisers.

        Raises:
            GraftError: GC167 if the original weight is not available.
        """
        error = self.read_original(site) - self.read_weight(site)
        for other in self._corrections(site):
            rows = other.own.put_operand(torch.zeros(other.own.shape, dtype=other.up.dtype), other.up @ other.down)
            error = error - site.own.operand(rows.to(error.device, error.dtype))
        return error

    def correct(self, site: LinearSite, down: Tensor, up: Tensor) -> None:
        """Record that the adaptation starts with ``up @ down`` as its approximation of the quantisation error."""
        self.initial.corrections.append(Correction(self.adaptation, site.own, down.cpu(), up.cpu()))

    def _corrections(self, site: LinearSite) -> list[Correction]:
        tensor = site.own.tensor
        return [c for c in self.initial.corrections if c.own.tensor == tensor and c.own.overlaps(site.own)]

    def read_original(self, site: LinearSite) -> Tensor:
        """Return the values that the site's own rows had before the weight was quantised, for use in initialisers.

        Raises:
            GraftError: GC167 if the original weight is not available.
        """
        return site.own.operand(self._original(site))

    def _original(self, site: LinearSite) -> Tensor:
        original = self.initial.originals.get(site.own.tensor)
        if original is not None:
            return original
        if site.own.tensor in self.store.packed:
            message = f"the weight of {site.key} as it was before it was quantised is not available"
            hint = "compile the adaptation together with base: {quantize: nf4}, on a model in full precision"
        else:
            message = f"{site.key} is not quantised, so quantising took nothing from it"
            hint = "quantise it in the spec (base: {quantize: nf4}), leave it out with exclude, or choose another init"
        raise GraftError("GC167", message, hint=hint)

    def requantise(
        self, site: LinearSite, rank: int, choose: Callable[[], tuple[Tensor, Tensor]], otherwise: str
    ) -> None:
        """Pack the site's weight less the product of two factors; the compiled model's base has these codes.

        If the factors are among the supplied values, they are not chosen again. Nothing is packed if the base already
        has the codes that follow from them, or if it is no longer packed.

        Args:
            site: the site, whose own rows the product is subtracted from.
            rank: the inner size of the product.
            choose: a function that returns the factors, ``[..., rank, in]`` and ``[..., rows, rank]``.
            otherwise: what to do where codes cannot be chosen, for hints.

        Raises:
            GraftError: GC167 if the original weight is not available, GC087 if it is not the one for which the factors
                were chosen, GC021 if another adaptation has read, trained or packed the rows before, and GC017 if
                another module has the same weight, or if several adaptations are built at once.
        """
        self._check_alone(site, otherwise)
        choices = self.program.tensor_edits.at(site.own.tensor, (EditMode.REQUANTISED,))
        is_recorded = any(edit.owner == self.adaptation and edit.own == site.own for edit in choices)
        if site.own.tensor in self.store.packed and not is_recorded:  # a layer may be called several times
            self._edit_tensor(site.own, EditMode.REQUANTISED)
        is_new = self._name(ORIGINAL) not in self.store
        has_values = self.store.device().type != "meta"
        is_supplied = all(self._name(part) in self.initial.values for part in REQUANTISED_PARTS)

        @cache
        def values() -> Mapping[str, Tensor]:
            if is_supplied or not has_values:
                shapes = (*site.leading, rank, site.in_features), (*site.leading, site.out_features, rank)
                stored = [*map(torch.empty, shapes), torch.empty(32, dtype=torch.uint8)]
            else:
                self._require_uncorrected(site, otherwise)
                factors = (factor.float().contiguous() for factor in choose())
                stored = [*factors, _digest(self.read_original(site))]
            return dict(zip(REQUANTISED_PARTS, stored, strict=True))

        def value(part: str, device: torch.device) -> Tensor:
            return values()[part].to(device)

        for part in REQUANTISED_PARTS:
            self.store.settled.add(self.keep_buffer(part, partial(value, part)))
        if is_new and has_values and site.own.tensor in self.store.packed.keys() - self.initial.requantised:
            if is_supplied:
                self._require_original(site)
            self._pack_chosen(site)

    def _check_alone(self, site: LinearSite, otherwise: str) -> None:
        if self.seams.composed:
            raise unsupported(
                site, "has one base, so only one of several adaptations could choose its codes", otherwise
            )
        if site.own.tensor in self.store.aliases.values():
            reason = "shares its weight with another module, which would read the new codes without the adaptation"
            raise unsupported(site, reason, f"{otherwise}, or leave it out with exclude")

    def _require_uncorrected(self, site: LinearSite, otherwise: str) -> None:
        for other in self._corrections(site):
            message = f"{self.adaptation!r} would change the codes of {site.own} of {site.own.tensor}, from which "
            message += f"{other.owner!r} has already started"
            hint = f"put {self.adaptation!r} before {other.owner!r} in the spec, or {otherwise}"
            raise GraftError("GC021", message, hint=hint)

    def _require_original(self, site: LinearSite) -> None:
        if not torch.equal(self.own_value(ORIGINAL).cpu(), _digest(self.read_original(site))):
            message = f"{site.own.tensor} is not the weight from which the base's codes were chosen"
            raise GraftError("GC087", message, hint="name the base: graftc.load(path, model=...)")

    def _pack_chosen(self, site: LinearSite) -> None:
        """Pack the site's weight less the product of the factors stored for it."""
        down, up = (self.own_value(part) for part in SUBTRACTED)
        store, name, reduced = self.store, site.own.tensor, self._reduced(site, down, up)
        if not site.own.whole:
            self.initial.reduced[name] = reduced
        with torch.no_grad():
            parts = store.packed[name].packing.packed(reduced)
            for part, value in zip(store.parts_of(name), parts, strict=True):
                store.get(part).copy_(value)

    def packed_without(self, site: LinearSite, down: Tensor, up: Tensor) -> Tensor:
        """Return the values that the site's own rows would have if ``up @ down`` were subtracted before packing."""
        own, weight = self.store.packed[site.own.tensor], self._reduced(site, down, up)
        return site.own.operand(own.value(own.packing.packed(weight)))

    def _reduced(self, site: LinearSite, down: Tensor, up: Tensor) -> Tensor:
        """Return the original weight less all products that were subtracted so far, and less ``up @ down``.

        The product is computed in float64, so that the codes hardly ever depend on the processor.
        """
        name, original = site.own.tensor, self.read_original(site).double()
        reduced = self.initial.reduced.get(name, self._original(site))
        reduced = reduced.to(torch.promote_types(reduced.dtype, torch.float32))
        return site.own.put_operand(reduced, (original - up.double() @ down.double()).to(reduced.dtype))


def _digest(weight: Tensor) -> Tensor:
    """Return the SHA-256 of a tensor's values, ``uint8[32]``."""
    return torch.frombuffer(bytearray(hashlib.sha256(raw_bytes(weight.detach().cpu())).digest()), dtype=torch.uint8)
