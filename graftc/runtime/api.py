"""The Python interface: compile, check, roles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graftc.compiler.pipeline import captured, compile_model
from graftc.compiler.report import Report, report
from graftc.compiler.signature import Axis, axes_of, default_axes
from graftc.compiler.structure import Structure, find_structure
from graftc.passes.core.store import Store
from graftc.runtime.compiled import Compiled, make_compiled
from graftc.specs.document import Spec
from graftc.specs.io import load_spec

SpecLike = Spec | Mapping[str, Any] | str | Path


def compile(
    spec: SpecLike,
    model: nn.Module,
    example_inputs: Mapping[str, Tensor] | None = None,
    *,
    seed: int = 0,
    cache: bool = True,
) -> Compiled:
    """Compile a spec against a model.

    Args:
        spec: a `Spec`, a mapping, or the path of a YAML, JSON or TOML file.
        model: a transformers model, or any `nn.Module` that torch.export captures. It is never changed; its base
            tensors are shared, not copied.
        example_inputs: the inputs by name, for models whose inputs cannot be told from their interface. Values do not
            matter, only dtypes, ranks and fixed sizes; the first axis is the batch.
        seed: initial values of adapter tensors depend on it and their names only.
        cache: keep captured graphs in the user's cache folder.

    Raises:
        GraftError: coded, for everything that is wrong with the spec, the model or their fit.
    """
    loaded = load_spec(spec)
    return make_compiled(compile_model(loaded, model, _axes(model, example_inputs), seed=seed, use_cache=cache))


def check(
    spec: SpecLike,
    model: nn.Module,
    example_inputs: Mapping[str, Tensor] | None = None,
    *,
    cache: bool = True,
) -> Report:
    """Resolve and cost a spec without making a model of it; works on the meta device.

    Raises:
        GraftError: as `compile`.
    """
    return report(compile_model(load_spec(spec), model, _axes(model, example_inputs), use_cache=cache))


def roles(model: nn.Module, example_inputs: Mapping[str, Tensor] | None = None, *, cache: bool = True) -> Structure:
    """The roles found in a model, with the evidence for each.

    Raises:
        GraftError: GC030 when it cannot be captured.
    """
    axes = _axes(model, example_inputs) or default_axes(model)
    found = captured(model, axes, Store.mirror(model), cache)
    return find_structure(found.program.graph, found.constants)


def _axes(model: nn.Module, example_inputs: Mapping[str, Tensor] | None) -> list[Axis] | None:
    return None if example_inputs is None else axes_of(model, example_inputs)
