"""The cells of the matrix: a case in an engine, by the first routes that lead to an answer.

A route is a form of the case that the engine reads. The engine's tokens must equal those that torch generates with the
same weights: transformers' for merged models, PEFT's for its folders, graftc's for everything else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftc.runtime.serving.running import run_engine
from graftc.specs.errors.diagnostics import GraftError
from tools.serving.forms import Forms, prompts, refusal
from tools.serving.methods import TOKENS
from tools.serving.plans import followed


@dataclass(frozen=True)
class Route:
    """A way to serve a case.

    Attributes:
        how: ``unmerged``, ``lora`` or ``merged``.
        form: the form that the engine is given.
        reference: the form whose tokens are the right ones, if the first has none.
        on: the engine's base: None if the form is a whole model.
    """

    how: str
    form: str
    reference: str = "adapted"
    on: str | None = None


def _peft(server: str) -> tuple[Route, ...]:
    return (
        Route("unmerged", f"peft-{server}", on="base"),
        Route("lora", f"lora-peft-{server}", "as-lora", on="base"),
        Route("merged", "merged-folder"),
    )


ROUTES: dict[str, tuple[Route, ...]] = {
    "llama.cpp": (
        Route("unmerged", "gguf-adapter", on="base.gguf"),
        Route("lora", "lora-gguf-adapter", "as-lora", on="base.gguf"),
        Route("merged", "merged-gguf", "merged-folder"),
    ),
    "genai": (Route("unmerged", "onnx"),),
    "mistralrs": _peft("mistralrs"),
    "openvino": (Route("unmerged", "lora-file", on="base-f16.gguf"), Route("merged", "merged-gguf-f16")),
    "vllm": _peft("vllm"),
}
"""The routes of each engine, the best ones first."""


IGNORING = ("openvino",)
"""Engines that are known to give the base's tokens with a LoRA that they do not apply."""


def cell(engine: str, forms: Forms, plain: Sequence[Sequence[int]], vllm: Path | None) -> list[dict[str, Any]]:
    """Return what became of each route, up to the first that serves the case unmerged.

    If none does, the last one is what `graftc serve-plan` says, which may name another engine.

    Args:
        engine: the engine.
        forms: the case.
        plain: the tokens of the base, with which the case's are compared: equal ones would prove nothing.
        vllm: the interpreter that has vLLM.
    """
    found = []
    for route in ROUTES[engine]:
        found.append({"how": route.how, **_tried(engine, route, forms, plain, vllm)})
        if found[-1].get("equal") and route.how == "unmerged":
            return found
    return [*found, followed(engine, forms, plain, vllm)]


def _tried(
    engine: str, route: Route, forms: Forms, plain: Sequence[Sequence[int]], vllm: Path | None
) -> dict[str, Any]:
    form = forms.get(route.form)
    if "refusal" in form:
        return form
    reference = forms.get(route.reference)
    wanted = form.get("tokens") or reference["tokens"]
    path = Path(form["path"])
    base = path if route.on is None else forms.base.with_name(route.on)
    try:
        answer = run_engine(
            engine,
            base=base,
            adapter=None if route.on is None else path,
            prompts=prompts(forms.base),
            tokens=TOKENS,
            max_rank=form.get("rank") and allowed_rank(engine, form["rank"]),
            threads=1,
            python=vllm if engine == "vllm" else None,
        )
    except GraftError as error:
        return {"refusal": refusal(error)}
    equal = [list(row) == other for row, other in zip(answer.tokens, wanted, strict=True)]
    changed = sum(list(row) != list(other) for row, other in zip(wanted, plain, strict=True))
    served = {"version": answer.version, "equal": all(equal), "rows": sum(equal), "changed": changed}
    if not all(equal) and engine in IGNORING and [list(row) for row in answer.tokens] == plain:
        served["ignored"] = True
    return served | ({key: reference[key] for key in ("error", "rank")} if route.how == "lora" else {})


def at_once(engine: str, forms: Sequence[Forms], plain: Sequence[Sequence[int]], vllm: Path | None) -> dict[str, Any]:
    """Return how many rows are right if prompts with different adapters, and without one, run at once.

    Args:
        engine: the engine.
        forms: a case for each adapter; every adapter continues two prompts.
        plain: the tokens of the base.
        vllm: the interpreter that has vLLM.
    """
    route = ROUTES[engine][0]
    made = {f"adapter{number}": each.get(route.form) for number, each in enumerate(forms)}
    given, chosen, wanted = [], [], []
    rows = [each.get("adapted")["tokens"] for each in forms]
    for name, tokens in [*zip(made, rows, strict=True), (None, plain)]:
        for number in (0, 1):
            given.append(prompts(forms[0].base)[number])
            chosen.append(name)
            wanted.append(tuple(tokens[number]))
    answer = run_engine(
        engine,
        base=forms[0].base if route.on is None else forms[0].base.with_name(route.on),
        adapters={name: Path(form["path"]) for name, form in made.items()},
        chosen=chosen,
        prompts=given,
        tokens=TOKENS,
        threads=1,
        python=vllm if engine == "vllm" else None,
    )
    equal = [one == other for one, other in zip(answer.tokens, wanted, strict=True)]
    found = {"how": "at once", "version": answer.version, "rows": sum(equal), "of": len(equal), "equal": all(equal)}
    return {**found, "changed": len(set(wanted)) - 2}


def allowed_rank(engine: str, rank: int) -> int | None:
    """Return the limit with which an engine is started for a rank; None for its own."""
    if engine == "vllm":
        return next(limit for limit in (8, 16, 32, 64, 128, 256, 320, 512) if limit >= rank)
    return rank if engine == "mistralrs" else None


def statuses(routes: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield what is wrong with a cell: tokens that differ, or no route that serves it and no refusal."""
    for route in routes:
        if "refusal" in route and route["how"] == "planned":
            yield f"planned: {route['refusal']['message']}"
        if "refusal" not in route and not route["equal"] and not route.get("ignored"):
            yield f"{route['how']}: {route['rows']} rows equal"
        if route.get("changed") == 0:
            yield f"{route['how']}: the tokens are the base's"
