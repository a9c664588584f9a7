"""Routes of `serve-plan`: an engine answers as the artifact does with what their commands make."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import graftc
from graftc.records.serving.plans import ServingPlan, ServingRoute
from graftc.runtime.serving.engines import ENGINES
from graftc.runtime.serving.running import run_engine
from tests.applications.serving.served_base import METHODS, PROMPTS, TOKENS, artifact, base_folder, greedy, loaded
from tests.cli.support import run_here

OUT_OF_THE_GRAPH = ("bottleneck", "prefix", "prompt")
"""Methods that no weight can contain."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("planned") / "base", attention_bias=True)


@pytest.fixture(scope="module")
def base_gguf(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base for llama.cpp."""
    file = tmp_path_factory.mktemp("gguf") / "base.gguf"
    unchanged = graftc.compile(dict(METHODS["lora"]), loaded(base)).eval()
    unchanged.merge(allow_unchanged=True).export(file, format="gguf")
    return file


def of_kind(plan: ServingPlan, kind: str) -> ServingRoute:
    return next(route for route in plan.routes if route.kind == kind and route.engine == plan.engine)


def followed(route: ServingRoute, capsys: pytest.CaptureFixture[str]) -> Path:
    """Run a route's commands and return the file or folder that the engine loads, which the last one makes."""
    for line in route.commands:
        words = shlex.split(line)
        assert words[0] == "graftc"
        outcome = run_here(capsys, *words[1:])
        assert outcome.status == 0, outcome
    assert route.served == words[words.index("--out") + 1]
    return Path(route.served)


def answers(route: ServingRoute, made: Path, base: Path) -> Sequence[Sequence[int]]:
    adapter = None if route.kind in ("merged", "graph") else made
    arguments: dict[str, Any] = {"base": made} if adapter is None else {"base": base, "adapter": adapter}
    prompts = PROMPTS.tolist()
    return run_engine(route.engine, prompts=prompts, tokens=TOKENS, threads=1, limit=120.0, **arguments).tokens


@pytest.mark.full
@pytest.mark.parametrize("method", [name for name in METHODS if name not in OUT_OF_THE_GRAPH])
def test_llamacpp(method: str, base: Path, base_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The chosen route is exact, and llama.cpp computes the artifact's tokens with what its commands make."""
    compiled = artifact(base, method, tmp_path / method)
    plan = graftc.serve_plan(tmp_path / method, "llama.cpp")
    assert plan.chosen is not None
    route = plan.routes[plan.chosen]
    assert route.exact and route.engine == "llama.cpp" and (route.output_error or 0) < 1e-4
    made = followed(route, capsys)
    assert made.stat().st_size == route.bytes if route.kind != "merged" else made.is_file()
    assert answers(route, made, base_gguf) == greedy(compiled) != greedy(loaded(base))


@pytest.mark.full
@pytest.mark.parametrize("method", [*OUT_OF_THE_GRAPH, "bitfit"])
def test_genai(method: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Adaptations that no weight can contain are served in the graph, as the plan for another engine says, too."""
    compiled = artifact(base, method, tmp_path / method)
    plan = graftc.serve_plan(tmp_path / method, "genai")
    route = of_kind(plan, "graph")
    assert route.available and plan.routes[plan.chosen or 0].available
    assert answers(route, followed(route, capsys), base) == greedy(compiled) != greedy(loaded(base))
    if method in OUT_OF_THE_GRAPH:
        other = graftc.serve_plan(tmp_path / method, "openvino")
        assert not any(found.available for found in other.routes if found.engine == "openvino")
        assert [(found.kind, found.engine) for found in other.routes if found.available] == [("graph", "genai")]
        assert not of_kind(plan, "merged").available and "cannot fold" in of_kind(plan, "merged").reason


@pytest.mark.full
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine(engine: str, base: Path, tmp_path: Path) -> None:
    """Each route is available or has a reason; exact ones come first, with the cheapest in front."""
    for method in ("dora", "rows", "head-and-lora"):
        artifact(base, method, tmp_path / method)
        plan = graftc.serve_plan(tmp_path / method, engine)
        own = [route for route in plan.routes if route.engine == engine]
        assert all(route.available != bool(route.reason) or not route.exact for route in own) and own
        assert plan.routes[: len(own)] == tuple(own) and sorted(own, key=lambda r: not r.exact) == own
        assert plan.chosen is not None and plan.routes[plan.chosen].exact
        exact = [route for route in own if route.available and route.exact]
        # OpenVINO rounds a merged model to float16, so that another engine serves the artifact exactly.
        assert (plan.routes[plan.chosen].engine == engine) == bool(exact) and (exact or engine == "openvino")
        assert all(route.available and route.unmerged for route in plan.routes[len(own) :])
        if method == "head-and-lora" and "peft" in ENGINES[engine].forms:
            assert of_kind(plan, "lora-over-base").available and not of_kind(plan, "lora").available


@pytest.mark.full
def test_a_new_base(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PEFT computes the artifact's tokens with the LoRA and the base that the commands make, also in odd folders."""
    from peft import PeftModel

    place = tmp_path / "it's a $(place)"
    place.mkdir()
    compiled = artifact(base, "head-and-lora", place / "head-and-lora")
    route = of_kind(graftc.serve_plan(place / "head-and-lora", "vllm"), "lora-over-base")
    made = followed(route, capsys)
    assert route.base is not None and graftc.serve_check(made, "vllm", base=route.base).passed
    read = PeftModel.from_pretrained(loaded(Path(route.base)), made).eval()
    assert greedy(read) == greedy(compiled) != greedy(loaded(base))


@pytest.mark.full
def test_ranks_and_errors(base: Path, tmp_path: Path) -> None:
    """Vectors need full rank; below that, the error and the engine's own limit are stated as measured."""
    plain = base_folder(tmp_path / "plain")
    artifact(plain, "ia3", tmp_path / "ia3")
    plan = graftc.serve_plan(tmp_path / "ia3", "vllm", error=0.2, merged=False)
    exact, near = of_kind(plan, "lora"), of_kind(plan, "lora-within-error")
    assert exact.rank == 40 and exact.needs == "--max-lora-rank 64" and (exact.site_error or 1) < 1e-6
    assert near.rank is not None and near.rank < 40 and 0.1 < (near.site_error or 0) <= 0.2 and not near.exact
    assert (near.output_error or 0) > 1e-3 > 1e-4 > (exact.output_error or 1) and (near.bytes or 0) < (exact.bytes or 0)
    assert all(route.kind != "merged" for route in plan.routes)


@pytest.mark.full
def test_a_peft_folder(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that the engine reads is served as it is; another one is imported first."""
    compiled = artifact(base, "rslora", tmp_path / "rslora")
    compiled.export(tmp_path / "adapter", format="peft")
    words = ["serve-plan", str(tmp_path / "adapter"), "--engine"]
    found = run_here(capsys, *words, "vllm", "--json", "--no-whole").data["plan"]["routes"][0]
    assert found["kind"] == "as-is" and found["available"] and found["commands"] == []
    outcome = run_here(capsys, *words, "sglang", "--json")
    first = outcome.data["plan"]["routes"][0]
    assert first["commands"][0].startswith("graftc import-peft") and outcome.data["plan"]["chosen"] == 0
    made = followed(ServingRoute(**{**first, "commands": tuple(first["commands"])}), capsys)
    assert graftc.serve_check(made, "sglang", base=base).passed
    shown = run_here(capsys, *words, "llama.cpp", "--no-whole")
    assert shown.status == 0 and "-> as-is" in shown.out and "graftc export" in shown.out


@pytest.mark.full
def test_a_path_like_an_option(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names that begin with a dash are paths in the commands, too."""
    monkeypatch.chdir(tmp_path)
    artifact(base, "rslora", tmp_path / "rslora").export("-adapter", format="peft")
    (tmp_path / "-base").symlink_to(base)
    plan = graftc.serve_plan("./-adapter", "sglang", base="./-base", merged=False)
    route = plan.routes[0]
    assert shlex.split(route.commands[0])[2:] == ["./-adapter", "--model", "./-base", "--out", "./-adapter-artifact"]
    assert graftc.serve_check(followed(route, capsys), "sglang", base="-base").passed


def test_what_is_refused(tmp_path: Path) -> None:
    for engine, options, code in (("vlm", {}, "GC068"), ("vllm", {"error": 2.0}, "GC002")):
        with pytest.raises(graftc.GraftError) as caught:
            graftc.serve_plan(tmp_path, engine, **options)
        assert caught.value.code == code
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    with pytest.raises(graftc.GraftError, match="names no base") as caught:
        graftc.serve_plan(tmp_path, "vllm")
    assert caught.value.code == "GC069"
