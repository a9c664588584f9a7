"""Budgets for certificates, and the refusal of folds that change nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from graftc.records.certificate import Certificate
from graftc.specs.errors.diagnostics import GraftError, warn

DEFAULT_BUDGET: Mapping[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
"""Largest allowed difference between outputs, by dtype, relative to the largest output (or to 1 if that is larger)."""

HALF = 0.5
"""The fraction of an update's norm below which a merge warns."""

_WIDER = "dtype=torch.float32 (--dtype float32) keeps it"


def require_changed(certificate: Certificate, allow_unchanged: bool = False) -> None:
    """Refuse a fold that leaves every tensor equal to the base's, up to rounding, unless that is allowed.

    Warn (GC105) if rounding has lost more than half of the update.

    Raises:
        GraftError: GC104 with the reason.
    """
    retention, to, wider = certificate.retention, f"rounding to {certificate.dtype}", _WIDER
    if not certificate.sites:
        return
    if certificate.requantised:
        kinds = ", ".join(dict.fromkeys(item.packing.partition(" ")[0] for item in certificate.requantised))
        to, wider = f"packing as {kinds}", 'base="full" (--base full) keeps it'
    if (retention.unchanged or retention.is_noise) and not allow_unchanged:
        sites = len(dict.fromkeys(site.site for site in certificate.sites))
        where = "the only site" if sites == 1 else f"all {sites} sites"
        if retention.wanted and retention.unchanged:
            message, hints = f"at {where} the update is lost in {to}", [wider]
        else:
            what = f"no larger than {to}" if retention.wanted else "zero"
            message = f"the update is {what} at {where}"
            hints = ["train first, or load the trained tensors, and check alpha"]
            hints += [wider] if retention.wanted and certificate.dtype not in ("float32", "float64") else []
        anyway = "allow_unchanged=True (--allow-unchanged) merges anyway"
        raise GraftError("GC104", f"the merge changes nothing: {message}", hint="; ".join([*hints, anyway]))
    if retention.norm < HALF and not retention.unchanged:
        message = f"{to} leaves {retention.norm:.1%} of the update"
        warn("GC105", message, hint=wider)
