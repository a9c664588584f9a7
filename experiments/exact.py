"""Compare a method with PEFT on a decoder that computes everything in float64.

Whatever their dtype, transformers' decoders compute their norms and their loss in float32. A difference of one part in
1e16 then comes out as one in 1e7 as soon as it decides how a value is rounded, so that losses of the model as it is
cannot tell an error from rounding. Both libraries therefore get the same model with torch's norms and a loss in the
model's dtype.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graftc
from experiments.parity import _differences, _loaded, _ours, _theirs
from experiments.sources import Batch, base_of, batches_of, unlabelled
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb


def figures(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a cell in float64, as `parity.figures` does: differences, relative to PEFT's values."""
    settings, seed = cell["settings"], cell["seed"]
    rows, tokens = settings["batch"]
    invocation = settings["adapt"].get("invocation", ())
    *data, other = batches_of(cell["model"], cell["steps"] + 1, rows, tokens, seed, invocation)
    base = exact(base_of(cell["model"], getattr(torch, cell["dtype"]), seed))
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        compiled = graftc.compile({"adapt": [settings["adapt"]]}, base, seed=seed)
        perturb(compiled, settings["noise"], seed=seed)
        compiled.export(folder / "start", format="peft")
        ours = _ours(compiled, data, cell["rate"], folder)
        theirs = _theirs(_loaded(base, folder / "start"), data, cell["rate"])
        return {
            "parameters": ours.parameters,
            "peft_parameters": theirs.parameters,
            **_differences(ours, theirs),
            "merged": _merged(compiled, _loaded(base, folder / "end"), unlabelled(other)),
        }


def _merged(compiled: Any, theirs: Any, batch: Batch) -> float | None:
    """Return the difference of logits after merging the same tensors with both; None if graftc does not merge them."""
    try:
        ours = compiled.merge()
    except GraftError as error:
        if error.code not in ("GC022", "GC050"):
            raise
        return None
    with torch.no_grad():
        mine, other = (model(**batch).logits for model in (ours, theirs.merge_and_unload().eval()))
    return float((mine - other).abs().max() / other.abs().max())


def exact(model: Any) -> Any:
    """Return a Llama whose norms and loss are computed in its own dtype; the model itself is changed.

    Raises:
        ValueError: if the model has no norms of Llama.
    """
    norms = [(path, norm) for path, norm in model.named_modules() if type(norm).__name__ == "LlamaRMSNorm"]
    if not norms:
        raise ValueError(f"{type(model).__name__} has no norms of Llama")
    for path, norm in norms:
        parent, _, name = path.rpartition(".")
        own = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
        own.weight = norm.weight
        setattr(model.get_submodule(parent), name, own.train(norm.training))
    model.loss_function = next_token_loss
    return model


def next_token_loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    """Return the mean cross-entropy of each next token, in the dtype of the logits; label -100 does not count.

    Args:
        logits: ``[batch, tokens, vocabulary]``.
        labels: ``[batch, tokens]``, not shifted.
        vocab_size: the size of the vocabulary.
    """
    following = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    return nn.functional.cross_entropy(logits.reshape(-1, vocab_size), following.reshape(-1))
