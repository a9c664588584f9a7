"""Writes in graphs: a graph from a file writes only to its own values and, in train mode, to buffers."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

import graftc
from graftc.passes.core.ir.effects import Memory, updated
from graftc.passes.core.ir.printer import structural_hash
from graftc.passes.core.ir.stored.allowed_operators import OPERATORS
from graftc.passes.core.ir.stored.serialise import SerialisationError, program_from_json, program_to_json
from graftc.testing.families import tiny
from tools.operators import objection, operator

CPU = torch.device("cpu")
SPEC = {"adapt": [{"method": "lora", "target": {"role": "attn.q"}, "rank": 2}]}


@pytest.fixture(scope="module")
def graph() -> dict[str, Any]:
    """The JSON of BERT's eval graph."""
    compiled = graftc.compile(SPEC, tiny("bert"))
    data: dict[str, Any] = json.loads(json.dumps(program_to_json(compiled.program("eval", base=True))))
    return data


def _type(data: dict[str, Any], dtype: str, *shape: str) -> int:
    data["types"].append({"dtype": dtype, "shape": list(shape)})
    return len(data["types"]) - 1


def _insert(data: dict[str, Any], target: str, args: list[Any], type_: int, **kwargs: Any) -> int:
    """Insert a call before the outputs and return its index."""
    at = len(data["nodes"]) - 1
    entry = {"op": "call_function", "name": f"evil_{at}", "target": target, "args": {"tuple": args}, "kwargs": kwargs}
    data["nodes"].insert(at, {**entry, "type": type_, "module": ""})
    return at


def _find(data: dict[str, Any], op: str, target: str = "") -> int:
    return next(i for i, n in enumerate(data["nodes"]) if n["op"] == op and target in str(n["target"]))


ROOTS = {
    "word embeddings": ("get_attr", "word_embeddings.weight"),
    "a bias": ("get_attr", "classifier.bias"),
    "an input": ("placeholder", "input_ids"),
}
VIEWS = {
    "itself": [],
    "a view": ["aten.view.default"],
    "a slice of a transposed one": ["aten.t.default", "aten.slice.Tensor"],
    "alias": ["aten.alias.default", "aten.detach.default"],
    "what may be a view": ["aten.dropout.default"],
    "the same type": ["aten.type_as.default"],
    "einsum": ["aten.einsum.default"],
    "an item of parts": ["aten.chunk.default", "operator.getitem"],
}
WRITES: dict[str, Any] = {
    "fill_": ("aten.fill_.Scalar", lambda n: [n, 65]),
    "zero_": ("aten.zero_.default", lambda n: [n]),
    "copy_": ("aten.copy_.default", lambda n: [n, n]),
    "add_": ("aten.add_.Tensor", lambda n: [n, n]),
    "mul_": ("aten.mul_.Scalar", lambda n: [n, 2]),
    "index_put_": ("aten.index_put_.default", lambda n: [n, [n], n]),
}


def _step(view: str, source: int) -> list[Any]:
    node = {"node": source}
    return {
        "aten.view.default": [node, [-1]],
        "aten.slice.Tensor": [node, 0, 0, 1],
        "aten.dropout.default": [node, 0.0, True],
        "aten.type_as.default": [node, node],
        "aten.einsum.default": ["ij->ji", [node]],
        "aten.chunk.default": [node, 2],
        "operator.getitem": [node, 0],
    }.get(view, [node])


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_what_is_not_the_graphs_own(root: str, view: str, write: str, graph: dict[str, Any]) -> None:
    """The write is recognised and refused, through any chain of views."""
    data = copy.deepcopy(graph)
    node = _find(data, *ROOTS[root])
    kind = data["nodes"][node]["type"]
    for step in VIEWS[view]:
        node = _insert(data, step, _step(step, node), kind)
    target, args = WRITES[write]
    _insert(data, target, args({"node": node}), kind)
    with pytest.raises(SerialisationError, match=r"writes to (the input )?[\w.]+"):
        program_from_json(data, CPU)


FORBIDDEN = (
    *("aten.from_file.default", "aten.set_.source_Storage", "aten.set_.source_Tensor", "aten.set_.default"),
    *("aten.resize_.default", "aten.resize_as_.default", "aten.as_strided.default", "aten.as_strided_.default"),
    *("aten.add.out", "aten.fill.Tensor_out", "aten.copy.out", "aten.matmul.out", "aten.randn.generator"),
    *("aten.normal.Tensor_Tensor", "aten.randint.generator", "aten.bernoulli.out", "aten.set_data.default"),
    *("aten.record_stream.default", "aten.empty_strided.default", "aten.new_empty_strided.default"),
    *("aten._local_scalar_dense.default", "aten.pin_memory.default", "aten.save.default", "aten.manual_seed.default"),
    *("prims.device_put.default", "prim.Print.default", "inductor.resize_storage_bytes_.default", "os.system"),
    *(
        "c10d.broadcast_.default",
        "fsdp.copy_.default",
        "profiler._record_function_enter.default",
        "aten.as_strided_copy.default",
    ),
    *(
        "quantized.linear_prepack.default",
        "mkldnn._reorder_linear_weight.default",
        "operator.attrgetter",
        "aten.data.default",
    ),
)


@pytest.mark.parametrize("name", FORBIDDEN)
def test_an_operator_that_is_not_listed(name: str, graph: dict[str, Any]) -> None:
    data = copy.deepcopy(graph)
    _insert(data, name, [{"node": 0}], 0)
    with pytest.raises(SerialisationError, match="operator"):
        program_from_json(data, CPU)


def test_from_file_and_fill_leave_the_file_alone(graph: dict[str, Any], tmp_path: Any) -> None:
    file = tmp_path / "victim"
    file.write_bytes(b"B" * 16)
    data = copy.deepcopy(graph)
    kind = _type(data, "u8", "16")
    mapped = _insert(data, "aten.from_file.default", [str(file), True, 16], kind, dtype={"dtype": "u8"})
    _insert(data, "aten.fill_.Scalar", [{"node": mapped}, 65], kind)
    with pytest.raises(SerialisationError, match="from_file"):
        program_from_json(data, CPU)
    assert file.read_bytes() == b"B" * 16


def test_every_listed_operator_keeps_the_rules() -> None:
    """No rule objects to a listed operator, and names of those that write to an argument end in an underscore."""
    # Those of transformers exist only in some of its releases.
    known = [name for name in OPERATORS if operator(name) is not None or not name.startswith("transformers.")]
    assert {name: why for name in known if (why := objection(name)) is not None} == {}
    for name in known:
        overload = operator(name)
        assert (
            overload is not None and overload._schema.is_mutable == name.split(".")[1].endswith("_")
        ) or "__" in name


@pytest.mark.parametrize("name", FORBIDDEN)
def test_the_rules_object_to_what_is_forbidden(name: str) -> None:
    assert name not in OPERATORS
    if name.startswith("aten.") and operator(name) is not None and "normal" not in name and "scalar" not in name:
        assert objection(name) is not None or "generator" in name or "strided" in name or "data" in name


@pytest.mark.slow
def test_values_of_the_graphs_own_may_change(graph: dict[str, Any]) -> None:
    """A graph may write to its own values, and the structural hash distinguishes the writes."""
    hashes = {structural_hash(program_from_json(copy.deepcopy(graph), CPU))}
    logits = graph["nodes"][-1]["args"]["tuple"][0]["tuple"][0]["node"]
    for write, value in (("aten.fill_.Scalar", 0), ("aten.fill_.Scalar", 1), ("aten.mul_.Scalar", 2)):
        data = copy.deepcopy(graph)
        _insert(data, write, [{"node": logits}, value], data["nodes"][logits]["type"])
        program = program_from_json(data, CPU)
        assert not updated(program.graph) and len(Memory(program.graph).writes) == 1
        hashes.add(structural_hash(program))
    assert len(hashes) == 4


class Counting(nn.Module):
    """A model with batch normalisation and a counter that every training step writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return normalised scores."""
        if self.training:
            self.steps.add_(1)
        y: torch.Tensor = self.norm(self.fc(x))
        return y


class Writing(nn.Module):
    """A model that writes where no graph may: to its input or to a parameter."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.fc = what, nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores."""
        if self.what == "input":
            x.mul_(2)
        if self.what == "parameter":
            self.fc.bias.detach().add_(1)
        y: torch.Tensor = self.fc(x)
        return y


FC = {"adapt": [{"method": "lora", "target": {"modules": "fc"}, "rank": 2}]}


@pytest.mark.slow
def test_buffers_that_training_updates() -> None:
    compiled = graftc.compile(FC, Counting(), (torch.randn(3, 6),), cache=False)
    assert {"steps", "norm.num_batches_tracked", "norm.running_mean", "norm.running_var"} == set(
        updated(compiled.program("train").graph)
    )
    assert not updated(compiled.program("eval").graph)
    for mode in ("train", "eval"):
        program = compiled.program(mode)
        again = program_from_json(json.loads(json.dumps(program_to_json(program))), CPU)
        assert structural_hash(again) == structural_hash(program)


@pytest.mark.slow
def test_no_eval_graph_updates_a_buffer() -> None:
    compiled = graftc.compile(FC, Counting(), (torch.randn(3, 6),), cache=False)
    data = json.loads(json.dumps(program_to_json(compiled.program("train"))))
    data["mode"] = "eval"
    with pytest.raises(SerialisationError, match="allowed only in train mode"):
        program_from_json(data, CPU)


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "mixtral"])
def test_what_is_captured_is_listed(family: str) -> None:
    """Every graph of the family can be serialised; the contract checks the same for every method and family."""
    compiled = graftc.compile(SPEC, tiny(family))
    for program in compiled.compilation.programs.values():
        assert program_to_json(program)["nodes"]


class Masked(nn.Module):
    """A model with scores from an einsum with a parameter, masked in place, as in Funnel."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("bi,ij->bj", x, self.kernel)
        scores *= 0.5
        return scores


class Transposed(Masked):
    """A model with an einsum of one operand, whose result is a view of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel = torch.einsum("ij->ji", self.kernel.detach())
        kernel *= 0.5
        return x @ kernel.t()


@pytest.mark.parametrize(("model", "written"), [(Masked, "call_function"), (Transposed, "placeholder")])
def test_a_product_is_a_value_of_its_own_and_a_transposed_matrix_is_not(model: type[nn.Module], written: str) -> None:
    exported = torch.export.export(model(), (torch.randn(2, 6),))  # exported graphs take parameters as inputs
    writes = Memory(exported.graph_module.graph).writes
    assert [{root.op for root in roots} for roots in writes.values()] == [{written}]


class Mixed(nn.Module):
    """A model that adds wide values to narrow ones in place, as PEFT's LoRA does."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(6, 5, dtype=torch.bfloat16)
        self.wide = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.narrow(x)
        out += self.wide(x.float())
        out.mul_(torch.tensor(1.5))
        out.addcmul_(out * 1, torch.ones(5, dtype=torch.bfloat16))
        return self.narrow(out[:, :1].expand(-1, 6))


def test_what_is_written_in_place_keeps_its_type() -> None:
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(3, 6).bfloat16()
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "narrow"}}]}
    compiled = graftc.compile(spec, model, {"x": x}).eval()
    assert torch.equal(compiled(x=x), model(x))
    dtypes = [n.meta["val"].dtype for n in compiled.program("eval", base=True).graph.nodes if n.op == "call_function"]
    assert {str(dtype) for dtype in dtypes} == {"torch.bfloat16", "torch.float32"}
