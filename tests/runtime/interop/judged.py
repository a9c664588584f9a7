"""Runs the cases of `tests.runtime.interop.matrix`, each compared with the installed peft."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import graftc
from graftc.runtime.compiled import Compiled
from graftc.runtime.interop.peft.folder import read_peft
from graftc.runtime.interop.peft.forms import to_theirs
from graftc.runtime.interop.peft.pairs import pairs_of
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.compare import inputs_for, outputs_of
from tests.kit.comparing import relative_difference
from tests.runtime.interop.adapters import with_noise
from tests.runtime.interop.matrix import KINDS, Case, base, examples

TOLERANCE = 1e-5
"""Of outputs, relative to the largest of them."""
GRADIENTS = 1e-4
"""Of each tensor's gradient, relative to the largest element of any."""


@dataclass
class Result:
    """The result of a case.

    Attributes:
        case: the case.
        refused: the code and field of the error if the import is refused.
        differences: the largest differences, by what was compared: outputs, gradients, merged, back.
        failure: a description of what is wrong; empty if nothing is.
    """

    case: Case
    refused: tuple[str, str] | None = None
    differences: dict[str, float] = field(default_factory=dict)
    failure: str = ""


def loaded(folder: Path, family: str) -> Any:
    """Return the model that peft loads from a folder, which must contain exactly the tensors that it trains."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base(family)), folder, is_trainable=False)
    said = [str(warning.message) for warning in caught if "peft" in str(warning.filename)]
    if wrong := [text for text in said if "missing" in text.lower() or "unexpected" in text.lower()]:
        raise AssertionError(wrong[0])
    return model.eval()


def given_to(ours: Compiled, seed: int) -> dict[str, Tensor]:
    inputs = inputs_for(ours, (3, 9), seed)
    return {
        name: torch.ones_like(value) if name.endswith("attention_mask") else value for name, value in inputs.items()
    }


def outcome(model: nn.Module, inputs: Mapping[str, Tensor], like: Tensor | None = None) -> Tensor:
    """Return the first output; peft's also contains positions of virtual tokens in front, which are removed."""
    output = outputs_of(model, inputs)[0]
    return output if like is None or output.dim() < 3 else output[:, -like.shape[1] :]


def gradients(model: nn.Module, inputs: Mapping[str, Tensor], size: torch.Size) -> None:
    """Backpropagate from weighted logits of real tokens."""
    model.zero_grad()
    outputs = model(**inputs)
    logits = outputs if isinstance(outputs, Tensor) else next(iter(outputs.values()))
    logits = logits[:, -size[1] :] if logits.dim() == 3 else logits
    (logits * torch.randn(size, generator=torch.Generator().manual_seed(5))).sum().backward()


def theirs_by_key(model: Any) -> dict[str, Tensor]:
    """Return peft's gradients by the keys of its file."""
    config = model.active_peft_config
    if config.is_prompt_learning:
        table = model.prompt_encoder["default"].embedding.weight
        return {"prompt_embeddings": table.grad}
    state = {name: value * 0 + float("nan") for name, value in model.state_dict().items() if value.is_floating_point()}
    state |= {n: p.grad for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_key = peft.get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    return {key: value for key, value in by_key.items() if value.is_floating_point() and not value.isnan().any()}


def ours_by_key(compiled: Compiled, folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the compiled model's gradients by the same keys.

    Rows of tables are in the order of the folder's config. Virtual tokens are placed where peft's table, of these
    sizes, has them, and added up if it has one for several.
    """
    compilation = compiled.compilation
    orders = {key: m.shaped.order for m in read_peft(folder).modules for key in m.keys.values()}
    by_key: dict[str, Tensor] = {}
    for pair in pairs_of(compilation):
        grad = compilation.store.get(pair.tensor).grad
        if grad is None:
            continue
        if pair.form == "rows":
            by_key[pair.key] = to_theirs("rows", grad, replace(pair.shaped, order=orders[pair.key]))
        elif pair.start is None:
            by_key[pair.key] = pair.write(grad)
        else:
            table = by_key.setdefault(pair.key, torch.zeros_like(like[pair.key]))
            table.narrow(pair.axis, pair.start, grad.shape[pair.axis]).add_(grad)
    return by_key


def compared(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return the largest difference of any gradient, relative to the largest element of all."""
    largest = max(float(value.abs().max()) for value in theirs.values())
    both = ours.keys() & theirs.keys()
    if largest < 1e-6:
        raise AssertionError("peft has no gradients")
    if not both or theirs.keys() - ours.keys():
        raise AssertionError(f"no gradient of {sorted(theirs.keys() - ours.keys())[:3]}")
    if any(ours[key].shape != theirs[key].shape for key in both):
        raise AssertionError("gradients of other shapes")
    return max(float((ours[key] - theirs[key]).abs().max()) for key in both) / largest


def run(case: Case, folder: Path) -> Result:
    """Save with peft, import, and compare outputs, gradients, the merge and the export with peft."""
    result = Result(case)
    theirs = with_noise(copy.deepcopy(base(case.family)), case.config(), seed=case.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(folder / "theirs")
        try:
            ours = graftc.import_peft(folder / "theirs", copy.deepcopy(base(case.family)), examples(case.family))
        except GraftError as error:
            result.refused = (error.code, error.place.path if error.place else "")
            result.failure = "" if error.code == "GC112" else f"{error.code}: {error.message} {error.details[:2]}"
            return result
        try:
            for name, difference in _differences(case, folder, theirs, ours):
                result.differences[name] = difference
                if not difference <= (GRADIENTS if name == "gradients" else TOLERANCE):
                    result.failure = f"{name}: {difference:.2e}"
                    break
        except (AssertionError, GraftError) as error:
            result.failure = f"after {list(result.differences)}: {error}"
    return result


def _differences(case: Case, folder: Path, theirs: Any, ours: Compiled) -> Iterator[tuple[str, float]]:
    inputs = given_to(ours, case.seed)
    own = outcome(ours, inputs)
    unadapted = outcome(base(case.family), inputs)
    if relative_difference([own], [unadapted]) < 1e-4:
        raise AssertionError("the adapter changes nothing")
    expected = outcome(theirs, inputs, own)
    yield "outputs", relative_difference([own], [expected])
    config = theirs.active_peft_config
    if config.is_prompt_learning:  # a prompt that a network generated is a table once it is read
        theirs = loaded(folder / "theirs", case.family)
    if KINDS[case.kind].gradients:
        gradients(ours, inputs, own.shape)
        gradients(theirs, inputs, own.shape)
        expected_gradients = {key: _factor(key) * value for key, value in theirs_by_key(theirs).items()}
        yield "gradients", compared(ours_by_key(ours, folder / "theirs", expected_gradients), expected_gradients)
    if not config.is_prompt_learning:
        try:
            merged = ours.merge().module
        except GraftError as error:
            if error.code not in ("GC022", "GC050") or _merges(theirs, inputs, expected):
                raise
        else:
            yield "merged", relative_difference([outcome(merged, inputs)], [expected])
    if KINDS[case.kind].back:
        ours.export(folder / "ours", format="peft")
        yield "back", relative_difference([own], [outcome(loaded(folder / "ours", case.family), inputs, own)])


def _factor(key: str) -> int:
    """Return the factor of peft's gradients: 2 for a `MultiheadAttention`'s output projection, otherwise 1.

    peft adds the update of this projection twice, but its gradient accounts for one of them.
    """
    return 2 if ".base_layer.out_proj." in key else 1


def _merges(theirs: Any, inputs: Mapping[str, Tensor], expected: Tensor) -> bool:
    """Return whether peft's merge gives its earlier outputs; it does not with tied weights or grouped convolutions."""
    try:
        merged = copy.deepcopy(theirs).merge_and_unload()
    except NotImplementedError:
        return False
    return relative_difference([outcome(merged, inputs)], [expected]) <= TOLERANCE
