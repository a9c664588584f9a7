"""Artifacts that are sealed correctly but state invalid facts: each is refused with its code, in bounded time."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import graftc
from graftc.runtime.artifact import open_artifact
from graftc.runtime.loading.verify import verify
from graftc.specs.errors.diagnostics import GraftError
from tests.kit.folders import adapted_folder, saved_artifact, saved_base
from tests.kit.refusals import refused
from tests.runtime.artifact.support import edit_json, edit_manifest, mend

GRAPH = "programs/0.eval.json"
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    return saved_artifact(folder, num_hidden_layers=1)


@pytest.fixture
def artifact(intact: Path, tmp_path: Path) -> Path:
    shutil.copytree(intact, tmp_path / "artifact")
    return tmp_path / "artifact"


def read_all(artifact: Path) -> None:
    opened = open_artifact(artifact)
    opened.tensors()
    opened.program("eval")


def code_of(artifact: Path) -> str:
    """Return the code with which reading all of an artifact is refused, and check that this is quick."""
    error = refused(read_all, artifact, seconds=5)
    assert error.exit_code == 3
    return error.code


# --- manifests --------------------------------------------------------------------------------------------------


def _signature(**changes: Any) -> dict[str, Any]:
    def change(signatures: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**signatures[0], **{k: v(signatures[0][k]) if callable(v) else v for k, v in changes.items()}}]

    return {"signatures": change}


def _input(**changes: Any) -> dict[str, Any]:
    return _signature(inputs=lambda inputs: [{**inputs[0], **changes}, *inputs[1:]])


def _base(**changes: Any) -> dict[str, Any]:
    return {"base": lambda base: {**base, **{k: v(base[k]) if callable(v) else v for k, v in changes.items()}}}


def _first(table: str, **changes: Any) -> dict[str, Any]:
    return {table: lambda data: {**data, next(iter(data)): {**next(iter(data.values())), **changes}}}


MANIFESTS: dict[str, dict[str, Any]] = {
    "no signatures": {"signatures": []},
    "adapters of a list": {"adapters": [1]},
    "constants of a list": {"constants": [1]},
    "files of a text": {"files": "x"},
    "input type": _input(dtype="zz"),
    "huge axes": _input(axes=[2**70, 3]),
    "large axes": _input(axes=[2**24, 2**24]),
    "negative axes": _input(axes=[-1, 3]),
    "axes of code": _input(axes=["batch; import os", 3]),
    "many axes": _input(axes=[1] * 1000),
    "input of code": _input(name="x; import os"),
    "input of a keyword": _input(name="lambda"),
    "input of another form": _input(name="\u017felf"),
    "inputs of one name": _signature(inputs=lambda inputs: [inputs[0], inputs[0]]),
    "unknown constant": _signature(captures=lambda captures: [{**captures[0], "constants": ["nothing"]}]),
    "unknown graph": _signature(captures=lambda captures: [{**captures[0], "graph": "zz"}]),
    "some graphs": _signature(graphs=lambda graphs: {"eval": graphs["eval"]}),
    "flags of code": _signature(flags=[["x; import os", 1]]),
    "flag of a list": _signature(flags=[["x", [1]]]),
    "shape of many": _first("adapters", shape=[2**40, 2**40]),
    "negative shape": _first("adapters", shape=[-4, 4]),
    "type of an adapter": _first("adapters", dtype="object"),
    "alias of itself": _base(aliases=lambda aliases: {"a": "a"}),
    "aliases in a circle": _base(aliases=lambda aliases: {"a": "b", "b": "a"}),
    "alias of an alias": _base(aliases=lambda aliases: {"a": "b", "b": "bert.pooler.dense.bias"}),
    "alias that owns": _base(aliases=lambda aliases: {"bert.pooler.dense.bias": "classifier.bias"}),
    "alias of nothing": _base(aliases=lambda aliases: {"a": "nothing"}),
    "another base": _base(tensors=lambda tensors: dict(list(tensors.items())[1:])),
    "another fingerprint": _base(fingerprint="0" * 64),
    "seed": {"seed": 2**70},
    "seed of a text": {"seed": "1"},
    "a site's tensors": {"sites": lambda sites: [{**sites[0], "tensors": {"A": "nothing"}}, *sites[1:]]},
    "a site's rows": {"sites": lambda sites: [{**sites[0], "rows": [[5, 2]]}, *sites[1:]]},
    "a copy of nothing": {"trained": [{"owner": "t", "base": "nothing", "rows": None, "tensor": "nothing"}]},
    "an unknown field": {"evil": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest(name: str, artifact: Path) -> None:
    edit_manifest(artifact, **MANIFESTS[name])
    assert code_of(artifact) == "GC082"


# --- graphs -----------------------------------------------------------------------------------------------------


def _of(data: dict[str, Any], op: str, number: int = 0) -> dict[str, Any]:
    chosen: dict[str, Any] = [node for node in data["nodes"] if node["op"] == op][number]
    return chosen


def _set(op: str, number: int = 0, **changes: Any) -> Change:
    return lambda data: _of(data, op, number).update(changes)


def _shape(text: str) -> Change:
    return lambda data: data["types"].append({"dtype": "f32", "shape": [text]})


def _inputs_named(*names: str) -> Change:
    def change(data: dict[str, Any]) -> None:
        placeholders = [node for node in data["nodes"] if node["op"] == "placeholder"]
        for node, entry, name in zip(placeholders, data["inputs"], names, strict=False):
            node["target"] = entry["name"] = name

    return change


def _power(levels: int) -> str:
    text = "9"
    for _ in range(levels):
        text = f"({text})**8"
    return text


GRAPHS: dict[str, Change | str] = {
    "deep": '{"schema": ' + "[" * 100_000,
    "a list": "[1]",
    "no JSON": "{",
    "a key twice": '{"schema": 3, "schema": 3}',
    "half a character": '{"schema": "\\ud800"}',
    "many digits": '{"schema": ' + "9" * 5_000 + "}",
    "not a number": '{"schema": NaN}',
    "endless": '{"schema": 1e999}',
    "a module that is not text": _set("call_function", module=5),
    "an origin that is not a table": _set("call_function", custom=5),
    "an origin of numbers": _set("call_function", custom={"graftc": {"adaptation": 1}}),
    "more than an origin": _set("call_function", custom={"graftc": {}, "x": 1}),
    "arguments of a text": _set("call_function", args="x"),
    "arguments of a number": _set("call_function", args=5),
    "keywords of a list": _set("call_function", kwargs=[1]),
    "a tensor of no name": _set("get_attr", target=None),
    "a tensor of a number": _set("get_attr", target=5),
    "a tensor above": _set("get_attr", target="..x"),
    "a tensor with arguments": _set("get_attr", args={"tuple": [1]}),
    "inputs of other forms": _inputs_named("\u017felf", "\ufb01eld"),
    "inputs of one name": _inputs_named("x", "x"),
    "inputs of one name when read": _inputs_named("\ufb01", "fi"),
    "an input called self": _inputs_named("self"),
    "a node called self": _set("call_function", name="self"),
    "a node of code": _set("call_function", name="x; import os"),
    "a node of a keyword": _set("call_function", name="lambda"),
    "two nodes of one name": lambda data: _of(data, "call_function", 1).update(name=_of(data, "call_function")["name"]),
    "another mode": lambda data: data.update(mode="zz"),
    "a mode of a number": lambda data: data.update(mode=1),
    "the other mode": lambda data: data.update(mode="train"),
    "flags": lambda data: data.update(flags=[["use_cache", True]]),
    "entry": lambda data: data.update(entry="x()"),
    "history": lambda data: data.update(history=[["a", "b", "c"]]),
    "an input too many": lambda data: data["inputs"].append(data["inputs"][0]),
    "an input too few": lambda data: data["inputs"].pop(),
    "an input of another type": lambda data: data["inputs"][0].update(dtype="f32"),
    "an input of another rank": lambda data: data["inputs"][0].update(shape=["batch"], ranges=[]),
    "ranges": lambda data: data["inputs"][0].update(ranges=[[5, 2]] * 2),
    "outputs of an unknown kind": lambda data: data["outputs"].update(kind="zz"),
    "outputs without a class": lambda data: data["outputs"].pop("class") and None,
    "outputs of other fields": lambda data: data["outputs"].update(fields=["evil"]),
    "more outputs": lambda data: data["outputs"].update(kind="list", children=[{"kind": "leaf"}] * 9),
    "outputs of a class elsewhere": lambda data: data["outputs"].update(
        {"class": "transformers.trainer_utils:EvalPrediction"}
    ),
    "outputs of a class of the same name": lambda data: data["outputs"].update(
        {"class": "transformers.models.bert.modeling_bert:ModelOutput"}
    ),
    "no output": lambda data: data["nodes"].pop() and None,
    "two outputs": lambda data: data["nodes"].append(data["nodes"][-1]),
    "an input behind": lambda data: data["nodes"].insert(-1, {**_of(data, "placeholder"), "name": "z", "target": "z"}),
    "a type too far": _set("call_function", type=10**6),
    "a type before": _set("call_function", type=-1),
    "a type that is true": _set("call_function", type=True),
    "a type of text": lambda data: data["types"].append({"dtype": "f32", "shape": "3"}),
    "another type": lambda data: data["types"].insert(0, {"dtype": "f32", "shape": ["3"]}),
    "powers of powers": _shape(_power(12)),
    "a power of a symbol": _shape("(((s0+9)**8)**8)**8"),
    "a large size": _shape("2**62*4"),
    "a product": _shape("*".join(["999999999"] * 50)),
    "a sum of great length": _shape("+".join(["s0"] * 600)),
    "deep brackets": _shape("(" * 300 + "s0" + ")" * 300),
    "deep signs": _shape("-" * 300 + "s0"),
    "many digits in a size": _shape("9" * 5_000),
    "nested remainders": _shape("Mod(" * 60 + "s0" + ",3)" * 60),
    "another symbol": _shape("evil"),
    "many symbols": lambda data: data["types"].extend({"dtype": "f32", "shape": [f"s{i}"]} for i in range(5_000)),
    "negative": _shape("-3"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph(name: str, artifact: Path) -> None:
    edit_json(artifact, GRAPH, GRAPHS[name])
    assert code_of(artifact) == "GC082"


# --- certificates and tensors -----------------------------------------------------------------------------------

CERTIFICATES: dict[str, Change | str] = {
    "a list": "[1]",
    "a text": '"x"',
    "deep": "[" * 100_000,
    "a key twice": '{"passed": true, "passed": true}',
    "nothing": "{}",
    "passed of a text": lambda data: data.update(passed="yes"),
    "passed, though a site did not": lambda data: data["sites"][0].update(algebra=1.0),
    "not passed, though everything did": lambda data: data.update(passed=False),
    "sites of numbers": lambda data: data.update(sites=[1]),
    "outputs of a list": lambda data: data.update(outputs=[1]),
    "a structure of a number": lambda data: data.update(structure=5),
}


@pytest.mark.parametrize("name", CERTIFICATES)
def test_a_certificate(name: str, artifact: Path) -> None:
    from graftc.records.certificate import Certificate
    from graftc.runtime.artifact.records import read_record

    edit_json(artifact, "certificates/fold.json", CERTIFICATES[name])
    file = open_artifact(artifact).manifest.certificate
    assert file is not None
    with pytest.raises(GraftError) as caught:
        read_record(Certificate, artifact / file, str(artifact), file)
    assert caught.value.code == "GC082"


def _header(change: Callable[[str], str]) -> Callable[[bytes], bytes]:
    def apply(raw: bytes) -> bytes:
        size = int.from_bytes(raw[:8], "little")
        text = change(raw[8 : 8 + size].decode()).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + raw[8 + size :]

    return apply


def _twice(text: str) -> str:
    """Repeat the first tensor, which the library accepts."""
    data = json.loads(text)
    name = next(name for name in data if name != "__metadata__")
    return text.rstrip()[:-1] + f", {json.dumps(name)}: {json.dumps(data[name])}}}"


TENSORS: dict[str, Callable[[bytes], bytes]] = {
    "a name twice": _header(_twice),
    "a deep header": _header(lambda text: "[" * 50_000),
    "a header that is a list": _header(lambda text: "[]"),
    "a header without end": lambda raw: (2**62).to_bytes(8, "little") + raw[8:],
    "empty": lambda raw: b"",
    "short": lambda raw: raw[:5],
    "offsets": _header(lambda text: text.replace("[0,", "[-8,", 1)),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_file_of_tensors(name: str, artifact: Path) -> None:
    file = artifact / "adapters.safetensors"
    file.write_bytes(TENSORS[name](file.read_bytes()))
    mend(artifact)
    assert code_of(artifact) == "GC082"


def test_a_manifest_without_end(artifact: Path) -> None:
    """A sparse file of a terabyte is not read."""
    with (artifact / "manifest.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(GraftError) as caught:
        open_artifact(artifact)
    assert caught.value.code == "GC082"


@pytest.mark.slow
def test_verify_says_so_without_a_base(artifact: Path) -> None:
    assert verify(artifact, files_only=True).passed
    edit_json(artifact, GRAPH, GRAPHS["another mode"])
    verification = verify(artifact, files_only=True)
    assert [check.name for check in verification.checks if check.passed is False] == ["graph files"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spec.yaml", "programs/0.train.json"])
def test_a_file_of_gigabytes_is_refused_before_it_is_read(name: str, tmp_path: Path) -> None:
    """A sparse file takes no space on a disk, but hours to digest."""
    path = saved_artifact(tmp_path)
    os.truncate(path / name, 8 << 30)
    edit_manifest(path, files=lambda files: {**files, name: {**files[name], "bytes": 8 << 30}})
    started = time.process_time()
    with pytest.raises(GraftError, match=rf"GC082.*{name}"):
        open_artifact(path)
    assert time.process_time() - started < 5


@pytest.mark.slow
def test_what_is_not_finite_is_saved_without_a_certificate_only(tmp_path: Path) -> None:
    compiled = adapted_folder(saved_base(tmp_path / "base"))
    with torch.no_grad():
        next(p for p in compiled.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(GraftError, match=r"GC051.*not finite"):
        compiled.save(tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()
    compiled.save(tmp_path / "artifact", certify=False)
    assert any(t.isnan().any() for t in graftc.load(tmp_path / "artifact").adapter_state_dict().values())
