"""The table of memory needs: methods side by side, with and without options that save memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

from graftc.applications.planner.planning import workbench
from graftc.records.applications.memory import FitRow
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError, GraftWarning, unknown_name
from graftc.specs.registry import method_specs

USUAL = ("lora", "dora", "ia3", "spiel-MA", "spiel-AG", "full")
"""The methods in the table named ``usual``."""

_VARIANTS: dict[str, dict[str, Any]] = {
    "spiel-MA": {"method": "spiel", "variant": "MA"},
    "spiel-AG": {"method": "spiel", "variant": "AG"},
    "full": {"method": "full", "target": {"modules": "**"}},
}


def specs_of(names: Sequence[str], like: Spec) -> dict[str, Spec]:
    """Return a spec with a single method for each name.

    A name is a method's tag, ``spiel-MA``, ``spiel-AG``, or ``full:GLOB``, in which the glob selects the modules to
    train in full.

    Args:
        names: the names, in the order of the rows.
        like: a spec whose first target is used for methods that have no default target.

    Raises:
        GraftError: GC091 for an unknown name.
    """
    specs: dict[str, Spec] = {}
    for name in names:
        tag, _, modules = name.partition(":")
        if tag not in _VARIANTS and tag not in method_specs():
            raise unknown_name("method", tag, [*_VARIANTS, *method_specs()])
        adaptation: dict[str, Any] = {"method": tag, **_VARIANTS.get(tag, {})}
        target = method_specs()[adaptation["method"]].spec_class.model_fields["target"]
        if modules:
            adaptation["target"] = {"modules": modules}
        elif target.is_required() and "target" not in adaptation:
            adaptation["target"] = like.adapt[0].target
        specs[name] = Spec.model_validate({"adapt": [adaptation]})
    return specs


class Size(NamedTuple):
    """The size for which peaks are computed.

    Attributes:
        batch, sequence: the number of rows in a step, and of tokens in each row.
        budget: the number of bytes available; if None, the largest sizes that fit are not searched for.
    """

    batch: int
    sequence: int | None
    budget: int | None


def rows(
    specs: dict[str, Spec],
    model: Any,
    example_inputs: Any,
    size: Size,
    told: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> Iterator[FitRow]:
    """Yield the rows of a table.

    Args:
        specs: the specs, by the names of their rows.
        model, example_inputs, options: as for `graftc.plan`.
        size: the size for which peaks are computed.
        told: a callback that receives a message about the row being planned.
    """
    stored: list[str | None] = [None, "nf4"]
    for (name, spec), quantize, chunked, checkpoint in product(specs.items(), stored, (False, True), (False, True)):
        told(f"planning {name}")
        changed = _changed(spec, quantize, chunked)
        try:
            with warnings.catch_warnings():
                if chunked:  # skip this row if the loss is not over a vocabulary
                    warnings.simplefilter("error", GraftWarning)
                bench = workbench(changed, model, example_inputs, checkpoint=checkpoint, **options)
                plan = bench.plan(size.batch, size.sequence)
            if size.budget is not None:
                plan = bench.fitted(plan, size.budget)
        except GraftWarning:
            continue
        except GraftError as error:
            yield FitRow(name, quantize, checkpoint, chunked, None, f"{error.code}: {error.message}")
        else:
            yield FitRow(name, quantize, checkpoint, chunked, plan)


def _changed(spec: Spec, quantize: str | None, chunked: bool) -> Spec:
    document = spec.model_dump(exclude_unset=True)
    if quantize is not None:
        document["base"] = {"quantize": quantize}
    return Spec.model_validate({**document, "memory": {"loss": "chunked" if chunked else "whole"}})
