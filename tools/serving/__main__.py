"""``python -m tools.serving``: run engines on what graftc writes, and keep the results in docs/serving.json."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tools.serving.cells import at_once, cell, statuses
from tools.serving.forms import Forms, base_files, plain_tokens
from tools.serving.methods import CASES
from tools.serving.page import write_results

ROOT = Path(__file__).parents[2]
LAYERS = 3
"""The layers that are left of SmolLM2 in the matrix; `whole` has all of them."""
OTHERS = ("whole", "at-once-2", "at-once-8")
"""Cases beside the methods: LoRA on the whole model, and several adapters at once."""
SEVERAL = ("llama.cpp", "mistralrs", "vllm")
"""The engines that take several adapters."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status: 1 if an engine gave other tokens."""
    parser = argparse.ArgumentParser(prog="python -m tools.serving", description=__doc__)
    parser.add_argument("--engines", default="llama.cpp,genai,mistralrs,openvino", help="names, with commas between")
    parser.add_argument(
        "--methods", default=",".join((*CASES, *OTHERS)), help="names, with commas between (default: all)"
    )
    parser.add_argument("--vllm", type=Path, help="the interpreter that has vLLM, which plans may name")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "serving", help="folder of the models")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "serving.json", help="file of the results")
    parser.add_argument("--fresh", action="store_true", help="run cells again that are in the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    run, wrong = Run(options.work, options.vllm), False
    for name in options.methods.split(","):
        for engine in options.engines.split(","):
            if _several(name) and engine not in SEVERAL:
                continue
            kept = options.work / "cells" / engine / f"{name}.json"
            if options.fresh or not kept.is_file():
                start = time.monotonic()
                routes = run.routes(engine, name)
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(routes, indent=1))
                print(
                    f"{engine} {name}: {'; '.join(map(_line, routes))} ({time.monotonic() - start:.0f} s)", flush=True
                )
            problems = list(statuses(json.loads(kept.read_text())))
            wrong |= bool(problems)
            for problem in problems:
                print(f"{engine} {name}: {problem}", flush=True)
    print(write_results(options.work / "cells", options.results))
    return int(wrong)


class Run:
    """The models of a run, each of which is made when a cell first needs it."""

    def __init__(self, work: Path, vllm: Path | None) -> None:
        self.work, self.vllm = work, vllm
        self._name, self._forms = "", list[Forms]()

    def routes(self, engine: str, name: str) -> list[dict[str, Any]]:
        """Return the results of an engine for a method, for the whole model, or for several adapters at once."""
        work, layers = (self.work / "whole", None) if name == "whole" else (self.work, LAYERS)
        base = base_files(work, layers)
        plain = plain_tokens(base)
        if name != self._name:
            of_lora = [Forms(work / f"lora-{seed}", base, CASES["lora"], seed) for seed in range(1, 1 + _several(name))]
            self._name = name
            self._forms = of_lora or [Forms(work / name, base, CASES.get(name, CASES["lora"]))]
        if _several(name):
            return [at_once(engine, self._forms, plain, self.vllm)]
        return cell(engine, self._forms[0], plain, self.vllm)


def _several(name: str) -> int:
    """Return how many adapters run at once; 0 for a method."""
    return int(name.removeprefix("at-once-")) if name.startswith("at-once-") else 0


def _line(route: dict[str, object]) -> str:
    if isinstance(refusal := route.get("refusal"), dict):
        return f"{route['how']} {refusal['code']}"
    error = f", error {route['error']:.3f}" if "error" in route else ""
    return f"{route['how']} {route['rows']} rows{error}"


if __name__ == "__main__":
    sys.exit(main())
