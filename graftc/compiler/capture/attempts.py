"""Try a model's signatures in turn until one can be captured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import nn

from graftc.compiler.capture.defaults import default_signatures
from graftc.compiler.capture.refusals import by_values, own_errors_once
from graftc.compiler.capture.signature import Axis, less_dynamic, require_tensors
from graftc.specs.errors.diagnostics import GraftError

T = TypeVar("T")


@own_errors_once()
def first_capture(model: nn.Module, axes: Sequence[Axis] | None, run: Callable[[Sequence[Axis]], T]) -> T:
    """Return the result of ``run`` for the first signature that can be captured.

    The signature of the example inputs is tried first or, without examples, each of the model's default signatures;
    then the same signatures with more and more sizes fixed.

    Raises:
        GraftError: GC030 if no signature can be captured (the error of the first attempt), or if an input is not a
            tensor.
    """
    require_tensors(model, axes or ())
    choices = [list(axes)] if axes is not None else list(default_signatures(model))
    attempts = [list(less_dynamic(choice)) for choice in choices]
    failure: GraftError | None = None
    for attempt in [first for first, *_ in attempts] + [other for _, *others in attempts for other in others]:
        try:
            return run(attempt)
        except GraftError as error:
            if error.code != "GC030" or by_values(error.__cause__):
                raise
            failure = failure or error
    assert failure is not None
    raise failure
