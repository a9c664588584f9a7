"""Turn virtual tokens whose activations are constant at every layer into keys and values of every attention layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from graftc.compiler.compilation import Compilation
from graftc.compiler.folding.samples import samples
from graftc.compiler.resolve.resolver import Resolved
from graftc.passes.core.build.base_activations import computed
from graftc.passes.core.build.tensors import tensor_name
from graftc.passes.core.sites.sites import AttentionSite, LinearSite
from graftc.specs.claims import FoldKind
from graftc.specs.compose import Average, Stack


def are_constant(compilation: Compilation, resolved: Resolved) -> bool:
    """Return whether the keys and values that attention computes from virtual tokens do not depend on the text.

    This requires that each layer of the only stack reads its own trained vectors at the virtual tokens, and that no map
    differs from row to row, as gated or chosen maps may.
    """
    main, virtual = compilation.main, compilation.program("train").virtual
    read = {(site.stack, site.layer) for site, _ in resolved.sites}
    attentions = main.attentions
    return (
        all(tokens.starts == (0,) for tokens in virtual)
        and len(virtual) == 1
        and all((site.stack, site.layer) in read for site in attentions)
        and len({site.stack for site in attentions}) == 1
        and all(site.operands is not None for site in attentions)
        and all(isinstance(composition, Stack | Average) for composition in compilation.spec.compose)
        and not any(_may_differ(other) for other in main.resolved)
    )


def _may_differ(resolved: Resolved) -> bool:
    """Return whether an adaptation may apply a different map to each row: it adapts a linear map and does not fold."""
    stays = resolved.spec.claims.folds is FoldKind.NONE
    return stays and any(isinstance(site, LinearSite) for site, _ in resolved.sites)


def slot_parameters(compilation: Compilation, resolved: Resolved) -> int:
    """Return the number of elements in the keys and values."""
    length = sum(run.length for run in resolved.spec.virtual_tokens())
    return sum(length * (_width(keys) + _width(values)) for _, keys, values in _columns(compilation))


@torch.no_grad()
def slot_values(compilation: Compilation, resolved: Resolved) -> dict[str, Tensor]:
    """Return the keys and values, ``[length, width]``, under the names that `prefix` uses.

    These are the values that attention in the adapted graph reads at virtual tokens, rotated if the model rotates them.
    """
    store = compilation.store
    length = sum(run.length for run in resolved.spec.virtual_tokens())
    sites = list(_columns(compilation))
    inputs = samples(compilation)
    nodes = {node.name: node for node in compilation.program("eval").graph.nodes}
    operands: list[fx.Node] = []
    for site, _, _ in sites:
        assert site.operands is not None
        operands += [nodes[operand.name] for operand in (site.operands.keys, site.operands.values)]
    device = next(iter(inputs.values())).device
    values = iter(computed(operands, lambda node: inputs[str(node.target)], store.get, device))
    tables: dict[str, Tensor] = {}
    for site, *each in sites:
        for part, columns in zip(("keys", "values"), each, strict=True):
            heads = next(values)[0, :, :length].transpose(0, 1)
            table = heads.new_zeros(length, _width(columns))
            table[:, columns.flatten().to(table.device)] = heads.flatten(1)
            tables[tensor_name(site, resolved.name, part)] = table
    return tables


def _columns(compilation: Compilation) -> Iterator[tuple[AttentionSite, Tensor, Tensor]]:
    for site in compilation.main.attentions:
        assert site.keys is not None and site.values is not None
        yield site, site.keys, site.values


def _width(columns: Tensor) -> int:
    return int(columns.max()) + 1
