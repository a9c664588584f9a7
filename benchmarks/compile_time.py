"""The time of compiling: capturing, the first and the second compile, and growth with layers, sites and adaptations.

    python benchmarks/compile_time.py [--repeat 3] [--only NAME] [--out benchmarks/results/compile_time]

Each run is a process of its own with an empty cache folder. All times are processor seconds of this process and its
threads, so that other work on the machine matters little; figures are medians over the runs. Models are on the meta
device, except BERT. Writes ``.json``, ``.md`` and, if matplotlib is installed, ``.png`` and ``.svg``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ALL_MAPS = ["attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down"]
WIDE = {"vocab_size": 128256, "max_position_embeddings": 8192, "num_key_value_heads": 8, "rope_theta": 500000.0}
NARROW = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "vocab_size": 1000}
MODELS: dict[str, dict[str, Any]] = {
    "Llama 7B": {},
    "Llama 70B": {
        **{"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
        **WIDE,
    },
    "Llama 405B": {
        **{"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
        **WIDE,
    },
}
ONE_BY_ONE = ("BERT base", "Llama 7B", "Llama 70B")
"""The models that are also captured with every layer traced."""
DEPTHS = (10, 20, 40, 80, 160)
ADAPTATIONS = (1, 8, 16, 32, 64)
STACKED = 9
"""The number of layers in the runs with several adaptations: 63 maps."""


def llama(**values: Any) -> Any:
    """Build a Llama in bfloat16 on the meta device."""
    import torch
    import transformers

    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).to(torch.bfloat16)


def bert() -> Any:
    """Build BERT in its published size, with random weights."""
    import transformers

    return transformers.BertForSequenceClassification(transformers.BertConfig())


def spec(count: int = 1, roles: Sequence[str] = ALL_MAPS) -> dict[str, Any]:
    """Return a spec that puts LoRA of rank 8 on the same maps `count` times."""
    lora = {"method": "lora", "target": {"role": list(roles)}, "rank": 8}
    return {"adapt": [{"name": f"lora{number}", **lora} for number in range(count)]}


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Call a function; return the processor seconds that it took, and its result."""
    started = time.process_time()
    result = run()
    return time.process_time() - started, result


def measure_model(name: str) -> dict[str, float]:
    """Measure a compile that captures, one from the cache, and a capture with every layer traced, in this process."""
    import graftc
    from graftc.compiler.capture.capture import capture
    from graftc.compiler.capture.request import CaptureRequest

    model = bert() if name == "BERT base" else llama(**MODELS[name])
    document = spec(roles=["attn.q", "attn.v"] if name == "BERT base" else ALL_MAPS)
    first, cold = timed(lambda: graftc.check(document, model))
    second, warm = timed(lambda: graftc.check(document, model))
    assert warm.cached and not cold.cached
    figures = {"first": first, "second": second, "sites": sum(entry.sites for entry in cold.adaptations)}
    figures["capture"], captured = timed(lambda: capture(CaptureRequest.of(model)))
    assert captured.alike or not name.startswith("Llama")
    if name in ONE_BY_ONE:
        figures["capture_one_by_one"], _ = timed(lambda: capture(CaptureRequest.of(model), alike=False))
    return figures


def measure_growth(depth: int, count: int) -> dict[str, float]:
    """Measure a compile from the cache, with the number of nodes in the resulting graph."""
    from graftc.compiler.pipeline import compile_model
    from graftc.specs.io import load_spec

    model, document = llama(**NARROW, num_hidden_layers=depth), load_spec(spec(count))
    compile_model(load_spec(spec()), model)
    seconds, compiled = timed(lambda: compile_model(document, model))
    sites = sum(len(item.places) for item in compiled.main.resolved)
    return {"seconds": seconds, "nodes": len(compiled.program("train").graph.nodes), "sites": sites}


RUNS: dict[str, Callable[[], dict[str, float]]] = {
    **{name: lambda name=name: measure_model(name) for name in ("BERT base", *MODELS)},  # type: ignore[misc]
    **{f"{n} layers": lambda n=n: measure_growth(n, 1) for n in DEPTHS},  # type: ignore[misc]
    **{f"{n} adaptations": lambda n=n: measure_growth(STACKED, n) for n in ADAPTATIONS},  # type: ignore[misc]
}


def run(name: str) -> dict[str, float]:
    """Run one measurement in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--one", name]
        environment = {**os.environ, "GRAFTC_CACHE": folder}
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return measured


def table(results: Mapping[str, Any]) -> str:
    """Return the report in Markdown."""
    models = {name: values for name, values in results["runs"].items() if "first" in values}
    growth = {name: values for name, values in results["runs"].items() if "nodes" in values}
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    runs = "one run" if results["repeat"] == 1 else f"medians of {results['repeat']} runs"
    lines = [
        "# What compiling takes",
        "",
        f"`{results['command']}` on {results['machine']} ({versions}), load {results['load']}.",
        f"Seconds of the processor, {runs}; LoRA on all seven maps of a layer, on q and v in BERT.",
        "",
        "| model | sites | capture | the same, every layer traced | first compile | second, from the cache |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, values in models.items():
        single = values.get("capture_one_by_one")
        times = [values["capture"], single, values["first"], values["second"]]
        shown = " | ".join("-" if value is None else f"{value:.2f}" for value in times)
        lines.append(f"| {name} | {values['sites']:.0f} | {shown} |")
    lines += [
        "",
        "The first compile includes what transformers and torch import when they export for the first time in a",
        "process; the captures beside it are later ones.",
        "",
        f"A compile from the cache as it grows: a narrow Llama with one LoRA, one of {STACKED} layers with several.",
        "",
        "| | sites | nodes | seconds | per 1,000 nodes |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, values in growth.items():
        each = 1000 * values["seconds"] / values["nodes"]
        shown = f"{values['sites']:,.0f} | {values['nodes']:,.0f} | {values['seconds']:.2f} | {each:.2f}"
        lines.append(f"| {name} | {shown} |")
    return "\n".join(lines) + "\n"


def plot(results: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """Draw the growth of a compile from the cache.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = (
        ("layers", "nodes", "one adaptation, more layers"),
        ("adaptations", "sites", f"{STACKED} layers, more adaptations"),
    )
    with pyplot.rc_context({"font.size": 9, "svg.hashsalt": "graftc", "svg.fonttype": "none"}):
        figure, all_axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        for axes, (kind, along, title) in zip(all_axes, panels, strict=True):
            points = [(n.split()[0], v) for n, v in results["runs"].items() if n.endswith(f" {kind}")]
            if not points:
                continue
            x, y = [v[along] for _, v in points], [v["seconds"] for _, v in points]
            axes.plot([0, x[-1]], [0, y[-1]], color="#b9bec4", linewidth=1, linestyle="--", label="proportional")
            axes.plot(x, y, "o-", color="#2f6fb0", linewidth=1.5, markersize=4, label="measured")
            for (name, _), at, value in zip(points, x, y, strict=True):
                axes.annotate(name, (at, value), (5, -11), textcoords="offset points", color="#5f6368")
            axes.set_title(f"{title} (numbers: {kind})", loc="left", fontsize=10)
            axes.set_xlabel(f"{along} of the adapted graph" if along == "nodes" else "adapted sites")
            axes.set_ylabel("seconds from the cache")
            axes.set_xlim(0)
            axes.set_ylim(0, 1.12 * max(y))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#e4e6e8", linewidth=0.7)
            axes.set_axisbelow(True)
            axes.legend(frameon=False, loc="lower right")
        for path in paths:
            figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else {})
        pyplot.close(figure)


def main() -> None:
    """Run all measurements and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", default="", help="runs whose names contain this")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "compile_time", help="path without a suffix")
    parser.add_argument("--one", choices=list(RUNS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(RUNS[arguments.one]()))
        return
    import torch
    import transformers

    results: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "command": " ".join(["python", *sys.argv]),
        "load": f"{os.getloadavg()[0]:.1f}",
        "repeat": arguments.repeat,
        "runs": {},
    }
    for name in RUNS:
        if arguments.only in name:
            runs = [run(name) for _ in range(arguments.repeat)]
            results["runs"][name] = {key: statistics.median(one[key] for one in runs) for key in runs[0]}
            print(name, {key: round(value, 2) for key, value in results["runs"][name].items()}, flush=True)
    results["load"] += f" before and {os.getloadavg()[0]:.1f} after"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    arguments.out.with_suffix(".md").write_text(table(results))
    try:
        plot(results, [arguments.out.with_suffix(suffix) for suffix in (".png", ".svg")])
    except ImportError:
        print("no picture without matplotlib")


if __name__ == "__main__":
    main()
