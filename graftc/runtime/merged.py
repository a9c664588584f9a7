"""Merged: the model with its adaptations folded into base weights, and the certificate of the fold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from graftc.compiler.certify import DEFAULT_BUDGET, Certificate, probe_sites
from graftc.compiler.family import Family
from graftc.compiler.fingerprint import fingerprint
from graftc.compiler.pipeline import Compilation
from graftc.compiler.samples import sample_inputs
from graftc.passes.core.folds import LazyTensors
from graftc.passes.core.printer import structural_hash
from graftc.passes.core.program import Program
from graftc.passes.core.store import Store
from graftc.passes.fold import take_out
from graftc.runtime.compiled import ModelRunner
from graftc.specs.diagnostics import GraftError

if TYPE_CHECKING:
    from graftc.runtime.compiled import Compiled


class Merged(ModelRunner):
    """The folded model, in eval mode: the base's graph over folded tensors.

    Tensors that folding does not change are shared with the compiled model and the source.
    """

    certificate: Certificate

    def __init__(self, compilation: Compilation, store: Store, additions: tuple[str, ...]) -> None:
        super().__init__(compilation, store)
        self._additions = additions

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own outputs, as its class would give them."""
        return self._call(args, kwargs)

    def _program_of(self, family: Family) -> Program:
        return folded_program(self._compilation, family, self._additions)

    def train(self, mode: bool = True) -> Any:
        """Folded models are for deployment: only eval mode exists."""
        if mode and hasattr(self, "_additions"):
            raise GraftError("GC054", "a merged model has no train mode", hint="train the compiled model it came from")
        return super().train(False)

    def folded_state_dict(self) -> dict[str, Tensor]:
        """The base's tensors with the folded ones in place, by the source model's names (tied names included)."""
        own = ((name, t) for name, t in self._store.tensors() if name not in self._store.constants)
        return {name: tensor.detach() for name, tensor in own}

    def to_transformers(self) -> Any:
        """A model of the source's own class with folded weights, which plain transformers saves and loads.

        Raises:
            GraftError: GC052 when the class has no place for a folded tensor, GC032 for a source without a config.
        """
        from graftc.runtime.interop.transformers import to_transformers

        return to_transformers(self)


def folded_program(compilation: Compilation, family: Family, additions: tuple[str, ...]) -> Program:
    """The eval Program of a signature with every adaptation taken out, reading added biases where there are any."""
    program = family.eval
    folded = take_out(program, {edit.adaptation for edit in program.edits})
    for name in additions:
        _add_bias(folded, compilation.store, name)
    return folded


def _add_bias(program: Program, store: Store, name: str) -> None:
    module = name.rpartition(".")[0]
    graph = program.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        if node.meta["module"] == module and len(node.args) == 2:
            with graph.inserting_before(node):
                bias = graph.get_attr(name)
            bias.meta = {"val": node.meta["val"].new_empty(node.meta["val"].shape[-1]), "module": module}
            node.args = (*node.args, bias)


def merge(compiled: Compiled, budget: float | None = None) -> Merged:
    """Fold and certify. See `Compiled.merge`."""
    compilation = compiled.compilation
    if compiled.device.type == "meta":
        raise GraftError("GC050", "there is nothing to fold on the meta device", hint="compile a model with weights")
    lazy = compilation.lazy_tensors()
    additions = lazy.additions()
    merged = Merged(compilation, _folded_store(compilation.store, lazy, additions), additions)
    merged.certificate = _certify(compiled, merged, lazy, additions, budget)
    if not merged.certificate.passed:
        raise GraftError(
            "GC051",
            "the fold is not certified: " + "; ".join(merged.certificate.failures()[:3]),
            details=tuple(merged.certificate.failures()),
        )
    return merged


def _folded_store(store: Store, lazy: LazyTensors, additions: tuple[str, ...]) -> Store:
    folded = Store()
    changed = set(lazy.names)
    for name, tensor in store.base():
        value = lazy.folded(name) if name in changed else tensor.detach()
        if isinstance(tensor, nn.Parameter):
            folded.add_parameter(name, value, trainable=False)
        else:
            path, _, last = name.rpartition(".")
            folded.add_buffer(name, value, persistent=last not in store.owner(path)._non_persistent_buffers_set)
    for name in additions:
        folded.add_parameter(name, lazy.folded(name), trainable=False)
    folded.constants = set(store.constants)
    for alias, owner in store.aliases.items():
        folded.alias(alias, owner)
    return folded


@torch.no_grad()
def _certify(
    compiled: Compiled, merged: Merged, lazy: LazyTensors, additions: tuple[str, ...], budget: float | None
) -> Certificate:
    compilation = compiled.compilation
    family = compilation.main
    inputs = sample_inputs(family.base, compilation.store, config=getattr(compiled, "config", None))
    training = compiled.training
    compiled.eval()
    try:
        unfolded = _flat(compiled, inputs)
    finally:
        compiled.train(training)
    folded = _flat(merged, inputs)
    names = family.base.outputs.names
    differences = {
        name: float((a.double() - b.double()).abs().max())
        for name, a, b in zip(names, unfolded, folded, strict=True)
        if isinstance(a, Tensor) and a.is_floating_point()
    }
    if budget is None:
        budget = compilation.spec.fold.budget.logits
    if budget is None:
        largest = max((float(a.abs().max()) for a in unfolded if isinstance(a, Tensor)), default=1.0)
        budget = DEFAULT_BUDGET.get(compiled.dtype, 1e-4) * max(1.0, largest)
    program = merged._programs[merged._key(compilation.default)]
    return Certificate(
        sites=probe_sites(compilation, lazy),
        outputs=differences,
        budget=budget,
        structure=structural_hash(_without(program, additions), compilation.store.canonical),
        base_structure=structural_hash(family.base_eval, compilation.store.canonical),
        additions=additions,
        fingerprint=fingerprint(compilation.store, getattr(compiled, "config", None)),
        dtype=str(compiled.dtype).removeprefix("torch."),
    )


def _without(program: Program, additions: tuple[str, ...]) -> Program:
    """The Program less the declared additions, to compare with the base's."""
    if not additions:
        return program
    result = program.copy()
    for node in list(result.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)):
        bias = node.args[2] if len(node.args) > 2 else None
        if isinstance(bias, fx.Node) and bias.target in additions:
            node.args = node.args[:2]
    return result


def _flat(runner: ModelRunner, inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
    present = {**inputs, **dict(runner._compilation.main.base.flags)}
    return runner.run(runner.ready(present), present)
