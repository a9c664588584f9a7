"""LoRA by role on every architecture of `tests.kit.wide`: the right tensors and rows, and the full method contract."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from graftc.passes.core.sites.sites import LinearSite
from graftc.runtime.compiled import Compiled
from graftc.testing.compare import inputs_for, largest_difference, outputs_of
from graftc.testing.contract import MethodContract
from graftc.testing.perturbing import perturb
from tests.kit.models import fresh
from tests.kit.releases import needs_one_graph
from tests.kit.specs import lora
from tests.kit.wide import FAMILIES, USUAL


@pytest.fixture(autouse=True)
def _slow_path() -> Iterator[None]:
    """Disable the fast path that eager `nn.MultiheadAttention` has in eval mode, which rounds differently."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


class TestLoRAByRole(MethodContract):
    """The method contract of LoRA by role, on every architecture."""

    variant = True
    adaptation: ClassVar[Mapping[str, Any]] = {"method": "lora", "target": {"role": list(USUAL)}}
    families: ClassVar[tuple[str, ...]] = tuple(FAMILIES)
    contract_families = ("falcon",)

    def model(self, family: str) -> nn.Module:
        """Return the architecture's model, frozen as the adapted model's base is.

        Whether a weight requires a gradient decides which product torch calls for inputs that are not contiguous, even
        if no gradient is computed.
        """
        return FAMILIES[family].model().requires_grad_(False)

    def compiled(self, family: str, model: nn.Module, seed: int = 0) -> Compiled:
        """Compile ``model`` with LoRA on the roles of its architecture."""
        wide = FAMILIES[family]
        return fresh(model, lora(list(wide.roles)), inputs=wide.inputs() if wide.inputs else None, seed=seed)

    def shared(self, family: str, *, perturbed: bool = False) -> tuple[nn.Module, Compiled]:
        """Return the model and the compiled model, as the contract does; a perturbed one is compared as one graph."""
        if perturbed:
            needs_one_graph(family)
        return super().shared(family, perturbed=perturbed)

    def perturb(self, family: str, compiled: Compiled) -> None:
        """Add noise of the architecture's size to every trainable tensor."""
        perturb(compiled, FAMILIES[family].noise)

    def test_places(self, family: str) -> None:
        """Exactly the tensors and rows that were listed by hand are adapted, once each."""
        _, compiled = self.shared(family)
        (resolved,) = compiled.compilation.main.resolved
        sites = [site for site, _ in resolved.places if isinstance(site, LinearSite)]
        places = sorted(f"{site.key.module}.{site.key.name} {str(site.own).removeprefix('rows ')}" for site in sites)
        assert places == FAMILIES[family].expected()

    def test_one_pair_of_factors_for_each_place(self, family: str) -> None:
        """A place has one A and one B, however often its tensor is used."""
        _, compiled = self.shared(family)
        (resolved,) = compiled.compilation.main.resolved
        assert len(compiled.adapter_state_dict()) == 2 * len(resolved.places)

    def test_back_to_the_source(self, family: str) -> None:
        """The folded tensors give the adapted model's outputs in a model of the source's class."""
        model, compiled = self.shared(family, perturbed=True)
        inputs = inputs_for(compiled)
        folded = copy.deepcopy(model)
        mismatches = folded.load_state_dict(compiled.merge().folded_state_dict(), strict=False)
        assert not mismatches.missing_keys
        assert (
            set(mismatches.unexpected_keys) <= {name for name, _ in folded.named_buffers()} - folded.state_dict().keys()
        )
        assert largest_difference(outputs_of(folded, inputs), outputs_of(compiled, inputs)) <= self.fold_tolerance


@pytest.mark.slow
def test_every_family_is_here() -> None:
    """All architectures that the documentation names are included."""
    assert len(FAMILIES) == 31
