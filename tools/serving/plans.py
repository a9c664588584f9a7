"""A plan of `graftc serve-plan` for a case, followed to the end: commands, files, and an engine's tokens."""

from __future__ import annotations

import contextlib
import io
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import graftc
from graftc.cli import main
from graftc.records.serving.plans import ServingRoute
from graftc.runtime.serving.running import DRIVERS, run_engine
from graftc.specs.errors.diagnostics import GraftError
from tools.serving.forms import Forms, prompts, refusal
from tools.serving.methods import TOKENS

TRANSFORMERS = ("vllm", "mistralrs")
"""Engines whose base is a folder of transformers."""


def followed(engine: str, forms: Forms, plain: Sequence[Sequence[int]], vllm: Path | None) -> dict[str, Any]:
    """Return what came of a plan's first exact route for a case, in an engine that can be run.

    Args:
        engine: the engine that the plan is for; the route may name another one.
        forms: the case.
        plain: the tokens of the base.
        vllm: the interpreter that has vLLM; without it, routes to vLLM are left out.
    """
    wanted = forms.get("adapted")["tokens"]
    artifact = Path(forms.get("artifact")["path"])
    try:
        plan = graftc.serve_plan(artifact, engine)
        engines = [name for name in DRIVERS if name != "vllm" or vllm is not None]
        exact = [route for route in plan.routes if route.available and route.exact and route.engine in engines]
        if not exact:
            raise GraftError("GC079", f"serve-plan knows no exact route for {engine}")
        route = exact[0]
        served = {"how": "planned", "kind": route.kind, "engine": route.engine}
        follow(route)
        rows = run_engine(
            route.engine,
            **given_to(route, forms),
            prompts=prompts(forms.base),
            tokens=TOKENS,
            threads=1,
            python=vllm if route.engine == "vllm" else None,
        )
    except GraftError as error:
        return {"how": "planned", "refusal": refusal(error)}
    equal = [list(row) == other for row, other in zip(rows.tokens, wanted, strict=True)]
    changed = sum(list(row) != list(other) for row, other in zip(wanted, plain, strict=True))
    return {**served, "version": rows.version, "equal": all(equal), "rows": sum(equal), "changed": changed}


def follow(route: ServingRoute) -> None:
    """Run the commands of a route whose files are not there yet.

    Raises:
        GraftError: GC079 if a command fails.
    """
    for line in route.commands:
        words = shlex.split(line)[1:]
        if Path(words[words.index("--out") + 1]).exists():
            continue
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = main(words)
        if status:
            raise GraftError("GC079", f"{line} ended with status {status}: {said.getvalue()[-500:]}")


def given_to(route: ServingRoute, forms: Forms) -> dict[str, Any]:
    """Return the arguments of `run_engine` for what the commands of a route made."""
    assert route.served is not None
    if route.kind in ("graph", "merged"):
        return {"base": Path(route.served)}
    own = forms.base if route.engine in TRANSFORMERS else forms.base.with_name("base.gguf")
    limit = None if route.needs is None else int(route.needs.split()[-1])
    return {"base": Path(route.base or own), "adapter": Path(route.served), "max_rank": limit}
