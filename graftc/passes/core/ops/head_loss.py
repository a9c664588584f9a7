"""A vocabulary head and its cross-entropy in one operator, so that logits exist for only a few rows at a time.

Rows without a label are skipped. Gradients are computed in the forward pass, while a chunk's logits are available, and
stored for the backward pass as the gradients of a summed loss, so that 16-bit gradients are as large as with a scaled
loss. Logits are computed twice only if gradients of per-row losses must reach a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graftc.passes.core.ops.autocasting import autocast_dtype, cast
from graftc.passes.core.ops.declaring import operator
from graftc.specs.errors.diagnostics import GraftError

NONE, MEAN, SUM = 0, 1, 2
"""Reductions, numbered as in torch."""

CHUNK_BYTES = {"cpu": 16 * 2**20}
"""Size of a chunk's logits in bytes, by device type."""

CHUNK_ROWS = {"cpu": 128}
"""Minimum number of rows in a chunk, however long the rows are, since each product reads the whole weight."""

_OTHER_BYTES, _OTHER_ROWS = 256 * 2**20, 512
"""The corresponding values for accelerators, which need more rows per read of the weight."""


class Form(NamedTuple):
    """The options of the loss; see `head_loss`."""

    starts: Sequence[int]
    ignored: int
    reduction: int
    smoothing: float
    scale: float
    cap: float | None
    square: float
    statistics: bool = False


def chunk_rows(vocabulary: int, dtype: torch.dtype, device: str = "cpu") -> int:
    """Return the number of rows of logits to compute at a time, for products in ``dtype`` on this device type."""
    row = vocabulary * torch.promote_types(dtype, torch.float32).itemsize
    return max(CHUNK_ROWS.get(device, _OTHER_ROWS), CHUNK_BYTES.get(device, _OTHER_BYTES) // row)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Return the dot products of corresponding rows, ``[n, 1]``, without materialising their terms."""
    return torch.bmm(a[:, None], b[:, :, None])[:, 0]


def vocabulary_of(weights: Sequence[Tensor], starts: Sequence[int]) -> int:
    """Return the number of logits per row."""
    return max(start + len(weight) for weight, start in zip(weights, starts, strict=True))


class _Chunks:
    """Buffers for a chunk's logits, and the computations on them.

    Args:
        weights: ``[columns, in]`` each.
        bias: ``[vocabulary]``.
        form: options of the loss.
        rows: maximum number of rows in a chunk.

    Attributes:
        statistics: statistics of the rows in the last call to `loss`, ``[n, 4]``, if the form requests them; see
            `head_scores`.
    """

    statistics: Tensor

    def __init__(self, weights: Sequence[Tensor], bias: Tensor | None, form: Form, rows: int) -> None:
        self.weights, self.bias, self.form = weights, bias, form
        vocabulary, dtype = vocabulary_of(weights, form.starts), weights[0].dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        self._narrow = weights[0].new_empty(rows, vocabulary)
        self._logits = self._narrow if dtype == self.wide else self._narrow.new_empty(rows, vocabulary, dtype=self.wide)
        self._slope = torch.empty_like(self._logits) if form.cap is not None else None

    def loss(self, xs: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows' losses, ``[n, 1]``, and the factors that turn the exponentials into gradients."""
        form, logits = self.form, self._scaled_products(xs)
        most = logits.amax(-1, keepdim=True)
        logits.sub_(most)
        own = logits.gather(1, labels)
        if form.statistics:
            self._shifted = logits.clone()
            top = logits.argmax(-1, keepdim=True) == labels
        average = logits.mean(-1, keepdim=True) if form.smoothing else own
        total = logits.exp_().sum(-1, keepdim=True)
        log = total.log()
        if form.statistics:
            entropy = log - _dots(self._shifted, logits) / total
            squares = _dots(logits, logits).log() - 2 * log
            mean = self._shifted.mean(-1, keepdim=True) + most
            self.statistics = torch.cat([entropy, squares, mean, top.to(mean.dtype)], dim=1)
        losses = log - torch.lerp(own, average, form.smoothing)
        factor = total.reciprocal()
        if form.square:
            logsumexp = log + most
            losses = torch.addcmul(losses, logsumexp, logsumexp, value=form.square)
            factor = factor * (1 + 2 * form.square * logsumexp)
        return losses, factor

    def _scaled_products(self, xs: Sequence[Tensor]) -> Tensor:
        count = len(xs[0])
        narrow, logits, form = self._narrow[:count], self._logits[:count], self.form
        filled = 0
        for x, weight, start in zip(xs, self.weights, form.starts, strict=True):
            end = start + len(weight)
            part = narrow[:, start:end]
            if start < filled:
                part.addmm_(x, weight.t())
            elif self.bias is None:
                torch.mm(x, weight.t(), out=part)
            else:
                torch.addmm(self.bias[start:end], x, weight.t(), out=part)
            filled = max(filled, end)
        if narrow.dtype != self.wide:
            logits.copy_(narrow)
        if form.cap is None:
            return logits.mul_(form.scale) if form.scale != 1 else logits
        assert self._slope is not None
        logits.mul_(form.scale / form.cap).tanh_()
        torch.mul(logits, logits, out=self._slope[:count])
        return logits.mul_(form.cap)

    def gradient(self, labels: Tensor, factor: Tensor, outer: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the losses' gradient with respect to the products, in the losses' dtype and in the products' dtype.

        It is computed in place, from the exponentials that `loss` left in the buffer.

        Args:
            labels: ``int64[n, 1]``.
            factor: the factors that `loss` returned.
            outer: gradients of the losses, ``[n, 1]``; ones by default.
        """
        count, form = len(labels), self.form
        grad = self._logits[:count].mul_(factor)
        if form.smoothing:
            grad.sub_(form.smoothing / grad.shape[-1])
        grad.scatter_add_(1, labels, torch.full_like(factor, form.smoothing - 1))
        if self._slope is not None:
            grad.mul_(self._slope[:count].neg_().add_(1))
        if outer is not None:
            grad.mul_(outer * form.scale)
        elif form.scale != 1:
            grad.mul_(form.scale)
        return grad, grad if grad.dtype == self._narrow.dtype else self._narrow[:count].copy_(grad)


def _outputs_like(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    labels: Tensor,
    outer: Tensor | None,
    *options: Any,
) -> list[Tensor]:
    form, needed = Form(*options[:-1]), options[-1]
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    result = [weights[0].new_empty(labels.shape if form.reduction == NONE else (), dtype=wide)]
    result.append(result[0].new_empty(()))
    result += [result[0].new_empty(len(labels), 4)] if form.statistics else []
    grads = [torch.empty_like(x) for x in xs]
    grads += [w.new_empty(w.shape, dtype=wide) for w in weights]
    grads.append(weights[0].new_empty(vocabulary_of(weights, form.starts), dtype=wide))
    return result + [grad for grad, need in zip(grads, needed, strict=True) if need]


@operator(_outputs_like)
def head_loss_forward(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    labels: Tensor,
    outer: Tensor | None,
    starts: Sequence[int],
    ignored: int,
    reduction: int,
    smoothing: float,
    scale: float,
    cap: float | None,
    square: float,
    statistics: bool,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Compute `head_loss` without autograd: the losses, the number of rows with a label, and the requested gradients.

    Args:
        outer: gradients of the per-row losses, ``[rows]``; ones by default.
        needed: for each of ``xs``, each of ``weights`` and the bias, whether to compute its gradient.

    Returns:
        The losses, summed unless the reduction is `NONE`; the number of labels; if ``statistics`` is set, the rows'
        statistics; the gradients.
    """
    form = Form(starts, ignored, reduction, smoothing, scale, cap, square, statistics)
    with torch.autocast(labels.device.type, enabled=False):
        return _all_chunks((xs, weights, bias), labels, outer, form, needed)


def _all_chunks(given: Any, labels: Tensor, outer: Tensor | None, form: Form, needed: Sequence[bool]) -> list[Tensor]:
    xs, weights, bias = given
    places = (labels != form.ignored).nonzero()[:, 0]
    count = len(places)
    vocabulary = vocabulary_of(weights, form.starts)
    size = min(max(count, 1), chunk_rows(vocabulary, weights[0].dtype, labels.device.type))
    chunks = _Chunks(weights, bias, form, size)
    losses = weights[0].new_zeros(len(labels) if form.reduction == NONE else 1, dtype=chunks.wide)
    of_x, of_weight = needed[: len(xs)], needed[len(xs) : -1]
    grad_xs = [torch.zeros_like(x) if need else x for x, need in zip(xs, of_x, strict=True)]
    grads = [w.new_zeros(w.shape, dtype=chunks.wide) if need else w for w, need in zip(weights, of_weight, strict=True)]
    grad_bias = weights[0].new_zeros(vocabulary, dtype=chunks.wide)
    scores = losses.new_zeros(len(labels) if form.statistics else 0, 4)
    for start in range(0, count, size):
        at = places[start : start + size]
        own, label = [x.index_select(0, at) for x in xs], labels.index_select(0, at)[:, None]
        chunk_losses, factor = chunks.loss(own, label)
        if form.statistics:
            scores.index_copy_(0, at, chunks.statistics)
        if form.reduction == NONE:
            losses.index_copy_(0, at, chunk_losses[:, 0])
        else:
            losses += chunk_losses.sum()
        if not any(needed):
            continue
        wide, narrow = chunks.gradient(label, factor, outer.index_select(0, at)[:, None] if outer is not None else None)
        parts = [narrow[:, start : start + len(w)] for start, w in zip(form.starts, weights, strict=True)]
        for grad, part, weight, need in zip(grad_xs, parts, weights, of_x, strict=True):
            if need:
                grad.index_copy_(0, at, part @ weight)
        for grad, part, x, need in zip(grads, parts, own, of_weight, strict=True):
            if need and grad.dtype == x.dtype:
                grad.addmm_(part.t(), x)
            elif need:
                grad += part.t() @ x
        if needed[-1]:
            grad_bias += wide.sum(0)
    result = [losses if form.reduction == NONE else losses[0], losses.new_full((), count)]
    result += [scores] if form.statistics else []
    result += [grad for grad, need in zip([*grad_xs, *grads, grad_bias], needed, strict=True) if need]
    return result


class _HeadLoss(torch.autograd.Function):
    """The autograd function of `head_loss`; its tensors are ``xs``, ``weights`` and the bias, which may be None."""

    @staticmethod
    def forward(
        ctx: Any, form: Form, needed: tuple[bool, ...], count: int, labels: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Implement `torch.autograd.Function.forward`; ``count`` is the number of ``xs``."""
        ctx.form, ctx.needed, ctx.count = form, needed, count
        ctx.dtypes = [t if t is None else t.dtype for t in tensors]
        ctx.again = form.reduction == NONE and any(needed[count:])
        at_once = (False,) * len(needed) if ctx.again else needed
        loss, labelled, *grads = _forward(form, at_once, count, labels, None, *tensors)
        scores = grads.pop(0) if form.statistics else loss.new_empty(0)
        ctx.mark_non_differentiable(scores)
        ctx.save_for_backward(labelled, *((labels, *tensors) if ctx.again else grads))
        return (loss / labelled if form.reduction == MEAN else loss), scores

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        """Implement `torch.autograd.Function.backward`.

        The gradients were computed in the forward pass, unless gradients of per-row losses reach a weight. They are not
        themselves differentiable.

        Raises:
            GraftError: GC152 if second-order gradients are requested.
        """
        if torch.is_grad_enabled():
            message = "a loss computed in chunks has no second-order gradients (create_graph=True)"
            raise GraftError("GC152", message, hint="use memory: {loss: whole}")
        labelled, *saved = ctx.saved_tensors
        if ctx.again:
            labels, *tensors = saved
            _, _, *saved = _forward(ctx.form._replace(statistics=False), ctx.needed, ctx.count, labels, grad, *tensors)
            factor = None
        elif ctx.form.reduction == NONE:
            factor = grad[:, None]
        else:
            factor = grad / labelled.clamp_min(1) if ctx.form.reduction == MEAN else grad
        unscaled = iter(saved)
        grads = (
            _scaled(next(unscaled), factor, dtype) if need else None
            for need, dtype in zip(ctx.needed, ctx.dtypes, strict=True)
        )
        return None, None, None, None, *grads


def _forward(
    form: Form, needed: Sequence[bool], count: int, labels: Tensor, outer: Tensor | None, *tensors: Tensor | None
) -> Any:
    xs, weights, bias = tensors[:count], tensors[count:-1], tensors[-1]
    return torch.ops.graftc.head_loss_forward(xs, weights, bias, labels, outer, *form, needed)


def _scaled(grad: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return a gradient times a factor that may overflow 16 bits, such as the scale of a loss."""
    if factor is None:
        return grad.to(dtype)
    return (grad.to(torch.promote_types(grad.dtype, torch.float32)) * factor).to(dtype)


torch.library.define(
    "graftc::head_loss",
    "(Tensor[] xs, Tensor[] weights, Tensor? bias, Tensor labels, int[] starts, int ignored=-100, int reduction=1, "
    "float smoothing=0., float scale=1., float? cap=None, float square=0.) -> Tensor",
)


@torch.library.impl("graftc::head_loss", "CompositeImplicitAutograd")
def head_loss(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    labels: Tensor,
    starts: Sequence[int],
    ignored: int = -100,
    reduction: int = MEAN,
    smoothing: float = 0.0,
    scale: float = 1.0,
    cap: float | None = None,
    square: float = 0.0,
) -> Tensor:
    """Return the cross-entropy between labels and a head's logits, computed a few rows at a time.

    Logits are ``cap * tanh(scale / cap * u)`` for ``u = sum(x @ w.mT) + bias``, or ``scale * u`` without a cap, in
    float32 or wider. The result matches `torch.nn.functional.cross_entropy`. Products are computed in the dtype of
    their operands, or in autocast's.

    ``xs``, ``weights`` and ``bias`` have gradients, but no second-order gradients.

    Args:
        xs: ``[rows, in]`` each: the hidden states and, for a head with a low-rank update of its weight, the result of
            the first factor.
        weights: ``[columns, in]`` for each of ``xs``, all of the same dtype.
        bias: ``[vocabulary]``.
        labels: ``int64[rows]``.
        starts: for each weight, the vocabulary index at which its columns begin. The first weights cover the whole
            vocabulary in order; the product with a weight that begins at an index already covered is added there.
        ignored: label of the rows to skip.
        reduction: `NONE`, `MEAN` over the rows that have a label, or `SUM`, numbered as in torch.
        smoothing: label smoothing: the share of a label that is spread evenly over the vocabulary.
        scale: scale of the products.
        cap: cap on the logits; None for no cap.
        square: weight of the squared logarithm of the sum of exponentials (z-loss), which is added to the loss.

    Returns:
        A scalar, or ``[rows]`` without a reduction, with zeros for skipped rows; float32, or float64 for float64
        products.
    """
    return _recorded(xs, weights, bias, labels, Form(starts, ignored, reduction, smoothing, scale, cap, square))[0]


def _recorded(
    xs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None, labels: Tensor, form: Form
) -> tuple[Tensor, Tensor]:
    dtype = autocast_dtype(labels)
    tensors = [t if t is None else cast(t, dtype) for t in (*xs, *weights, bias)]
    recorded = torch.is_grad_enabled()
    needed = tuple(t is not None and recorded and t.requires_grad for t in tensors)
    outputs: tuple[Tensor, Tensor] = _HeadLoss.apply(form, needed, len(xs), labels, *tensors)  # type: ignore[no-untyped-call]
    return outputs


torch.library.define(
    "graftc::head_scores",
    "(Tensor[] xs, Tensor[] weights, Tensor? bias, Tensor labels, int[] starts, int ignored=-100, float scale=1., "
    "float? cap=None) -> (Tensor, Tensor)",
)


@torch.library.impl("graftc::head_scores", "CompositeImplicitAutograd")
def head_scores(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    labels: Tensor,
    starts: Sequence[int],
    ignored: int = -100,
    scale: float = 1.0,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the losses of `head_loss` without a reduction, and statistics of each row for metrics.

    Returns:
        The losses, ``[rows]``, and the statistics, ``[rows, 4]``, without a gradient: entropy, logarithm of the sum of
        squared probabilities, mean logit, and 1 if the label has the top logit. Rows without a label have zeros.
    """
    return _recorded(xs, weights, bias, labels, Form(starts, ignored, NONE, 0.0, scale, cap, 0.0, True))
