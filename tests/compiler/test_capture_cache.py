"""The capture cache: keys cover everything that a capture depends on, and only intact files are trusted."""

from __future__ import annotations

import ast
import copy
import hashlib
import importlib
import io
import json
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from logging import StreamHandler
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import graftc
from graftc.compiler.capture import capture_cache
from graftc.compiler.capture.defaults import default_axes
from graftc.compiler.capture.identity.capture_key import UnknownHoldingError, holdings
from graftc.compiler.capture.identity.sources import own_files
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.capture.signature import Axis
from graftc.testing import tiny
from graftc.testing.families import FAMILIES

AXES = [Axis("x", torch.float32, ("batch", 6))]
GLOBAL = {"factor": 2.0}
OPAQUE = iter([1, 2, 3])


def doubled(x: Tensor) -> Tensor:
    return x * 2


def tripled(x: Tensor) -> Tensor:
    return x * 3


def through_global(x: Tensor) -> Tensor:
    return x * GLOBAL["factor"]


def with_opaque_global(x: Tensor) -> Tensor:
    return x * next(OPAQUE)


@dataclass
class Settings:
    scale: float = 1.0
    name: str = "plain"


class Slotted:
    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        self.scale = scale


class Net(nn.Module):
    """A model whose forward calls everything in `held`."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.helper(self.fc(x))

    def helper(self, x: Tensor) -> Tensor:
        return x


class Child(Net):
    def helper(self, x: Tensor) -> Tensor:
        return super().helper(x) + 1


def key(model: nn.Module) -> str | None:
    return capture_cache.key(CaptureRequest.of(model, AXES))


def closure(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * factor


def noted(value: float) -> Callable[[Tensor], Tensor]:
    """Return a function that reads one of its own attributes."""

    def scaled(x: Tensor) -> Tensor:
        return x * scaled.value  # type: ignore[attr-defined, no-any-return]

    scaled.value = value  # type: ignore[attr-defined]
    return scaled


def named(name: str) -> Callable[[Tensor], Tensor]:
    function = closure(1.0)
    function.__name__ = name
    return function


def from_environment(x: Tensor) -> Tensor:
    return x.clamp(max=float(os.environ.get("CLAMP", "100")))


def from_file(x: Tensor) -> Tensor:
    with open(os.devnull) as file:
        return x * (1 + len(file.read()))


def from_a_name(x: Tensor) -> Tensor:
    return x * float(globals()["GLOBAL"]["factor"])


def from_an_import(x: Tensor) -> Tensor:
    return x * importlib.import_module("math").pi  # type: ignore[no-any-return]


def from_torchs_settings(x: Tensor) -> Tensor:
    return x * 2 if torch.backends.cudnn.benchmark else x


def from_threads(x: Tensor) -> Tensor:
    return x * torch.get_num_threads()


DIFFERENT: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "bool": (lambda: True, lambda: 1),
    "int": (lambda: 1, lambda: 2),
    "int and float": (lambda: 1, lambda: 1.0),
    "zeros": (lambda: 0.0, lambda: -0.0),
    "float": (lambda: 0.1, lambda: 0.1 + 1e-17 + 2e-17),
    "string": (lambda: "a", lambda: "b"),
    "dtype": (lambda: torch.float32, lambda: torch.float16),
    "list": (lambda: [1, 2], lambda: [2, 1]),
    "tuple": (lambda: (1, 2), lambda: [1, 2]),
    "nested": (lambda: {"a": [{"b": (1, {2})}]}, lambda: {"a": [{"b": (1, {3})}]}),
    "order of a dict": (lambda: {"a": 1, "b": 2}, lambda: {"b": 2, "a": 1}),
    "ordered dict": (lambda: OrderedDict(a=1), lambda: OrderedDict(a=2)),
    "set": (lambda: {1, 2}, lambda: {1, 3}),
    "tensor": (lambda: torch.tensor([1.0, 2.0]), lambda: torch.tensor([1.0, 3.0])),
    "tensor's dtype": (lambda: torch.tensor([1]), lambda: torch.tensor([1], dtype=torch.int32)),
    "function": (lambda: doubled, lambda: tripled),
    "torch's function": (lambda: functional.gelu, lambda: functional.relu),
    "lambda": (lambda: lambda x: x + 1, lambda: lambda x: x + 2),
    "closure": (lambda: closure(2.0), lambda: closure(3.0)),
    "partial": (lambda: partial(doubled, x=1), lambda: partial(doubled, x=2)),
    "decorated": (lambda: torch.no_grad()(doubled), lambda: torch.no_grad()(tripled)),
    "class": (lambda: Settings, lambda: Slotted),
    "dataclass": (lambda: Settings(1.0), lambda: Settings(2.0)),
    "slots": (lambda: Slotted(1.0), lambda: Slotted(2.0)),
    "namespace": (lambda: SimpleNamespace(a=1), lambda: SimpleNamespace(a=2)),
    "method of an object": (lambda: [1].count, lambda: [2].count),
    "device": (lambda: torch.device("cpu"), lambda: torch.device("cuda:1")),
    "attribute of a function": (lambda: noted(2.0), lambda: noted(3.0)),
    "name of a function": (lambda: named("one"), lambda: named("other")),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_a_module_holds_is_in_the_key(name: str) -> None:
    one, other = DIFFERENT[name]
    keys = key(Net(held=one())), key(Net(held=one())), key(Net(held=other()))
    assert keys[0] is not None and keys[0] == keys[1]
    assert keys[2] is not None and keys[2] != keys[0]


def with_buffer(tensor: Tensor, *, persistent: bool = True) -> nn.Module:
    model = Net()
    model.register_buffer("kept", tensor, persistent=persistent)
    return model


def test_how_buffers_lie_and_whether_they_are_saved_is_in_the_key() -> None:
    square = torch.ones(3, 3)
    first, *others = map(key, (with_buffer(square), with_buffer(square[:, :1].expand(3, 3))))
    other = key(with_buffer(square, persistent=False))
    assert len({first, *others, other}) == 3 and None not in (first, *others, other)


HOOKS = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")

UNKNOWN: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: setattr(m.fc, "forward", doubled),
    "helper": lambda m: setattr(m, "helper", doubled),
    "__call__ of the class by _call_impl": lambda m: setattr(m.fc, "_call_impl", doubled),
    "train": lambda m: setattr(m, "train", lambda mode=True: m),
    "iterator": lambda m: setattr(m, "held", iter([1])),
    "generator": lambda m: setattr(m, "held", torch.Generator()),
    "lock in a list": lambda m: setattr(m, "held", [__import__("threading").Lock()]),
    "random state": lambda m: setattr(m, "held", __import__("random").Random(0)),
    "open file": lambda m: setattr(m, "held", open(os.devnull)),  # noqa: SIM115
    "large tensor": lambda m: setattr(m, "held", torch.zeros(20_000)),
    "tensor without values": lambda m: setattr(m, "held", torch.zeros(2, device="meta")),
    "module outside of the tree": lambda m: setattr(m, "held", [nn.Linear(2, 2)]),
    "opaque global": lambda m: setattr(m, "held", with_opaque_global),
    "compiled": lambda m: m.compile(backend="eager"),
    "environment": lambda m: setattr(m, "held", from_environment),
    "file": lambda m: setattr(m, "held", from_file),
    "globals by name": lambda m: setattr(m, "held", from_a_name),
    "import by name": lambda m: setattr(m, "held", from_an_import),
    "settings of torch": lambda m: setattr(m, "held", from_torchs_settings),
    "threads of torch": lambda m: setattr(m, "held", from_threads),
    "module that was made": lambda m: setattr(m, "held", ModuleType("made")),
    **{name: lambda m, name=name: getattr(m.fc, name)(lambda *args: None) for name in HOOKS},
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_written_down_has_no_key(name: str) -> None:
    model = Net()
    UNKNOWN[name](model)
    with pytest.raises(UnknownHoldingError):
        holdings(model)
    assert key(model) is None


def test_a_hook_on_every_module_has_no_key() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert key(Net()) is None
    finally:
        handle.remove()


def patched(target: Any, name: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(target, name, value)


REPLACED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a method": patched(Child, "helper", lambda self, x: x),
    "forward": patched(Net, "forward", lambda self, x: self.fc(x)),
    "what is overridden": patched(Net, "helper", lambda self, x: x * 5),
    "forward of torch's layer": patched(nn.Linear, "forward", lambda self, x: x),
    "a call": patched(Net, "__call__", lambda self, x: x),
    "a value in a global": lambda m: m.setitem(GLOBAL, "factor", 7.0),
    "torch's function": patched(functional, "hardtanh", lambda x: x),
    "what a closure mentions": patched(
        __import__("tests.compiler.test_capture_cache", fromlist=["x"]), "tripled", doubled
    ),
}


def through_torch(x: Tensor) -> Tensor:
    return functional.hardtanh(tripled(x))


@pytest.mark.parametrize("name", REPLACED)
def test_replaced_code_gives_another_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Child(a=through_global, b=through_torch)
    before = key(model)
    with monkeypatch.context() as context:
        REPLACED[name](context)
        assert key(model) not in (None, before)
    assert key(model) == before is not None


def test_code_that_transformers_picks_from_a_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama import modeling_llama

    model = tiny("llama")
    before = capture_cache.key(CaptureRequest.of(model))

    def other(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    for target, name in ((modeling_llama, "apply_rotary_pos_emb"), (modeling_llama.LlamaAttention, "forward")):
        with monkeypatch.context() as context:
            context.setattr(target, name, other)
            assert capture_cache.key(CaptureRequest.of(model)) not in (None, before)
    with monkeypatch.context() as context:
        context.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", other)
        assert capture_cache.key(CaptureRequest.of(model)) not in (None, before)
    assert capture_cache.key(CaptureRequest.of(model)) == before


def test_a_module_without_tensors_outside_of_the_tree() -> None:
    """Functions that transformers wraps in modules, one for each layer, are known by their code and attributes."""

    def holding(held: nn.Module) -> Net:
        model = Net()
        model.held = {"function": held}
        return model

    plain = key(holding(nn.Hardtanh()))
    assert plain == key(holding(nn.Hardtanh())) is not None
    others = [nn.Hardtanh(max_val=2.0), nn.Softplus(), nn.Hardtanh().eval(), nn.Sequential(nn.Hardtanh())]
    assert len({plain, *map(key, map(holding, others))}) == 5
    hooked = nn.Hardtanh()
    hooked.register_forward_hook(lambda *args: None)
    assert key(holding(hooked)) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_every_family_have_a_key(family: str) -> None:
    """Equal models, their copies, and a model that has run have the same key."""
    model = tiny(family)
    axes = default_axes(model)
    expected = capture_cache.key(CaptureRequest.of(model, axes))
    assert expected is not None
    assert (
        capture_cache.key(CaptureRequest.of(tiny(family, seed=1), axes))
        == expected
        == capture_cache.key(CaptureRequest.of(copy.deepcopy(model), axes))
    )
    if family != "vit":
        ids = torch.ones(1, 4, dtype=torch.long)
        model(input_ids=ids, output_hidden_states=True, **({"decoder_input_ids": ids} if family == "t5" else {}))
        assert capture_cache.key(CaptureRequest.of(model, axes)) == expected


def test_a_key_does_not_depend_on_other_models_or_on_where_logs_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' registry of outputs to record and its log handler's stream are in no graph, and in no key."""
    from transformers.utils import logging, output_capturing

    model = tiny("gpt2")
    before = capture_cache.key(CaptureRequest.of(model))
    monkeypatch.setattr(logging, "_default_handler", StreamHandler(io.StringIO()))
    known: Any = output_capturing._CAN_RECORD_REGISTRY
    dict.__setitem__(known, str(nn.Identity), {"hidden_states": nn.Linear})
    try:
        assert capture_cache.key(CaptureRequest.of(model)) == before is not None
    finally:
        dict.__delitem__(known, str(nn.Identity))


def test_a_key_is_cheap() -> None:
    """A key of a model of usual depth, here twelve layers, takes 50 ms on an idle processor."""
    model = tiny("bert", num_hidden_layers=12)
    axes = default_axes(model)
    capture_cache.key(CaptureRequest.of(model, axes))
    started = time.process_time()
    for _ in range(3):
        capture_cache.key(CaptureRequest.of(model, axes))
    assert (time.process_time() - started) / 3 < 0.3  # machines are shared


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "change"),
    [
        pytest.param(
            "llama",
            lambda m: [setattr(layer.self_attn, "scaling", 0.9) for layer in m.model.layers],
        ),
        ("gpt2", lambda m: [setattr(block.attn, "scaling", 0.9) for block in m.transformer.h]),
        pytest.param(
            "llama",
            lambda m: setattr(m.model.layers[0].mlp, "forward", lambda x: x * 0.5),
        ),
        ("bert", lambda m: m.bert.encoder.layer[0].register_forward_hook(lambda *a: a[-1] * 1.5)),
    ],
    ids=["scaling", "scaling of gpt2", "forward", "hook"],
)
def test_a_changed_model_never_gets_the_graph_of_a_plain_one(
    family: str, change: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFTC_CACHE", str(tmp_path))
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.o"}}]}
    ids = torch.randint(2, 90, (2, 6))
    model = tiny(family).requires_grad_(False)
    graftc.compile(spec, model)
    change(model)
    compiled = graftc.compile(spec, model).eval()
    assert torch.allclose(compiled(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)
    named = any("not kept in the capture cache" in note for note in compiled.report.notes)
    assert named == (capture_cache.key(CaptureRequest.of(model)) is None)


@pytest.mark.slow
def test_the_digest_of_our_own_code_covers_what_is_imported() -> None:
    """The digest covers all files that the two modules import, directly or indirectly."""
    package = Path(graftc.__file__).parent
    waiting = [package / "compiler/capture/capture.py", package / "compiler/capture/capture_cache.py"]
    needed: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path not in needed:
            needed.add(path)
            waiting += imported(package, path)
    assert len(needed) > 60 and needed <= set(own_files(package))


def imported(package: Path, path: Path) -> Iterator[Path]:
    """Yield the files of a package that one of its files imports, anywhere in the code."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [str(node.module), *(f"{node.module}.{name}" for name in names)]
        for name in names:
            root, *parts = name.split(".")
            place = package.joinpath(*parts)
            files = (place.with_suffix(".py"), place / "__init__.py") if root == package.name and parts else ()
            yield from (file for file in files if file.is_file())


# Cached files


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Net, Path]:
    """A model whose capture is in the cache, and the cached file."""
    monkeypatch.setenv("GRAFTC_CACHE", str(tmp_path / "captures"))
    model = Net()
    capture_cache.captured(CaptureRequest.of(model, AXES))
    (path,) = (tmp_path / "captures").iterdir()
    assert capture_cache.lookup(CaptureRequest.of(model, AXES)) is not None
    return model, path


def reseal(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """Return a function that edits the content, under a digest that fits."""

    def run(text: bytes) -> bytes:
        data = json.loads(text.partition(b"\n")[2])
        return reseal(json.dumps(change(data) or data).encode())

    return run


def put(data: dict[str, Any], *path: Any, value: Any) -> None:
    for step in path[:-1]:
        data = data[step]
    data[path[-1]] = value


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def run(text: bytes) -> bytes:
        assert old in text
        return text.replace(old, new, 1)

    return run


EDITS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda text: b"",
    "cut": lambda text: text[:-100],
    "cut in front": lambda text: text[1:],
    "digest alone": lambda text: text[:65],
    "without digest": lambda text: text.partition(b"\n")[2],
    "one more byte": lambda text: text + b" ",
    "another operator": replaced(b"aten.linear.default", b"aten.matmul.default"),
    "another argument": replaced(b'{"node":0}', b'{"node":1}'),
    "another name": replaced(b"fc.weight", b"fc.wEight"),
    "another digit of the digest": lambda text: (b"0" if text[:1] != b"0" else b"1") + text[1:],
    "zeros": lambda text: bytes(len(text)),
    "not UTF-8": lambda text: b"\xff\xfe" + text,
    "resealed: not UTF-8": lambda text: reseal(b"\xff\xfe{}"),
    "resealed: deep lists": lambda text: reseal(b"[" * 200_000 + b"]" * 200_000),
    "resealed: deep objects": lambda text: reseal(b'{"key":' * 100_000),
    "resealed: a list": lambda text: reseal(b"[1]"),
    "resealed: null": lambda text: reseal(b"null"),
    "resealed: NaN": lambda text: reseal(b"NaN"),
    "resealed: another key": edited(lambda d: put(d, "key", value="0" * 64)),
    "resealed: key of another kind": edited(lambda d: put(d, "key", value=5)),
    "resealed: notes": edited(lambda d: put(d, "notes", value=5)),
    "resealed: no program": edited(lambda d: d.pop("program") and d),
    "resealed: program of another kind": edited(lambda d: put(d, "program", value="x")),
    "resealed: args": edited(lambda d: put(d, "program", "nodes", 1, "args", value="x" * 3)),
    "resealed: constants": edited(lambda d: put(d, "constants", value={"a": {"dtype": "float32"}})),
    "resealed: a constant's shape": edited(
        lambda d: put(d, "constants", value={"a": {"dtype": "f32", "shape": [-1, 7], "data": "AAAA"}})
    ),
    "resealed: a node that is not there": edited(
        lambda d: put(d, "program", "nodes", -1, "args", value=[[{"node": 10**9}]])
    ),
    "resealed: a type that is not there": edited(lambda d: put(d, "program", "nodes", 0, "type", value=10**30)),
    "resealed: an operator that is not there": edited(
        lambda d: put(d, "program", "nodes", -2, "target", value="aten.nothing.default")
    ),
    "resealed: a large integer": lambda text: reseal(b'{"key": ' + b"9" * 10_000 + b"}"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EDITS)
def test_a_changed_file_is_a_miss_and_goes(name: str, kept: tuple[Net, Path]) -> None:
    model, path = kept
    path.write_bytes(EDITS[name](path.read_bytes()))
    assert capture_cache.lookup(CaptureRequest.of(model, AXES)) is None
    assert not path.exists()
    again = capture_cache.captured(CaptureRequest.of(model, AXES))
    assert not again.cached and path.exists()


def test_an_intact_file_under_another_name_is_a_miss(kept: tuple[Net, Path]) -> None:
    _, path = kept
    other = Net(scale=2)
    path.rename(path.with_name(f"{capture_cache.key(CaptureRequest.of(other, AXES))}.json"))
    assert capture_cache.lookup(CaptureRequest.of(other, AXES)) is None


def _link(path: Path) -> None:
    real = path.with_name("real")
    path.rename(real)
    path.symlink_to(real)


def _owner(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    os.chown(path, 12345, 12345)


FOREIGN: dict[str, Callable[[Path], Any]] = {
    "link": _link,
    "second name": lambda path: os.link(path, path.with_name("second")),
    "another owner": _owner,
    "group may write": lambda path: path.chmod(0o660),
    "all may write": lambda path: path.chmod(0o606),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path, 0o600)),
    "unreadable": lambda path: (path.unlink(), path.symlink_to("/dev/full")),
}


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of POSIX")
@pytest.mark.parametrize("name", FOREIGN)
def test_what_somebody_else_may_have_written_is_not_read(name: str, kept: tuple[Net, Path]) -> None:
    model, path = kept
    FOREIGN[name](path)
    assert capture_cache.lookup(CaptureRequest.of(model, AXES)) is None
    assert not capture_cache.captured(CaptureRequest.of(model, AXES)).cached
    assert not list(path.parent.glob("*.tmp"))


def _full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    original = tempfile.mkstemp

    def mkstemp(**where: Any) -> tuple[int, str]:
        handle, name = original(**where)
        os.close(handle)
        return os.open("/dev/full", os.O_WRONLY), name

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)


def _failing(error: BaseException) -> Callable[[pytest.MonkeyPatch], None]:
    def fail(*args: Any) -> Any:
        raise error

    return lambda monkeypatch: monkeypatch.setattr(os, "replace", fail)


FAILURES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "full disk": _full_disk,
    "read-only": _failing(PermissionError()),
    "interrupted": _failing(KeyboardInterrupt()),
}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device")
@pytest.mark.parametrize("name", FAILURES)
def test_nothing_is_left_behind(name: str, kept: tuple[Net, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = kept
    with monkeypatch.context() as context:
        FAILURES[name](context)
        try:
            assert not capture_cache.captured(CaptureRequest.of(Net(other=1), AXES)).cached
        except KeyboardInterrupt:
            assert name == "interrupted"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_files_of_writers_that_were_killed_are_swept(kept: tuple[Net, Path]) -> None:
    _, path = kept
    old, new = path.with_name("old.tmp"), path.with_name("new.tmp")
    for file in (old, new):
        file.write_text("")
    os.utime(old, (time.time() - 7200,) * 2)
    capture_cache.captured(CaptureRequest.of(Net(other=1), AXES))
    assert not old.exists() and new.exists()
