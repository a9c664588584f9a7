"""A method's contract: tests of its claims, on tiny models of every contract family."""

from __future__ import annotations

import copy
import unittest
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftc.passes.core.ir.printer import structural_hash
from graftc.passes.core.ir.program import provenance
from graftc.passes.core.ir.verify import verify
from graftc.passes.core.sites.sites import LinearSite
from graftc.passes.core.weights.store import Store
from graftc.runtime.api import compile as compile_model
from graftc.runtime.compiled import Compiled
from graftc.specs.claims import Claims, FoldKind
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.io import load_spec
from graftc.testing.compare import SHAPES, flat, in_parts, inputs_for, largest_difference, outputs_of, same_bits
from graftc.testing.families import FAMILIES, tiny
from graftc.testing.perturbing import perturb


class Contract:
    """Base class of all contracts: defines the adaptation, the families, and how models are built and compiled.

    Attributes:
        adaptation: the entry of a spec's ``adapt`` list that is under test.
        spec: other keys of the spec, such as ``{"train": ["classifier"]}``.
        families: names of the families to run on; by default all of `graftc.testing.FAMILIES`.
        perturbation: standard deviation of the noise that replaces training.
    """

    adaptation: ClassVar[Mapping[str, Any]]
    spec: ClassVar[Mapping[str, Any]] = {}
    families: ClassVar[tuple[str, ...]] = tuple(FAMILIES)
    perturbation: ClassVar[float] = 0.05

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Run every test once for each family."""
        if "family" in metafunc.fixturenames:
            metafunc.parametrize("family", self.families)

    def model(self, family: str) -> nn.Module:
        """Return a model of ``family``, identical in every call; override it to use another model."""
        return tiny(family)

    def compiled(self, family: str, model: nn.Module, seed: int = 0) -> Compiled:
        """Compile ``model``, a model of ``family``, with ``adaptation``."""
        return compile_model({**self.spec, "adapt": [dict(self.adaptation)]}, model, seed=seed)

    def perturb(self, family: str, compiled: Compiled) -> None:
        """Add noise to every trainable tensor, as a substitute for training; override it if training does more."""
        perturb(compiled, self.perturbation)

    def shared(self, family: str, *, perturbed: bool = False) -> tuple[nn.Module, Compiled]:
        """Return a model of ``family`` and its adapted form, created once for all of a class's read-only tests."""
        models = self._models(family)
        return models.model, models.perturbed if perturbed else models.plain

    def _models(self, family: str) -> _SharedModels:
        """Return the models that a class's tests share, and drop those of other classes."""
        key = (type(self), family)
        if key not in _SHARED:
            for old in [old for old in _SHARED if old[0] is not type(self)]:
                del _SHARED[old]
            model = self.model(family).train()  # neither compiling nor anything after it may change this mode
            reference = copy.deepcopy(model)
            addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
            compiled = self.compiled(family, model)
            plain, perturbed = copy.deepcopy(compiled).eval(), copy.deepcopy(compiled)
            self.perturb(family, perturbed)
            _SHARED[key] = _SharedModels(model, compiled, plain, perturbed.eval(), reference, addresses)
        return _SHARED[key]

    @property
    def claims(self) -> Claims:
        """The claims of the method under test."""
        return load_spec({"adapt": [dict(self.adaptation)]}).adapt[0].claims


@dataclass(frozen=True)
class _SharedModels:
    """A model in its original and adapted forms.

    Attributes:
        model: the source model, in train mode.
        compiled: the compiled model, over the source model's own tensors, for tests that train it or write to it.
        plain, perturbed: copies in eval mode, one of them perturbed, for tests that only read them.
        reference: a copy of the model, made before it was compiled.
        addresses: addresses of the model's tensors before it was compiled.
    """

    model: nn.Module
    compiled: Compiled
    plain: Compiled
    perturbed: Compiled
    reference: nn.Module
    addresses: Mapping[str, int]


_SHARED: dict[tuple[type[Contract], str], _SharedModels] = {}


class MethodContract(Contract):
    """The contract of a method. Inherit it as ``class TestMyMethod(MethodContract)`` and set ``adaptation``.

    Attributes:
        fold_tolerance: maximum difference between float32 outputs of the folded and the unfolded model.
        starts_elsewhere: whether the initial outputs differ from the base's, whatever the method claims.
        cacheable: whether the method's effect on a token depends only on that token and those before it, so that a
            cache can store them.
    """

    fold_tolerance: ClassVar[float] = 2e-5
    starts_elsewhere: ClassVar[bool] = False
    cacheable: ClassVar[bool] = True

    def test_sites(self, family: str) -> None:
        """Check that all sites are of claimed kinds, and that linear sites, if any, include one that is not square."""
        _, compiled = self.shared(family)
        sites = [site for resolved in compiled.compilation.main.resolved for site, _ in resolved.sites]
        assert sites
        assert {site.kind for site in sites} <= self.claims.sites
        linear = [site for site in sites if isinstance(site, LinearSite)]
        assert not linear or any(site.in_features != site.out_features for site in linear), (
            "every layer of the target is square, so a transposed weight would pass: add a layer that is not"
        )

    def test_identity_at_init(self, family: str) -> None:
        """Check that the adapted model reproduces the base's outputs bit for bit before training."""
        if not self.claims.identity_at_init or self.starts_elsewhere:
            raise unittest.SkipTest("the method does not claim identity at init")
        model, compiled = self.shared(family)
        for sizes in SHAPES:
            inputs = inputs_for(compiled, sizes)
            assert same_bits(outputs_of(compiled, inputs), outputs_of(model, inputs))

    def test_initial_values_depend_on_the_seed_only(self, family: str) -> None:
        """Check that compiling twice yields the same tensors, even if the source model is in another mode."""
        first = self.shared(family)[1].adapter_state_dict()
        second = self.compiled(family, self.model(family)).adapter_state_dict()
        assert list(first) == list(second)
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_only_own_tensors_train(self, family: str) -> None:
        """Check that three AdamW steps leave the base bit-identical and give gradients to all but inert tensors."""
        models = self._models(family)
        model, compiled = models.model, models.compiled
        frozen = {n: t.clone() for n, t in compiled.named_parameters() if not t.requires_grad}
        trainable = {n: t for n, t in compiled.named_parameters() if t.requires_grad}
        start = {name: tensor.detach().clone() for name, tensor in trainable.items()}
        assert trainable
        assert all(Store.is_adapter(name) for name in trainable)
        seen = _train(compiled, inputs_for(compiled), trainable)
        for name, total in seen.items():
            if not any(fnmatchcase(name.rpartition(".")[2], pattern) for pattern in self.claims.inert):
                assert total > 0, f"{name} never received a gradient"
                assert not torch.equal(trainable[name], start[name]), f"{name} was not trained"
        for name, value in models.reference.state_dict().items():
            current = model.state_dict()[name]
            assert current.data_ptr() == models.addresses[name]
            assert torch.equal(current, value), f"training wrote to {name} of the base"
        for name, parameter in compiled.named_parameters():
            assert name in trainable or torch.equal(parameter, frozen[name]), f"{name} is frozen but changed"

    def test_source_model_is_left_alone(self, family: str) -> None:
        """Check that compiling leaves the source model's training flags, ``requires_grad`` and outputs unchanged."""
        models = self._models(family)
        model, reference = models.model, models.reference
        inputs = inputs_for(models.plain)
        assert model.training
        flags = [parameter.requires_grad for parameter in reference.parameters()]
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert same_bits(outputs_of(model, inputs), outputs_of(reference, inputs))

    def test_disabled_is_the_base(self, family: str) -> None:
        """Check, bit for bit, that ``disabled()`` restores the base's outputs, and that they are adapted afterwards."""
        model, compiled = self.shared(family, perturbed=True)
        inputs = inputs_for(compiled)
        adapted = outputs_of(compiled, inputs)
        with compiled.disabled():
            base = outputs_of(compiled, inputs)
        assert same_bits(base, outputs_of(model, inputs))
        assert same_bits(outputs_of(compiled, inputs), adapted)
        assert largest_difference(adapted, base) > 1e-3, "the perturbation has no effect, so nothing is tested"

    def test_verifier_passes(self, family: str) -> None:
        """Check that every Program passes the verifier and has inserted nodes that name the adaptation."""
        _, compiled = self.shared(family)
        compilation = compiled.compilation
        name = compilation.spec.adapt[0].name
        for program in (compilation.program("train"), compilation.program("eval")):
            verify(program, compilation.store, "the contract", types=True)
            origins = [entry for node in program.graph.nodes if (entry := provenance(node)) is not None]
            assert any(origin["adaptation"] == name for origin in origins)

    def test_fold(self, family: str) -> None:
        """Check that folding preserves outputs, restores the base's graph, is certified and changes nothing else."""
        _, compiled = self.shared(family, perturbed=True)
        if self.claims.folds is FoldKind.NONE:
            _refuses_to_merge(compiled)
            return
        before = [outputs_of(compiled, inputs_for(compiled, sizes)) for sizes in SHAPES]
        merged = compiled.merge()
        certificate = merged.certificate
        assert certificate.passed, certificate.failures()
        assert all(site.change > 0 for site in certificate.sites)
        assert certificate.structure == certificate.base_structure
        for sizes, unfolded in zip(SHAPES, before, strict=True):
            inputs = inputs_for(compiled, sizes)
            assert same_bits(outputs_of(compiled, inputs), unfolded), "merging changed the compiled model"
            difference = largest_difference(outputs_of(merged, inputs), unfolded)
            assert difference <= self.fold_tolerance, f"folded and unfolded differ by {difference:.2e}"
            with compiled.disabled():
                base = outputs_of(compiled, inputs)
            assert largest_difference(unfolded, base) > 1e-3, "the perturbation has no effect, so nothing is tested"
        if not certificate.additions:
            canonical = compiled.compilation.store.canonical
            hashes = {structural_hash(each.program, canonical) for each in merged._graftc.shown.executables.values()}
            assert hashes == {structural_hash(compiled.program("eval", base=True), canonical)}

    def test_state_dict_round_trip(self, family: str, tmp_path: Path) -> None:
        """Check that saving adapter tensors and loading them into another copy reproduces the outputs bit for bit."""
        from safetensors.torch import load_file, save_file

        _, compiled = self.shared(family, perturbed=True)
        tensors = compiled.adapter_state_dict()
        assert tensors and all(Store.is_adapter(name) for name in tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "adapters.safetensors")
        other = copy.deepcopy(self.shared(family)[1])
        inputs = inputs_for(compiled)
        assert largest_difference(outputs_of(other, inputs), outputs_of(compiled, inputs)) > 0
        other.load_adapter_state_dict(load_file(tmp_path / "adapters.safetensors"))
        assert same_bits(outputs_of(other, inputs), outputs_of(compiled, inputs))

    def test_report_counts_what_trains(self, family: str) -> None:
        """Check that the report's counts match the tensors."""
        _, compiled = self.shared(family)
        report = compiled.report
        trainable = sum(t.numel() for t in compiled.parameters() if t.requires_grad)
        assert report.trainable_parameters + report.trained_in_full == trainable
        assert report.adaptations[0].sites == sum(len(r.places) for r in compiled.compilation.main.resolved)

    def test_sixteen_bits(self, family: str) -> None:
        """Check the method on a base in bfloat16.

        All trained tensors are float32 and get float32 gradients; before training, the outputs equal the base's bit for
        bit; a fold is certified.
        """
        model = copy.deepcopy(self._models(family).reference).to(torch.bfloat16).eval()
        try:
            compiled = self.compiled(family, model).eval()
        except GraftError as error:
            assert error.code == "GC030" and "does not run" in error.message, error
            raise unittest.SkipTest("the source model does not run in bfloat16 itself") from None
        trainable = {name: tensor for name, tensor in compiled.named_parameters() if tensor.requires_grad}
        assert {tensor.dtype for tensor in trainable.values()} == {torch.float32}
        assert compiled.dtype == torch.bfloat16
        inputs = inputs_for(compiled)
        if self.claims.identity_at_init and not self.starts_elsewhere:
            assert same_bits(outputs_of(compiled, inputs), outputs_of(model, inputs))
        seen = _train(compiled, inputs, trainable)
        assert any(seen.values()) and all(t.grad is None or t.grad.dtype == t.dtype for t in trainable.values())
        self.perturb(family, compiled)
        if self.claims.folds is FoldKind.NONE:
            _refuses_to_merge(compiled)
        else:
            assert compiled.eval().merge().certificate.passed

    def test_cache(self, family: str) -> None:
        """Check that a text in parts, each with the cache of the parts before it, gives the same logits as the whole.

        If the method rules that out, the call must be refused.
        """
        _, compiled = self.shared(family, perturbed=True)
        if not compiled.can_generate():
            raise unittest.SkipTest("the model does not generate")
        try:
            whole, parts = in_parts(compiled)
        except GraftError as error:
            assert error.code == "GC141" and not self.cacheable, error
            return
        assert self.cacheable, "the class declares cacheable = False, but a cache works"
        assert largest_difference([whole], [parts]) <= _CACHE_TOLERANCE * max(1.0, float(whole.abs().max()))

    def test_bank(self, family: str) -> None:
        """Check that an adaptation behaves in a bank of two as it does alone.

        This includes a batch whose rows choose their adaptations, unless some place has no separate rows.
        """
        if not self.claims.bankable:
            raise unittest.SkipTest("the method does not claim that it can share a bank")
        if type(self).compiled is not Contract.compiled:
            raise unittest.SkipTest("the class does not compile its adaptation alone")
        model, compiled = self.shared(family)
        alone, name = copy.deepcopy(compiled), compiled.compilation.spec.adapt[0].name
        entries = [{**self.adaptation, "name": slot} for slot in _SLOTS]
        spec = {**self.spec, "adapt": entries, "compose": {"bank": list(_SLOTS)}}
        try:
            bank = compile_model(spec, copy.deepcopy(model)).eval()
        except GraftError as error:
            assert error.code == "GC036" and compiled.compilation.tensor_edits.copies(), error
            raise unittest.SkipTest("this setting trains tensors of the base, which banks do not support") from None
        perturb(bank, self.perturbation)
        tensors, inputs = bank.adapter_state_dict(), inputs_for(bank, (4, 6))
        numbers = torch.tensor([0, 1, 1, 0])
        try:
            mixed = outputs_of(bank, {**inputs, "adapter_ids": numbers})
        except GraftError as error:
            assert error.code == "GC037", error
            mixed = None
        for number, slot in enumerate(_SLOTS):
            in_bank = {n: n.replace(f"graftc.{name}.", f"graftc.{slot}.") for n in alone.adapter_state_dict()}
            alone.load_adapter_state_dict({n: tensors[source] for n, source in in_bank.items()})
            expected = outputs_of(alone, inputs)
            bank.activate(slot)
            assert largest_difference(outputs_of(bank, inputs), expected) <= _BANK_TOLERANCE
            for own, shared in zip(expected, mixed if mixed is not None else (), strict=mixed is not None):
                if own.shape[:1] == numbers.shape:
                    mine = numbers == number
                    assert largest_difference([shared[mine]], [own[mine]]) <= _BANK_TOLERANCE


_SLOTS = ("first", "second")
_BANK_TOLERANCE = 1e-5
_CACHE_TOLERANCE = 2e-6
"""As a fraction of the largest logit."""


def _train(compiled: Compiled, inputs: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Train for three steps on a loss that depends on every output, and return each tensor's largest gradient."""
    torch.manual_seed(0)
    optimiser = torch.optim.AdamW(tensors.values(), lr=1e-2, weight_decay=0.01)
    seen = dict.fromkeys(tensors, 0.0)
    compiled.train()
    for _ in range(3):
        optimiser.zero_grad()
        leaves = [t for t in flat(compiled(**inputs)) if t.is_floating_point()]
        loss = torch.stack([(leaf.float() * torch.randn_like(leaf.float())).sum() for leaf in leaves]).sum()
        torch.autograd.backward(loss)
        for name, tensor in tensors.items():
            if tensor.grad is not None:
                seen[name] = max(seen[name], float(tensor.grad.abs().max()))
        optimiser.step()
    return seen


def _refuses_to_merge(compiled: Compiled) -> None:
    try:
        compiled.merge()
    except GraftError as error:
        assert error.code == "GC050", error
    else:
        raise AssertionError("the method claims not to fold, but merging raised no error")
