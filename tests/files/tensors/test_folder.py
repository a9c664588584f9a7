"""Files and folders of tensors: they read as safetensors reads them, and unusable ones raise coded errors."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftc.files.tensors.folder import Refusal, TensorFolder
from graftc.files.tensors.headers import header_bytes, read_shard
from graftc.files.tensors.weights import INDEX, SINGLE, weight_files
from graftc.specs.errors.diagnostics import GraftError
from tests.kit.refusals import refused

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32),
)
CODE = Refusal("GC113", "GC101", "copy it again", located=True)


def some_tensors() -> dict[str, torch.Tensor]:
    """Return a tensor of each dtype, a scalar and empty ones."""
    rng = torch.Generator().manual_seed(0)
    values = torch.randint(0, 2, (3, 5), generator=rng)
    tensors = {f"part.{str(dtype).removeprefix('torch.')}": values.to(dtype) for dtype in DTYPES}
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "odd": torch.ones(3, dtype=torch.uint8)}


def same_bits(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Return whether two tensors have the same bits."""
    return torch.equal(mine.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))


def sharded(folder: Path, *, single: bool = False) -> dict[str, torch.Tensor]:
    """Write the tensors to two files with an index, and return them."""
    folder.mkdir(exist_ok=True)
    tensors = some_tensors()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    table = {name: file for file, own in parts.items() for name in own}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))
    if single:
        save_file({"only": torch.ones(2)}, folder / SINGLE)
    return tensors


def unreadable(path: Path, **options: Any) -> GraftError:
    """Return the error of reading the whole folder, which must come quickly."""
    return refused(lambda: dict(TensorFolder(path, CODE, **options)), seconds=2)


def raw_file(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_a_file_is_what_safetensors_reads(tmp_path: Path, padding: int) -> None:
    save_file(some_tensors(), tmp_path / "x.safetensors", {"format": "pt"})
    raw = (tmp_path / "x.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    # with a header of any length, the data are not aligned to any dtype
    raw_file(tmp_path / "x.safetensors", raw[8 : 8 + size] + b" " * padding, raw[8 + size :])
    theirs = load_file(tmp_path / "x.safetensors")
    with TensorFolder(tmp_path / "x.safetensors", CODE) as folder:
        assert folder.keys() == theirs.keys() and folder.shards[0].metadata == {"format": "pt"}
        for name, tensor in folder.items():
            assert tensor.dtype == theirs[name].dtype and tensor.shape == theirs[name].shape
            assert same_bits(tensor, theirs[name])


def test_a_folder_has_the_tensors_of_its_files(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    folder = TensorFolder(tmp_path, CODE)
    assert folder.keys() == tensors.keys() and [shard.name for shard in folder.shards] == [
        "a.safetensors",
        "b.safetensors",
    ]
    assert all(
        torch.equal(folder[name].view(torch.uint8), tensors[name].view(torch.uint8))
        for name in tensors
        if name != "scalar"
    )


def test_what_is_opened_is_closed(tmp_path: Path) -> None:
    sharded(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    with TensorFolder(tmp_path, CODE) as folder:
        assert len(os.listdir("/proc/self/fd")) == before
        assert float(folder["scalar"]) == 2.5
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before


def test_writing_changes_the_file(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(4)}, tmp_path / "x.safetensors")
    TensorFolder(tmp_path / "x.safetensors", CODE)["x"].fill_(1.0)
    assert not load_file(tmp_path / "x.safetensors")["x"].any()
    with TensorFolder(tmp_path / "x.safetensors", CODE, writable=True) as folder:
        folder["x"].fill_(1.0)
    assert load_file(tmp_path / "x.safetensors")["x"].all()


def _entry(**changes: Any) -> bytes:
    entry = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4], **changes}
    return json.dumps({changes.pop("name", "x"): {k: v for k, v in entry.items() if k != "name"}}).encode()


EMPTY = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
FILES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: path.write_bytes(b""),
    "short": lambda path: path.write_bytes(b"\x01\0\0"),
    "a header longer than the file": lambda path: path.write_bytes((2**40).to_bytes(8, "little") + b"{}"),
    "no JSON": lambda path: raw_file(path, b"{"),
    "deep": lambda path: raw_file(path, b'{"x":' * 100_000 + b"1" + b"}" * 100_000),
    "a list": lambda path: raw_file(path, b"[]"),
    "a key twice": lambda path: raw_file(path, b'{"x":' + EMPTY + b',"x":' + EMPTY + b"}"),
    "metadata of numbers": lambda path: raw_file(path, b'{"__metadata__":{"a":1}}'),
    "cut off": lambda path: raw_file(path, _entry(), b"abc"),
    "too long": lambda path: raw_file(path, _entry(), b"abcde"),
    "another type": lambda path: raw_file(path, _entry(dtype="F13"), b"abcd"),
    "a type of a list": lambda path: raw_file(path, _entry(dtype=["U8"]), b"abcd"),
    "negative sizes": lambda path: raw_file(path, _entry(shape=[-2, -2]), b"abcd"),
    "sizes of truth": lambda path: raw_file(path, _entry(shape=[4, True]), b"abcd"),
    "another number of bytes": lambda path: raw_file(path, _entry(shape=[5]), b"abcd"),
    "offsets that are turned": lambda path: raw_file(path, _entry(data_offsets=[4, 0]), b"abcd"),
    "a gap": lambda path: raw_file(path, _entry(data_offsets=[1, 5]), b"abcde"),
    "sizes beyond memory beside none": lambda path: raw_file(
        path, _entry(shape=[0, 2**40, 2**40], data_offsets=[0, 0])
    ),
    "a field more": lambda path: raw_file(path, _entry(more=1), b"abcd"),
    "100,000 sizes of 2**62": lambda path: raw_file(path, _entry(shape=[2**62] * 100_000), b"abcd"),
    "100,000 sizes of 1": lambda path: raw_file(path, _entry(shape=[4] + [1] * 100_000), b"abcd"),
    "a name of 100,000 dots": lambda path: raw_file(path, _entry(name="a." * 100_000), b"abcd"),
    "a name of 100,000 letters": lambda path: raw_file(path, _entry(name="a" * 100_000), b"abcd"),
    "300,000 empty tensors": lambda path: raw_file(
        path, b"{" + b",".join(b'"%d":%s' % (n, EMPTY) for n in range(300_000)) + b"}"
    ),
    "four million values": lambda path: raw_file(path, b'{"x":[' + b"1," * 4_000_000 + b"1]}"),
    "a large header": lambda path: raw_file(path, b'{"__metadata__":{"a":"' + b"x" * 2**25 + b'"}}'),
    "a folder": lambda path: path.mkdir(),
    "a named pipe": lambda path: os.mkfifo(path),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.safetensors"
    FILES[name](path)
    error = unreadable(path)
    assert error.code == "GC113" and error.hint
    with pytest.raises((ValueError, OSError)):
        read_shard(path)


@pytest.mark.slow
def test_as_many_tensors_as_there_may_be_take_no_time(tmp_path: Path) -> None:
    tensors = [(f"model.layers.{n}.weight", "F32", (0,)) for n in range(100_000)]
    (tmp_path / "x.safetensors").write_bytes(header_bytes(tensors, {}))
    started = time.process_time()
    assert len(TensorFolder(tmp_path / "x.safetensors", CODE)) == 100_000
    assert time.process_time() - started < 2


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / INDEX).read_text())
    change(data)
    (folder / INDEX).write_text(json.dumps(data))


@pytest.mark.parametrize(
    "name",
    [
        *("../a.safetensors", "/etc/a.safetensors", "sub/a.safetensors", "..", "", ".safetensors", "c:a.safetensors"),
        *("a\0.safetensors", "a.bin", "a\\b.safetensors", "x" * 300 + ".safetensors", "\ud800.safetensors", "é" * 130),
    ],
)
def test_names_that_lead_out(tmp_path: Path, name: str) -> None:
    sharded(tmp_path)
    edit_index(tmp_path, lambda data: data["weight_map"].update(scalar=name))
    assert unreadable(tmp_path).code == ("GC113" if "\ud800" in name else "GC101")


def circle(path: Path, length: int) -> None:
    """Replace a file by a link that leads back to itself, by way of others."""
    path.unlink()
    names = [path.name, *(f"link{number}" for number in range(1, length))]
    for name, target in zip(names, [*names[1:], names[0]], strict=True):
        (path.parent / name).symlink_to(target)


@pytest.mark.parametrize("file", ["a.safetensors", INDEX, SINGLE])
def test_links_that_lead_out(tmp_path: Path, file: str) -> None:
    sharded(tmp_path / "model", single=True)
    if file != SINGLE:
        (tmp_path / "model" / SINGLE).unlink()
    (tmp_path / "model" / file).rename(tmp_path / file)
    (tmp_path / "model" / file).symlink_to(tmp_path / file)
    assert unreadable(tmp_path / "model").code == "GC101"


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("file", ["a.safetensors", INDEX, SINGLE])
def test_links_in_a_circle_are_missing_files(tmp_path: Path, file: str, length: int) -> None:
    sharded(tmp_path, single=file == SINGLE)
    if file == SINGLE:
        (tmp_path / INDEX).unlink()
    circle(tmp_path / file, length)
    assert unreadable(tmp_path).code == "GC113"


def test_the_cache_of_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "models--a--b" / "snapshots" / "1234"
    folder.mkdir(parents=True)
    tensors = sharded(folder)
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir()
    for file in list(folder.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(os.path.relpath(blobs / file.name, folder))
    assert TensorFolder(folder, CODE).keys() == tensors.keys()


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("weight_map"),
        lambda data: data.pop("metadata"),
        lambda data: data.update(metadata=[]),
        lambda data: data.update(weight_map=[]),
        lambda data: data.update(weight_map={}),
        lambda data: data["weight_map"].update(scalar=7),
        lambda data: data["weight_map"].update(scalar="missing.safetensors"),
        lambda data: data["weight_map"].update(scalar="b.safetensors", odd="b.safetensors", empty="b.safetensors"),
        lambda data: data["weight_map"].update({"more": "a.safetensors"}),
        lambda data: data["weight_map"].pop("scalar"),
        lambda data: data["weight_map"].update({"x." * 100_000: "a.safetensors"}),
    ],
)
def test_an_index_that_says_otherwise(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    sharded(tmp_path)
    edit_index(tmp_path, change)
    assert unreadable(tmp_path).code == "GC113"


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error", "/where/a.safetensors"), ValueError("it is cut off")]
)
def test_why_a_file_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError | ValueError
) -> None:
    """The message has the system's own words, or the reader's, and the file's name once."""

    def failing(path: Path) -> None:
        raise error

    sharded(tmp_path)
    monkeypatch.setattr("graftc.files.tensors.folder.read_shard", failing)
    why = "Input/output error" if isinstance(error, OSError) else "it is cut off"
    message = unreadable(tmp_path).message
    assert message.startswith(f"{tmp_path} is damaged: a.safetensors: {why}") and "/where" not in message


def test_an_index_may_list_less_where_transformers_reads_files_whole(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    edit_index(tmp_path, lambda data: data["weight_map"].pop("scalar"))
    assert TensorFolder(tmp_path, CODE, strict=False).keys() == tensors.keys()


@pytest.mark.parametrize("raw", [b"", b"{", b"[" * 100_000, b"[]", b'{"weight_map":{"a":"b","a":"c"}}'])
def test_an_index_that_is_none(tmp_path: Path, raw: bytes) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).write_bytes(raw)
    assert unreadable(tmp_path).code == "GC113"


def test_a_name_in_two_files(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    save_file({"scalar": tensors["scalar"], "new": tensors["odd"]}, tmp_path / "c.safetensors")
    edit_index(tmp_path, lambda data: data["weight_map"].update(new="c.safetensors"))
    assert unreadable(tmp_path, strict=False).code == "GC113"


# --- the files that transformers would read -----------------------------------------------------------------------


def theirs(folder: Path, named: str | None) -> list[str] | None:
    """Return the files that transformers loads from a folder, or None if it raises."""
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    try:
        files, _ = _get_resolved_checkpoint_files(str(folder), None, None, None, None, False, named)
    except (OSError, ValueError):
        return None
    return sorted(os.path.basename(file) for file in files or [])


@pytest.mark.parametrize("named", [None, SINGLE, INDEX, "a.safetensors", "other.safetensors.index.json"])
@pytest.mark.parametrize(
    "files", [(SINGLE,), (INDEX,), (SINGLE, INDEX), ("model.fp16.safetensors",), (INDEX, "pytorch_model.bin"), ()]
)
def test_the_files_are_those_that_transformers_reads(tmp_path: Path, files: tuple[str, ...], named: str | None) -> None:
    sharded(tmp_path, single=True)
    for file in (SINGLE, INDEX):
        if file not in files:
            (tmp_path / file).unlink()
    for file in files:
        (tmp_path / file).touch()
    (tmp_path / "config.json").write_text(json.dumps({} if named is None else {"transformers_weights": named}))
    wanted = theirs(tmp_path, named)
    if wanted is not None and not all((tmp_path / file).is_file() for file in wanted):
        wanted = None
    try:
        actual = weight_files(tmp_path)
    except ValueError:
        assert named is not None and wanted is None
    else:
        assert (None if actual is None else list(actual.names)) == wanted


@pytest.mark.parametrize(
    "named", ["../a.safetensors", "/etc/a.safetensors", "a.bin", 7, ["a"], "x" * 300 + ".safetensors"]
)
def test_weights_that_a_config_names_elsewhere(tmp_path: Path, named: Any) -> None:
    sharded(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": named}))
    assert unreadable(tmp_path).code == "GC101"
