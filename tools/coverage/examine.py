"""The examination of one entry: build, capture, roles, LoRA by role, identity, fold; the result is a plain record."""

from __future__ import annotations

import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

import graftc
from graftc.compiler.capture import capture as capturing
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.live.elements import is_live
from graftc.compiler.roles.structure import Structure, place
from graftc.runtime.compiled import Compiled
from graftc.testing.compare import inputs_for, largest_difference, outputs_of, same_bits
from graftc.testing.perturbing import perturb
from tools.coverage.build import Built, NotBuiltError, build
from tools.coverage.catalogue import Entry
from tools.coverage.levels import compile_maps, levels
from tools.coverage.text import clean, describe

ROLES = ("attn.q", "attn.v", "ffn.down", "experts")
"""The roles that get LoRA, if a model has them."""

MIXER = "mixer"
"""A further role that gets LoRA if a model has no attention."""

SIZES = (2, 9)
"""Batch and sequence sizes of the comparisons, which no capture uses."""

EAGER = 1e-4
"""The largest difference allowed of the captured graph from the eager model, relative to the largest output or 1."""

ALONE = 20
"""The CPU seconds after which a failed entry is not tried role by role."""

Record = dict[str, Any]


class DifferentError(Exception):
    """Raised when outputs that have to be equal are not."""


def examine(entry: Entry, detail: bool = True, progress: Callable[[Record], object] = lambda record: None) -> Record:
    """Examine an entry, and return its record.

    Args:
        entry: the entry to examine.
        detail: whether to add a traceback, and whether fewer roles work, to help diagnose a failure.
        progress: called with the record so far before every step that may take long; ``_step`` names the step.

    Returns:
        A record of plain values. `built`, `captured`, `attention`, `roles` and `folds` say how far the examination
        came, each with the reason if it came no further; fields that begin with an underscore are not part of the
        committed record.
    """
    started = time.process_time()

    def step(name: str) -> None:
        progress(record | {"_step": name})

    warnings.simplefilter("ignore")
    record: Record = dict(entry.facts())
    try:
        built = build(entry)
    except NotBuiltError as error:
        record["reason"] = clean(str(error))
    else:
        record |= {
            "built": True,
            "inputs": list(built.inputs),
            "captured": False,
            "_plan": built.plan,
            "_shapes": {name: list(getattr(value, "shape", ())) for name, value in built.inputs.items()},
        }
        try:
            _compile(built, record, detail, step)
        except Exception as error:
            record |= {"reason": f"examining it: {describe(error)}", "_traceback": _traceback(detail)}
            if record["captured"]:
                record["folds"] = False
        if not record.get("folds"):
            step("finding its level")
            _find_level(built, record, detail)
    record["_seconds"] = round(time.process_time() - started, 1)
    return record


def _compile(built: Built, record: Record, detail: bool, step: Callable[[str], None]) -> None:
    step("capturing it")
    with _one_capture() as captures:
        try:
            structure = graftc.roles(built.model, built.inputs, cache=False)
        except Exception as error:
            if not captures:
                record |= {"reason": describe(error), "_traceback": _traceback(detail)}
                return
            structure = None
            record |= {
                "roles": False,
                "folds": False,
                "reason": f"roles: {describe(error)}",
                "_traceback": _traceback(detail),
            }
        graph = captures[0].program.graph
        record["captured"] = True
        calls = (node for capture in captures for node in capture.program.graph.nodes if node.op == "call_function")
        record["_operators"] = sorted({str(node.target) for node in calls if not isinstance(node.target, str)})
        by_role = structure.by_role() if structure is not None else {}
        record["attention"] = _attention(graph, structure)
        if structure is None:
            return
        _roles(built.model, structure, record)
        wanted = ROLES if record["attention"] else (*ROLES, MIXER)
        target = [r for r in wanted if structure.having(r)]
        record["target"] = target
        record["_roles"] = {role: len(items) for role, items in by_role.items()}
        missing = [r for r in ("attn.q", "attn.v") if record["attention"] and r not in target]
        if missing or not target:
            if missing:
                record |= {"folds": False, "reason": f"no {' and no '.join(missing)} found"}
            return
        step("compiling and folding it")
        try:
            compiled = _adapt(built, target, record)
            record["sites"] = sum(len(resolved.sites) for resolved in compiled.compilation.main.resolved)
            record |= {"folds": True} | levels(compiled, built, captured=True)
        except Exception as error:
            record |= {"folds": False, "reason": describe(error), "_traceback": _traceback(detail)}
            if detail and time.process_time() < ALONE:
                record["_alone"] = {role: _alone(built, role) for role in target}


def _find_level(built: Built, record: Record, detail: bool) -> None:
    """Find the level of a model on which LoRA by role does not fold, with LoRA on every map."""
    try:
        compiled = compile_maps(built)
        _compare(compiled, built, record)
        record |= levels(compiled, built, captured=record["captured"] and "reason" not in record)
    except Exception as error:
        record |= {"refused": describe(error), "_refused": _traceback(detail)}


def _adapt(built: Built, target: list[str], record: Record) -> Compiled:
    """Compile LoRA for the roles, and compare the result with the base, before training and after a fold."""
    spec = {"adapt": [{"name": "coverage", "method": "lora", "rank": 2, "target": {"role": target}}]}
    compiled = graftc.compile(spec, built.model, built.inputs, cache=False)
    _compare(compiled, built, record)
    return compiled


def _compare(compiled: Compiled, built: Built, record: Record) -> None:
    """Compare the compiled model with the base before training, and, perturbed, with its merge."""
    inputs, base = _inputs(compiled, built)
    adapted = _seeded(compiled, inputs)
    with compiled.disabled():
        captured = _seeded(compiled, inputs)
    if not same_bits(adapted, captured):
        raise DifferentError(f"no identity at init: {largest_difference(adapted, captured):.1e}")
    if not same_bits(adapted, base) and not same_bits(base, _seeded(built.model, inputs, 1)):
        record["draws"] = True  # numbers that its Python draws but never reads are not in the graph
    elif not same_bits(adapted, base):
        scale = max(1.0, *(float(t.abs().max()) for t in base if t.numel()))
        apart = largest_difference(adapted, base) / scale
        if not apart <= EAGER:
            raise DifferentError(f"the captured graph differs from the eager model by {apart:.1e}")
        record["rounding"] = True
    perturb(compiled)
    certificate = compiled.merge().certificate
    if not all(site.change > 0 for site in certificate.sites):
        raise DifferentError("a site does not change its output when its adapter is perturbed")


def _inputs(compiled: Compiled, built: Built) -> tuple[dict[str, Any], list[Tensor]]:
    """Return the first inputs that the eager model accepts, and its outputs.

    These are tried in turn: random ones of other sizes than captured (unless the model's own Python would read the
    random values), the first rows of the example, the example.
    """
    if not is_live(compiled.compilation.model):
        inputs = inputs_for(compiled, SIZES)
        with suppress(Exception):
            return inputs, _seeded(built.model, inputs)
    if all(isinstance(value, Tensor) for value in built.inputs.values()):
        inputs = {name: value[: SIZES[0]] for name, value in built.inputs.items()}
        with suppress(Exception):
            return inputs, _seeded(built.model, inputs)
    return built.inputs, _seeded(built.model, built.inputs)


def _seeded(model: nn.Module, inputs: Mapping[str, Any], seed: int = 0) -> list[Tensor]:
    """Return the outputs of a call with seeded random numbers; some models draw some even in eval mode."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return outputs_of(model, inputs)


def _alone(built: Built, role: str) -> str:
    try:
        _adapt(built, [role], {})
    except Exception as error:
        return describe(error)
    return "folds"


def _roles(model: nn.Module, structure: Structure, record: Record) -> None:
    """Record whether the roles are complete: no map of a layer is unresolved, and each attention has its q, k and v."""
    modules = dict(model.named_modules(remove_duplicate=False))
    attentions = {finding.module for finding in structure.having("attn")}
    lacking = [
        f"{item.module or 'the model'}: {item.reason}"
        for item in structure.unresolved
        if (place(item.module)[0] is not None or item.module in attentions)
        and not isinstance(modules.get(item.module), nn.Embedding)
    ]
    record["roles"] = not lacking
    if lacking:
        record["unresolved"] = clean(_summary(lacking))
        record["_unresolved"] = lacking


def _summary(lacking: list[str]) -> str:
    """Summarise unresolved maps in one line; the layers of a stack count as one place."""
    counts = Counter(re.sub(r"#\d+", "#n", re.sub(r"(?<=\.)\d+(?=[.:])", "*", line)) for line in lacking)
    first = next(iter(counts))
    return first if len(counts) == 1 else f"{first} (and {len(counts) - 1} more)"


def _attention(graph: fx.Graph, structure: Structure | None) -> str:
    """Return how attention shows: as a role, or only as a softmax that is not a router's; empty if there is none."""
    if structure is not None and structure.having("attn"):
        return "role"
    if any(_named(node, "scaled_dot_product") for node in graph.nodes):
        return "softmax"
    return "softmax" if any(_named(n, "softmax") and not _routes(n) for n in graph.nodes) else ""


def _routes(softmax: fx.Node) -> bool:
    """Return whether a softmax is just before or after a choice of the largest values, as in routers of experts."""
    for above in (False, True):
        pending, seen = [softmax], {softmax}
        while pending:
            node = pending.pop()
            if node is softmax or any(_named(node, name) for name in ("to.", "view", "reshape", "getitem", "slice")):
                near = node.all_input_nodes if above else list(node.users)
                if any(_named(other, "topk") or _named(other, "argmax") for other in near):
                    return True
                pending += [other for other in near if other not in seen]
                seen |= set(near)
    return False


def _named(node: fx.Node, name: str) -> bool:
    return node.op == "call_function" and name in str(node.target)


@contextmanager
def _one_capture() -> Iterator[list[Any]]:
    """Make graftc capture each signature once, since all captures of it are equal; yield the list of captures."""
    original: Any = capturing.capture
    kept: dict[str, Any] = {}
    captures: list[Any] = []

    def capture(request: CaptureRequest, **options: Any) -> Any:
        key = repr((request.axes, request.flags, request.mode, options))
        if key not in kept:
            kept[key] = original(request, **options)
            captures.append(kept[key])
        return kept[key]

    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("graftc.") and vars(module).get("capture") is original:
                stack.enter_context(mock.patch.object(module, "capture", capture))
        yield captures


def _traceback(detail: bool) -> str:
    return traceback.format_exc(limit=-6) if detail else ""


def committed(record: Mapping[str, Any]) -> Record:
    """Return the part of a record that is the same in every run with the same versions."""
    return {name: value for name, value in record.items() if not name.startswith("_")}
