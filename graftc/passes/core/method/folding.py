"""Call the methods' folds and check their results.

Methods may come from other packages, so a mistake in one becomes an error that names the method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from graftc.compat.fake_tensors import is_faking
from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.sites import LinearSite, Site
from graftc.passes.core.weights.folds import Fold, Keep, StandIn, TensorFold, WeightFold
from graftc.specs.base import MethodSpec
from graftc.specs.errors.diagnostics import GraftError, first_line


def fold_at(method: Method[Any, Any], spec: MethodSpec, site: Site, tensors: Mapping[str, Tensor]) -> Fold:
    """Call `Method.fold`, and return its fold with each function wrapped so that the function's result is checked.

    Args:
        method: the method.
        spec: the adaptation with the site's overrides applied.
        site: the adapted site.
        tensors: the site's own tensors and those that all sites share, by part.

    Raises:
        GraftError: GC071 naming the method if it does not return a valid fold for the site; raised later by the fold's
            functions if they fail, request a part that does not exist, or return the wrong shape or dtype.
    """
    check = _Check(spec.method, site, tensors)
    with check.running():
        fold = method.fold(spec, site, tensors)
    if isinstance(fold, WeightFold):
        if not isinstance(site, LinearSite):
            raise check.wrong("changes a weight, but the site has none")
        return WeightFold(check.weight(fold.apply))
    if isinstance(fold, TensorFold):
        return TensorFold({part: check.tensor(part, change) for part, change in fold.changes.items()})
    if isinstance(fold, Keep | StandIn):
        return fold
    raise check.wrong(f"returns {type(fold).__name__}, which is not a fold")


def wrong_fold(method: str, site: Site, reason: str) -> GraftError:
    """Return the error for a fold that does not fit a site."""
    message = f"the fold of {method!r} at {site.key} {reason}"
    return GraftError("GC071", message, hint="correct the method's fold; nothing has been folded")


class _Check:
    def __init__(self, method: str, site: Site, tensors: Mapping[str, Tensor]) -> None:
        self._method, self._site, self._tensors = method, site, tensors

    def wrong(self, reason: str) -> GraftError:
        return wrong_fold(self._method, self._site, reason)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Turn errors in the block into errors that blame the method.

        While a fold is being traced, torch's errors are left to the tracing code.
        """
        try:
            yield
        except KeyError as error:
            missing = error.args[0] if error.args else ""
            has = f"the site has: {', '.join(self._tensors)}" if self._tensors else "the site has no tensors"
            raise self.wrong(f"requests the tensor {missing!r}; {has}") from error
        except (
            ArithmeticError,
            AssertionError,
            AttributeError,
            IndexError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            if isinstance(error, torch.OutOfMemoryError) or is_faking():
                raise
            raise self.wrong(f"fails: {first_line(error)}") from error

    def weight(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        def checked(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            shapes, dtype = (weight.shape, weight.shape[:-1] if bias is None else bias.shape), weight.dtype
            only = [weight]  # a list lets the callee release the weight
            del weight
            with self.running():
                result = apply(only.pop(), bias)
            if not isinstance(result, tuple) or len(result) != 2:
                raise self.wrong("must return a pair of a weight and a bias")
            self._same(result[0], shapes[0], dtype, "the weight")
            if result[1] is not None:
                self._same(result[1], shapes[1], dtype, "the bias")
            return result

        return checked

    def tensor(self, part: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def checked(tensor: Tensor) -> Tensor:
            shape, dtype = tensor.shape, tensor.dtype
            only = [tensor]
            del tensor
            with self.running():
                result = change(only.pop())
            self._same(result, shape, dtype, repr(part))
            return result

        return checked

    def _same(self, value: Any, shape: torch.Size, dtype: torch.dtype, what: str) -> None:
        if not isinstance(value, Tensor):
            raise self.wrong(f"returns {type(value).__name__} for {what}, expected a tensor")
        if value.shape != shape:
            raise self.wrong(f"returns {what} with shape {list(value.shape)}, expected {list(shape)}")
        if value.dtype != dtype:
            raise self.wrong(f"returns {what} as {value.dtype}, expected {dtype}")
