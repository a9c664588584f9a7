"""One ONNX graph serves adapters of any size through public calls of ONNX Runtime, and refuses foreign ones."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.runtime.export.exchange import Exchange
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of, perturb
from graftc.testing.compare import inputs_for
from tests.kit.models import adapted, fresh

Run = Callable[..., list[Tensor]]


class Net(nn.Module):
    """A model that is captured and exported quickly."""

    def __init__(self, seed: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc, self.out = nn.Linear(6, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.out(self.fc(x).relu())}


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
EVERY = {"modules": "*"}
LORA: dict[str, Any] = {"method": "lora", "target": EVERY, "rank": 2}
INNER: dict[str, Any] = {
    **{"method": "bottleneck", "name": "inner", "target": {"modules": "fc"}},
    **{"activation": "gelu", "bottleneck": 3},
}


def net(*adapt: dict[str, Any], seed: int = 3, **spec: Any) -> Any:
    """Return an adapted `Net` with random values of the adaptations."""
    compiled = graftc.compile({"adapt": list(adapt), **spec}, Net(seed).eval(), {"x": torch.zeros(2, 6)}).eval()
    perturb(compiled, 0.3)
    return compiled


def opened(path: Path) -> Run:
    """Return a function that runs a file with adapters in ONNX Runtime's format, by its public calls alone."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor], *adapters: Path) -> list[Tensor]:
        own = onnxruntime.RunOptions()
        active = [onnxruntime.LoraAdapter() for _ in adapters]
        for adapter, path in zip(active, adapters, strict=True):
            adapter.Load(str(path))
            own.add_active_adapter(adapter)
        values = session.run(None, {name: value.numpy() for name, value in inputs.items()}, own)
        return [torch.from_numpy(value) for value in values]

    return run


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph with two adaptations as inputs, and their values beside it."""
    compiled = net({**LORA, "rank": 2}, {**INNER, "bottleneck": 3})
    path: Path = compiled.export(
        tmp_path_factory.mktemp("graph") / "net.onnx", inputs=["lora", "inner"], adapter_format="onnx_adapter"
    )
    return path


@pytest.mark.full
def test_a_small_graph(graph: Path, tmp_path: Path) -> None:
    """Adapters of other ranks and scales, of another method, both, and none, each equal their own model."""
    import onnx

    names = {"net.onnx", "net.onnx.lora.onnx_adapter", "net.onnx.inner.onnx_adapter"}
    assert {file.name for file in graph.parent.iterdir()} == names
    run = opened(graph)
    base: Any = Net().eval()
    with torch.no_grad():
        assert largest_difference(run({"x": X}), [base(X)["logits"]]) <= 1e-6
    models = {
        "three": net({**LORA, "rank": 3, "alpha": 5, "name": "three"}),
        "four": net({**LORA, "rank": 4, "rslora": True, "name": "four"}),
        "one": net({**LORA, "rank": 1, "target": {"modules": "out"}}),
        "inner": net({**INNER, "bottleneck": 4, "scale": 0.5, "bias": False}),
        "both": net({**LORA, "rank": 5}, {**INNER, "bottleneck": 2, "scale": "learned"}),
    }
    found = {}
    for name, compiled in models.items():
        path = compiled.export(tmp_path / f"{name}.onnx_adapter", "onnx-adapter", graph=graph)
        found[name] = run({"x": X}, path)
        assert largest_difference(found[name], outputs_of(compiled, {"x": X})) <= 1e-5, name
    assert largest_difference(found["three"], found["four"]) > 1e-2
    beside = [graph.with_name(f"net.onnx.{name}.onnx_adapter") for name in ("lora", "inner")]
    own = net({**LORA, "rank": 2}, {**INNER, "bottleneck": 3})
    assert largest_difference(run({"x": X}, *beside), outputs_of(own, {"x": X})) <= 1e-5
    sizes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in onnx.load(graph).graph.input
    }
    assert sizes["fc.graftc.lora.A"] == ["lora fc.weight", 6] and sizes["fc.graftc.lora.B"] == [9, "lora fc.weight"]
    assert sizes["out.graftc.lora.A"] == ["lora out.weight", 9]


@pytest.mark.slow
def test_safetensors(graph: Path, tmp_path: Path) -> None:
    """An adapter's values can be written as safetensors, and passed as inputs."""
    import onnxruntime
    from safetensors.numpy import load_file

    compiled = net({**LORA, "rank": 3})
    path = compiled.export(tmp_path / "three.safetensors", "onnx-adapter", graph=str(graph), slot="lora")
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"x": X.numpy(), **load_file(path)})
    assert largest_difference([torch.from_numpy(logits)], outputs_of(compiled, {"x": X})) <= 1e-5


def named_module(seed: int = 3) -> Any:
    """Return a model whose place is not one of the graph's."""
    return net({**LORA, "rank": 2, "target": {"modules": "fc"}}, seed=seed)


FOREIGN: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "base": (lambda: named_module(seed=4), {}, "has another base"),
    "method": (lambda: net({"method": "dora", "rank": 2, "target": EVERY}), {}, "no input 'dora' for the dora 'dora'"),
    "field": (
        lambda: net({**INNER, "activation": "tanh"}),
        {},
        "activation of 'inner' is 'tanh', but the graph is for 'gelu'",
    ),
    "place": (lambda: net({**INNER, "target": {"modules": "out"}}), {}, "no input out.graftc.inner.down"),
    "kind": (lambda: net({"method": "loha", "rank": 2, "target": EVERY}), {}, "'loha' (loha) cannot be exchanged"),
    "slot": (lambda: net(LORA), {"slot": "other"}, "no input 'other'"),
    "two": (
        lambda: net({**LORA, "name": "a"}, {**LORA, "name": "b"}),
        {},
        "'b' and 'a' both go in the place of 'lora'",
    ),
    "trained": (lambda: net(LORA, train=["out"]), {}, "'trained' changes tensors of the base"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", list(FOREIGN))
def test_a_foreign_adapter(graph: Path, case: str, tmp_path: Path) -> None:
    """The error names the mismatch, and nothing is written."""
    make, options, message = FOREIGN[case]
    with pytest.raises(GraftError) as caught:
        make().export(tmp_path / "x.onnx_adapter", "onnx-adapter", graph=graph, **options)
    assert caught.value.code == "GC192"
    assert message in caught.value.message
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_is_no_graph(graph: Path, tmp_path: Path) -> None:
    """A missing graph, another file, a graph without such inputs and a merged model are refused."""
    compiled = net({**LORA, "rank": 2})
    (tmp_path / "text.onnx").write_text("no graph")
    plain = compiled.export(tmp_path / "plain.onnx")
    before = set(tmp_path.iterdir())
    cases: list[tuple[Any, Any, str]] = [
        (compiled, None, "GC073"),
        (compiled, tmp_path / "missing.onnx", "GC192"),
        (compiled, tmp_path / "text.onnx", "GC192"),
        (compiled, plain, "GC192"),
        (compiled.merge(), graph, "GC060"),
    ]
    for model, of, code in cases:
        with pytest.raises(GraftError) as caught:
            model.export(tmp_path / "x.onnx_adapter", "onnx-adapter", graph=of)
        assert caught.value.code == code, of
    assert set(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_a_graph_is_not_replaced(graph: Path, tmp_path: Path) -> None:
    """Not even by force, and neither are its weights; adapters beside it may be written again."""
    import onnx

    own = tmp_path / "own"
    own.mkdir()
    loaded = onnx.load(graph)
    onnx.save(loaded, own / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
    (own / "config.json").write_text("{}")
    (tmp_path / "link.onnx").symlink_to(own / "net.onnx")
    compiled = net({**LORA, "rank": 2})
    before = {file: file.read_bytes() for file in own.iterdir()}
    cases = [("net.onnx", own / "net.onnx"), ("net.data", own / "net.onnx"), ("../link.onnx", own / "net.onnx")]
    for name, of in [*cases, *((name, own) for name in ("net.onnx", "net.data", "config.json"))]:
        with pytest.raises(GraftError, match="one of its sources") as caught:
            compiled.export(own / name, "onnx-adapter", graph=of, force=True)
        assert caught.value.code == "GC063", name
    assert {file: file.read_bytes() for file in own.iterdir()} == before
    for _ in range(2):
        compiled.export(own / "again.onnx_adapter", "onnx-adapter", graph=own / "net.onnx", force=True)


@pytest.mark.slow
def test_values_that_are_not_finite(graph: Path, tmp_path: Path) -> None:
    compiled = net({**LORA, "rank": 2})
    with torch.no_grad():
        compiled.get_parameter("fc.graftc.lora.A")[0, 0] = torch.nan
    with pytest.raises(GraftError, match=r"fc\.graftc\.lora\.A has values that are not finite") as caught:
        compiled.export(tmp_path / "x.onnx_adapter", "onnx-adapter", graph=graph)
    assert caught.value.code == "GC060" and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_defaults_are_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A graph whose defaults change the base is refused."""
    default = Exchange.default
    monkeypatch.setattr(Exchange, "default", lambda self, name: torch.ones_like(default(self, name)))
    with pytest.raises(GraftError) as caught:
        net(LORA).export(tmp_path / "net.onnx", inputs="lora")
    assert caught.value.code == "GC060" and "differs from torch" in caught.value.message
    assert not list(tmp_path.iterdir())


TARGET = {"role": ["attn.{q,o}", "ffn.{up,down}"]}
RANKS = (4, 8, 12, 16, 20, 24, 28, 32)


@pytest.mark.full
def test_ten_models(tmp_path: Path) -> None:
    """One graph of a decoder: eight LoRAs of ranks 4 to 32, a bottleneck, a prefix and the base."""
    slots = [
        {"method": "lora", "rank": 8, "target": TARGET},
        {"method": "pfeiffer", "bottleneck": 5},
        {"method": "prefix", "length": 3},
    ]
    graph = adapted("llama", *slots, noise=0.2).export(tmp_path / "model.onnx", inputs=["lora", "pfeiffer", "prefix"])
    base = fresh("llama", slots[0]).eval().merge(allow_unchanged=True).export(tmp_path / "base.onnx")
    run, plain = opened(graph), opened(base)
    others = [{"method": "lora", "rank": rank, "alpha": 3 * rank**0.5, "target": TARGET} for rank in RANKS]
    others += [{"method": "pfeiffer", "bottleneck": 12}, {"method": "prefix", "length": 7}]
    outputs = []
    for number, adapt in enumerate(others):
        compiled = adapted("llama", adapt, noise=0.1, noise_seed=number)
        path = compiled.export(tmp_path / f"{number}.onnx_adapter", "onnx-adapter", graph=graph)
        for sizes in ((2, 7), (1, 5)):
            inputs = inputs_for(compiled, sizes, front=False)
            own = run(inputs, path)
            assert largest_difference(own, outputs_of(compiled, inputs)) <= 1e-4
            assert largest_difference(run(inputs), plain(inputs)) <= 1e-6
            assert largest_difference(own, plain(inputs)) > 1e-2
        outputs.append(own[0])
    assert all(float((one - other).abs().max()) > 1e-2 for one, other in pairwise(outputs))


@pytest.mark.full
def test_generation(tmp_path: Path) -> None:
    """Graphs with a cache take adapters as well: in graftc's loop, and in ONNX Runtime GenAI where it is installed."""
    from graftc.runtime.onnx_generation import load

    slots = [{"method": "lora", "rank": 4, "target": TARGET}, {"method": "prefix", "length": 3}]
    folder = adapted("llama", *slots, noise=0.2).export(
        tmp_path / "model", "onnx-generate", inputs=["lora", "prefix"], adapter_format="onnx_adapter"
    )
    assert {file.name for file in (folder / "adapters").iterdir()} == {"lora.onnx_adapter", "prefix.onnx_adapter"}
    model: Any = load(folder, threads=1)
    ids = torch.tensor([[5, 17, 40, 9, 23]])
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts = {}
    for name, adapt in (("eleven", {**slots[0], "rank": 11, "alpha": 40}), ("seven", {**slots[1], "length": 7})):
        compiled = adapted("llama", adapt, noise=0.3, noise_seed=2)
        path = compiled.export(tmp_path / f"{name}.onnx_adapter", "onnx-adapter", graph=folder)
        texts[path] = compiled.generate(ids, **greedy)[0].tolist()
        assert model.use(path).generate(ids, **greedy)[0].tolist() == texts[path]
    base = fresh("llama", slots[0]).eval().generate(ids, **greedy)[0].tolist()
    assert model.use().generate(ids, **greedy)[0].tolist() == base
    assert len({tuple(text) for text in [*texts.values(), base]}) == 3
    with pytest.raises(GraftError) as caught:
        model.use(*texts, next(iter(texts)))
    assert caught.value.code == "GC192" and "another file" in caught.value.message
    for path, text in texts.items():
        assert in_genai(folder, ids[0].tolist(), 12, path) == text
    assert in_genai(folder, ids[0].tolist(), 12) == base


def in_genai(folder: Path, ids: list[int], new: int, adapter: Path | None = None) -> list[int]:
    """Return the tokens that ONNX Runtime GenAI chooses."""
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + new, do_sample=False)
    generator = genai.Generator(model, params)
    adapters = genai.Adapters(model)
    if adapter is not None:
        adapters.load(str(adapter), "own")
        generator.set_active_adapter(adapters, "own")
    generator.append_tokens([ids])
    for _ in range(new):
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]
