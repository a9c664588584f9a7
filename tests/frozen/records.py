"""The records of an adapted model: digests of its graphs, its tensors, and its numerical results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from graftc.compiler.compilation import Compilation
from graftc.compiler.folding.fold_plan import fold_plan
from graftc.compiler.inspect.history import history
from graftc.passes.core.ir.printer import Printer, format_program, structural_hash
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import Mode, Stage
from graftc.runtime.compiled import Compiled
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.compare import flat, in_parts, inputs_for, outputs_of
from graftc.testing.contract import Contract
from tests.frozen.digests import digest, evidence_digest, tensors_digest
from tests.kit.settings import one_thread

GRAPHS: tuple[tuple[str, Mode, Stage], ...] = (
    ("base.train", "train", "base"),
    ("base.eval", "eval", "base"),
    ("train", "train", "adapted"),
    ("eval", "eval", "adapted"),
)
"""The graphs whose structure is recorded; of the adapted ones the text is recorded too."""

MODES: tuple[Mode, ...] = ("train", "eval")

Record = dict[str, str]


def record(
    contract: Contract,
    family: str,
    *,
    ordered: bool = True,
    slots: Sequence[str] = (),
    generates: bool = False,
    merging: Mapping[str, Any] = MappingProxyType({}),
) -> Record:
    """Compile and perturb a contract's model, and return digests of the results.

    Args:
        contract: the contract that compiles and perturbs the model.
        family: one of the contract's families.
        ordered: whether the graphs' lines have the same order in every process.
        slots: the names in the model's bank, if it has one.
        generates: whether to record other calls of a language model.
        merging: options of merging.

    Returns:
        ``graph.*``: structural hashes, including those of the base's graphs. ``text.*``: digests of the adapted graphs'
        text. ``history.*``: digests of the steps that made these and, in train mode, of those that lower it.
        ``initial``: a digest of the adapter tensors after compiling, and of whether that consumed global random
        numbers. The rest is of the perturbed model: ``outputs`` in eval mode; ``gradients``, with the outputs in train
        mode that they come from; ``rows``, the outputs of a batch whose rows choose from a bank; ``labels``, the loss
        of a text and its gradients; ``cache``, the outputs for a text in parts, each part with the cache of those
        before; ``folded``, the folded tensors in the base's dtype, for a bank those of its last name; and
        ``certificate``, the certificate of merging except what concerns only the base. If a result is refused, its
        value is the error's code.
    """
    with one_thread():
        model = contract.model(family)
        torch.manual_seed(0)
        compiled = contract.compiled(family, model)
        result = _graphs(compiled.compilation, ordered)
        for mode in MODES:
            rows = history(compiled.snapshot, mode, lowered=True)
            result[f"history.{mode}"] = digest("\n".join(str(replace(row, seconds=None)) for row in rows))
        result["initial"] = tensors_digest(compiled.adapter_state_dict().items(), _drawn())
        contract.perturb(family, compiled)
        result["outputs"] = _or_code(lambda: _listed(outputs_of(compiled, inputs_for(compiled))))
        result["gradients"] = _or_code(lambda: _gradients(compiled, inputs_for(compiled)))
        if slots:
            result["rows"] = _or_code(lambda: _rows(compiled, len(slots)))
        if generates:
            result["labels"] = _or_code(lambda: _gradients(compiled, _labelled()))
            result["cache"] = _or_code(lambda: _listed(in_parts(compiled)))
        single = compiled.fix(slots[-1]) if slots else compiled
        result["folded"] = _or_code(lambda: _folded(single.compilation))
        result["certificate"] = _or_code(lambda: _certificate(single, merging))
    return result


def _or_code(record: Callable[[], str]) -> str:
    try:
        return record()
    except GraftError as error:
        return error.code


def _graphs(compilation: Compilation, ordered: bool) -> Record:
    result: Record = {}
    for name, mode, stage in GRAPHS:
        program = compilation.program(mode, stage)
        result[f"graph.{name}"] = structural_hash(program, compilation.store.canonical)
        if stage == "adapted":
            result[f"text.{name}"] = digest(_text(program, ordered=ordered))
    return result


def _text(program: Program, *, ordered: bool) -> str:
    return format_program(program) if ordered else "\n".join(sorted(Printer(program, numbered=False).lines()))


def _drawn() -> str:
    """Return a digest of torch's random state, which shows how many numbers were drawn since it was seeded."""
    return digest(str(torch.get_rng_state().tolist()))


def _gradients(compiled: Compiled, inputs: Mapping[str, Tensor]) -> str:
    """Return a digest of all trained tensors' gradients in train mode, and of how many random numbers the call drew.

    The loss depends on every output.
    """
    training = compiled.training
    compiled.train()
    compiled.zero_grad()
    torch.manual_seed(0)
    outputs = [leaf for leaf in flat(compiled(**inputs)) if leaf.is_floating_point()]
    drawn = _drawn()
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(leaf.shape, generator=generator).double() for leaf in outputs]
    pairs = zip(outputs, weights, strict=True)
    torch.autograd.backward(torch.stack([(leaf.double() * weight).sum() for leaf, weight in pairs]).sum())
    gradients = {name: t.grad for name, t in compiled.named_parameters() if t.requires_grad and t.grad is not None}
    compiled.zero_grad()
    compiled.train(training)
    return tensors_digest({**gradients, **{f"output {n}": leaf for n, leaf in enumerate(outputs)}}.items(), drawn)


def _labelled() -> dict[str, Tensor]:
    """Return a text to be learned, without a mask."""
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def _rows(compiled: Compiled, slots: int) -> str:
    """Return a digest of the outputs of a batch whose rows cycle through a bank's slots."""
    inputs = inputs_for(compiled, (2 * slots, 6))
    return _listed(outputs_of(compiled, {**inputs, "adapter_ids": torch.arange(2 * slots) % slots}))


@torch.no_grad()
def _folded(compilation: Compilation) -> str:
    fold = fold_plan(compilation)
    for error in fold.kept.values():
        raise error
    lazy = fold.lazy
    return tensors_digest((name, lazy.folded(name)) for name in (*lazy.names, *lazy.additions()))


def _certificate(compiled: Compiled, merging: Mapping[str, Any]) -> str:
    evidence = compiled.merge(**merging).certificate.to_json()
    del evidence["anchors"], evidence["fingerprint"]
    return evidence_digest(evidence)


def _listed(tensors: Iterable[Tensor]) -> str:
    return tensors_digest((f"{number:03}", tensor) for number, tensor in enumerate(tensors))
