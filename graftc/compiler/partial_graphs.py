"""Checks on graphs for part of a call: new tokens after a cache, an encoder alone, or a decoder after an encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graftc.compiler.capture.past import ENCODED, ENCODER
from graftc.compiler.compilation import Compilation
from graftc.compiler.resolve.compose import Unit
from graftc.compiler.resolve.resolver import Resolved, not_read
from graftc.compiler.resolve.train import TRAIN
from graftc.passes.core.elements.calls import elements_in
from graftc.passes.core.ir.past_inputs import is_cross, is_past
from graftc.passes.core.ir.program import Program, provenance
from graftc.passes.core.ir.shapes import expression
from graftc.passes.core.sites.sites import ParameterSite
from graftc.passes.core.weights.tensor_edits import CHANGING
from graftc.specs.base import start_input
from graftc.specs.compose import Parallel
from graftc.specs.errors.diagnostics import GraftError

_WITHOUT = "generate with use_cache=False, or leave it out with disabled(name)"


def is_encoder(program: Program) -> bool:
    """Return whether a graph runs only a model's encoder."""
    return (ENCODER, True) in program.flags


def is_part(program: Program) -> bool:
    """Return whether a graph runs part of the model: its encoder, its decoder on encoder outputs, or its elements."""
    alone = is_encoder(program) or bool(elements_in(program.flags))
    return alone or ENCODED in program.signature or any(map(is_cross, program.signature))


def is_cached(program: Program) -> bool:
    """Return whether a graph takes the keys and values of earlier tokens as inputs."""
    return any(map(is_past, program.signature))


def require_every_place(
    compilation: Compilation, program: Program, read: Sequence[Resolved], trained: Sequence[ParameterSite]
) -> None:
    """Check that a decoder's graph and the graphs that computed its inputs together read all adapted places.

    Args:
        compilation: the Compilation that contains these graphs.
        program: the decoder's graph.
        read, trained: the adaptations and the trained tensors in the decoder's graph.

    Raises:
        GraftError: GC031 naming a place that no graph reads.
    """
    if not is_part(program) or is_encoder(program) or not compilation.signatures:
        return
    bases = ((part, compilation.program_as_run("train", "base", s)) for s, part in compilation.signatures.items())
    parts = [part.places_as_run for part, base in bases if is_part(base) or is_cached(base)]
    main = compilation.places()
    places = {str(site.key) for r in [*read, *(r for part in parts for r in part.resolved)] for site, _ in r.places}
    tensors = {site.tensor for sites in [trained, *(part.trained for part in parts)] for site in sites}
    missing = [(str(site.key), r.name) for r in main.resolved for site, _ in r.places if str(site.key) not in places]
    missing += [(parameter.tensor, TRAIN) for parameter in main.trained if parameter.tensor not in tensors]
    for place, owner in missing:
        error = not_read(program, place, owner)
        if ENCODED not in program.signature:
            raise error
        source = "encoder_outputs must come from compiled.get_encoder()(...)"
        hint = f"{source}, whose adaptations the decoder's graph does not contain"
        raise GraftError(error.code, error.message, hint=hint)


def require_every_edit(compilation: Compilation, program: Program, base: Program) -> None:
    """Check that a graph for part of the model contains every change to the stored tensors that it reads.

    Args:
        compilation: the Compilation, which has the changes to all tensors of the model.
        program: the adapted graph of the part.
        base: the base graph of the part.

    Raises:
        GraftError: GC031 if a change is missing.
    """
    if not is_part(program) or not compilation.signatures:
        return
    read = {str(node.target) for node in base.graph.find_nodes(op="get_attr")}
    for edit in compilation.tensor_edits:
        own = program.tensor_edits.at(edit.own.tensor, CHANGING)
        if edit.mode in CHANGING and edit.own.tensor in read and all(change.owner != edit.owner for change in own):
            raise not_read(program, str(edit.site or edit.own.tensor), edit.owner)


def require_no_virtual_tokens(program: Program, plan: Mapping[Any, Sequence[tuple[Unit, Any]]]) -> None:
    """Check that a graph for part of a call has no virtual tokens, since these precede the whole text.

    Raises:
        GraftError: GC141 if there are any.
    """
    if plan and (is_cached(program) or is_part(program)):
        name = next(iter(plan.values()))[0][0].name
        message = f"the virtual tokens of {name!r} precede the whole text, but a call with a cache has only part of it"
        hint = (
            "decoders generate with one such adaptation in eval mode; otherwise use use_cache=False or disabled(name)"
        )
        raise GraftError("GC141", message, hint=hint)


def require_tokens_alone(program: Program) -> None:
    """Check that no adaptation in a graph with a cache depends on tokens that are not in the call.

    Raises:
        GraftError: GC141 if an adaptation does.
    """
    if not is_cached(program):
        return
    for name in _across_tokens(program):
        message = (
            f"the effect of {name!r} on a token depends on its whole row, but a call with a cache has only part of it"
        )
        raise GraftError("GC141", message, hint=_WITHOUT)


def require_rows_of_one(compilation: Compilation) -> None:
    """Check that a call returns as many rows as its inputs have.

    Raises:
        GraftError: GC141 for parallel adaptations.
    """
    for composition in compilation.controls.values():
        if isinstance(composition, Parallel):
            message = f"{composition.name!r} returns rows for each of its adaptations, but a text continues in only one"
            raise GraftError("GC141", message, hint="compose the adaptations as a bank, in which each row chooses one")


def cannot_be_cached(compilation: Compilation) -> bool:
    """Return whether virtual tokens, or an adaptation that works across tokens, rule out graphs with a cache."""
    program = compilation.program_as_run("train")
    # In a graph with a cache, an input replaces what an aLoRA finds across tokens.
    across = [name for name in _across_tokens(program) if start_input(name) not in compilation.controls]
    return bool(program.virtual or across)


def gates_over_rows(program: Program) -> list[str]:
    """Return the names of adaptations whose gates average over the tokens of a row."""
    origins = (provenance(node) for node in program.graph.nodes if node.target in _MEANS)
    return list(dict.fromkeys(o["adaptation"] for o in origins if o is not None and o["part"] == "gate"))


def _across_tokens(program: Program) -> list[str]:
    """Return the names of adaptations that combine or count values across the tokens of a call."""
    tokens = {
        expression(node.meta["val"].shape[1]) for node in program.placeholders() if str(node.target).endswith(_TOKENS)
    }
    names: dict[str, None] = {}
    for node in program.graph.nodes:
        owner = provenance(node)
        if owner is None or node.target not in _ACROSS or len(node.args) < 2:
            continue
        value, dims = node.args[0].meta["val"], node.args[1]
        axes = [dims] if isinstance(dims, int) else dims
        if any(expression(value.shape[axis]) in tokens for axis in axes):
            names[owner["adaptation"]] = None
    return list(names)


_TOKENS = ("input_ids", "inputs_embeds")
_ACROSS = (
    torch.ops.aten.mean.dim,
    torch.ops.aten.sum.dim_IntList,
    torch.ops.aten.cumsum.default,
    torch.ops.aten.amax.default,
    torch.ops.aten.amin.default,
    torch.ops.aten.argmax.default,
)
_MEANS = (torch.ops.aten.mean.dim, torch.ops.aten.sum.dim_IntList)
