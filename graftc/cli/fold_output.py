"""Print the results of commands that fold and write: certificates, unfolded adaptations, and files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from graftc.records.certificate import Certificate, routed
from graftc.records.files import PeftTensor, WrittenFile
from graftc.specs.errors.text import counted

if TYPE_CHECKING:
    from rich.console import Console


def print_certificate(certificate: Certificate | None, kept: Mapping[str, str], to: Console) -> None:
    """Print a certificate's summary and evidence, and the adaptations that do not fold."""
    lines: list[str] = []
    if certificate is not None:
        weights, averaged = (*_requantised(certificate), *_retained(certificate)), _averaged(certificate)
        lines.append(f"{'certificate:':<22}{certificate.summary}")
        lines += [f"{'':<22}{failure}" for failure in certificate.failures()]
        lines += weights
        lines += [f"{'routes:':<22}{line}" for line in routed(certificate.routes)]
        lines += [f"{'averaged:':<22}{name}, {e:.1e} from the mean of all routes" for name, e in averaged.items()]
    lines += [f"{'does not fold:':<22}{name}: {reason}" for name, reason in kept.items()]
    for line in lines:
        to.print(line, soft_wrap=True, markup=False)


def _requantised(certificate: Certificate) -> Iterator[str]:
    """Yield a line about the error that repacking folded weights causes."""
    weights = {item.tensor: item for item in certificate.requantised}
    if not weights:
        return
    kinds = ", ".join(dict.fromkeys(item.packing.partition(" ")[0] for item in weights.values()))
    worst = max(certificate.requantised, key=lambda item: item.error)
    count = "1 weight" if len(weights) == 1 else f"{len(weights)} weights"
    rows, disturbed = (sum(getattr(item, name) for item in weights.values()) for name in ("rows", "disturbed"))
    yield (
        f"{'requantised:':<22}{count} ({kinds}), not exact: error at most {_percent(worst.error)} at {worst.site}, "
        f"{disturbed} of {rows} untouched rows changed"
    )


def _retained(certificate: Certificate) -> Iterator[str]:
    """Yield lines about the share of the update that survived rounding, its minimum, and the unchanged sites."""
    retention = certificate.retention
    if not retention.wanted:
        return
    yield (
        f"{'retention:':<22}{_percent(retention.norm)} of the update in {certificate.dtype}, "
        f"{_percent(retention.entries)} of its entries, error {retention.error:.1e}"
    )
    changed = [site for site in certificate.sites if site.retention.wanted]
    least = min(changed, key=lambda site: site.retention.norm)
    if len(changed) > 1:
        yield f"{'':<22}least at {least.site}: {_percent(least.retention.norm)}"
    if unchanged := certificate.unchanged:
        count = "1 site" if len(unchanged) == 1 else f"{len(unchanged)} sites"
        more = f" and {len(unchanged) - 3} more" if len(unchanged) > 3 else ""
        yield f"{'unchanged:':<22}{count}: {', '.join(unchanged[:3])}{more}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _averaged(certificate: Certificate) -> dict[str, float]:
    """Return the largest error from averaging experts, for each adaptation whose experts are averaged."""
    errors: dict[str, float] = {}
    for item in certificate.collapses:
        errors[item.adaptation] = max(item.error, errors.get(item.adaptation, 0.0))
    return errors


def print_files(path: str | None, files: Sequence[WrittenFile], to: Console) -> None:
    """Print the path, number and size of the files that were written."""
    from graftc.cli.output import number

    if path is None:
        to.print("nothing was written (--dry-run)")
        return
    size = number(sum(file.bytes for file in files))
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    to.print(f"{'wrote:':<22}{path}, {count}, {size} bytes", soft_wrap=True, markup=False)


def print_tensors(
    title: str, tensors: Sequence[PeftTensor], to: Console, needs: str | None = None, most: int = 40
) -> None:
    """Print the tensors of a PEFT checkpoint with their names in graftc, and the option that the server needs.

    Only the first ``most`` tensors are printed; ``--json`` lists all of them.
    """
    to.print(f"{title}: {counted(len(tensors), 'tensor')}", soft_wrap=True, markup=False)
    for pair in tensors[:most]:
        to.print(f"  {pair.key} = {pair.tensor}", soft_wrap=True, markup=False)
    if len(tensors) > most:
        to.print(f"  and {len(tensors) - most} more, which --json lists", soft_wrap=True, markup=False)
    if needs is not None:
        to.print(f"{'the server needs:':<22}{needs}", markup=False)
