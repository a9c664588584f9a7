"""Thousands of changed third-party files: headers, indexes, configs, quantised folders, adapters and data.

An unchanged file is read. A changed one gives what safetensors, transformers, PEFT or the standard library read from
it, or a code, within 2 s and 300 MB; nothing is read or written outside the folder. ``make fuzz`` runs ``FUZZ`` of each
kind, and a twentieth of those that open a model; the ordinary tests run a sample.
"""

from __future__ import annotations

import contextlib
import csv
import json
import random
import shutil
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import graftc
from graftc.applications.pet.data import load_rows
from graftc.compiler.missing_weights import require_weights
from graftc.files.tensors.folder import Refusal, TensorFolder
from graftc.files.tensors.weights import INDEX
from graftc.runtime.sources.models import load_model, quiet_transformers
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.families import tiny
from tests.gates.counts import FUZZ, MODELS
from tests.gates.file_mutations import data_file, json_file, mutated_quantisation, parses, tensor_file
from tests.gates.test_fuzz_artifacts import watched
from tests.runtime.sources.quantised.readers import require_values
from tests.runtime.sources.quantised.writers import FORMATS, llama, write
from tests.runtime.streaming.support import peft_adapter

SECONDS, MEMORY = 2, 300
CODE = Refusal("GC100", "GC101")


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fail if the block takes more than two seconds of processor time or 300 MB of additional memory."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current value
    resident = _memory("VmRSS")
    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    grown = (_memory("VmHWM") - resident) >> 10
    assert grown < MEMORY, f"{grown} MB more"


def _memory(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def same_bits(mine: Tensor, theirs: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bits."""
    if mine.dtype != theirs.dtype or mine.shape != theirs.shape:
        return False
    return torch.equal(mine.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))


def same_bits_by_name(mine: Any, theirs: Any) -> bool:
    """Return whether two mappings have the same names and bitwise equal tensors."""
    return mine.keys() == theirs.keys() and all(same_bits(mine[name], theirs[name]) for name in theirs)


class Kind:
    """Files of one kind: how they are created, changed, read, and read by other libraries."""

    count = FUZZ
    sample = 40
    costly = False
    intact = "intact"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parsed = 0
        """The copies in which every file has the form of its kind, so that more than a parser is tried."""
        (folder / "own").mkdir()
        self.make(folder / "own" / self.intact)

    def make(self, path: Path) -> None:
        """Write the intact files."""

    def change(self, path: Path, rng: random.Random) -> None:
        """Change a copy."""

    def read(self, path: Path) -> Any:
        """Return what graftc reads."""

    def check(self, path: Path, content: Any) -> None:
        """Compare it with what another library reads."""

    def run(self, number: int, *, change: bool = True) -> str:
        """Read one changed copy and return the error's code or ``read``."""
        rng = random.Random(f"{type(self).__name__} {number}")
        path = self.folder / "own" / "changed"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.folder / "own" / self.intact, path)
        if change:
            self.change(path, rng)
        self.parsed += parses(path)
        with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
            warnings.simplefilter("ignore")
            try:
                with bounded(), watched(self.folder):
                    result = self.read(path)
            except GraftError as error:
                assert change and error.code != "GC099", str(error)
                return error.code
            with quiet_transformers():
                self.check(path, result)
        return "read"


class Headers(Kind):
    """A single file of tensors."""

    sample = 60

    def make(self, path: Path) -> None:
        path.mkdir()
        rng = torch.Generator().manual_seed(0)
        tensors = {f"layers.{n}.weight": torch.randn(3, 4, generator=rng) for n in range(3)}
        kinds = (torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)
        tensors |= {f"kind.{n}": torch.ones(2, 6).to(kind) for n, kind in enumerate(kinds)}
        save_file(
            {**tensors, "empty": torch.empty(0, 3), "scalar": torch.tensor(1.0)}, path / "x.safetensors", {"a": "b"}
        )

    def change(self, path: Path, rng: random.Random) -> None:
        tensor_file(path / "x.safetensors", rng)

    def read(self, path: Path) -> Any:
        with TensorFolder(path / "x.safetensors", CODE) as folder:
            return dict(folder)

    def check(self, path: Path, content: Any) -> None:
        assert same_bits_by_name(content, load_file(path / "x.safetensors"))


class Indexes(Kind):
    """A folder of tensor files with an index."""

    def make(self, path: Path) -> None:
        path.mkdir()
        tensors = {f"layers.{n}.weight": torch.full((2, 2), float(n)) for n in range(6)}
        names, table = sorted(tensors), {}
        for number, file in enumerate(("a.safetensors", "b.safetensors", "c.safetensors")):
            own = names[2 * number : 2 * number + 2]
            save_file({name: tensors[name] for name in own}, path / file, {"format": "pt"})
            table |= dict.fromkeys(own, file)
        (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 96}, "weight_map": table}))
        (path / "config.json").write_text(json.dumps({"model_type": "llama"}))

    def change(self, path: Path, rng: random.Random) -> None:
        kind = rng.randrange(10)
        if kind == 0:
            tensor_file(path / rng.choice(("a", "b", "c")).__add__(".safetensors"), rng)
        elif kind == 1:
            shutil.copyfile(path / "a.safetensors", path / "model.safetensors")
        elif kind == 2:
            (path / "b.safetensors").unlink()
            (path / "b.safetensors").symlink_to(rng.choice(("a.safetensors", "../intact/b.safetensors", "/dev/zero")))
        elif kind == 3:
            names = ("a.safetensors", INDEX, "../intact/a.safetensors", "x.safetensors", "a.bin", 7, None)
            (path / "config.json").write_text(json.dumps({"transformers_weights": rng.choice(names)}))
        elif kind == 4:
            data = json.loads((path / INDEX).read_text())
            places = ("a.safetensors", "../intact/a.safetensors", f"{path}/a.safetensors", "x" * 300, "a.bin", "")
            data["weight_map"][rng.choice(list(data["weight_map"]))] = rng.choice(places)
            (path / INDEX).write_text(json.dumps(data))
        else:
            json_file(path / INDEX, rng)

    def read(self, path: Path) -> Any:
        with TensorFolder(path, CODE) as folder:
            return dict(folder)

    def check(self, path: Path, content: Any) -> None:
        from transformers.modeling_utils import _get_resolved_checkpoint_files

        named = json.loads((path / "config.json").read_text()).get("transformers_weights")
        files, _ = _get_resolved_checkpoint_files(str(path), None, None, None, None, False, named)
        assert files is not None
        theirs = [load_file(file) for file in files]
        assert sum(map(len, theirs)) == len(content)
        assert same_bits_by_name(content, {name: tensor for each in theirs for name, tensor in each.items()})


class Configs(Kind):
    """Folders of models."""

    count, sample = MODELS, 12

    def make(self, path: Path) -> None:
        path.mkdir()
        with quiet_transformers():
            for family in ("llama", "gpt2", "bert", "t5", "mixtral"):
                tiny(family, layers=1).save_pretrained(path / family)

    def change(self, path: Path, rng: random.Random) -> None:
        folder = path / rng.choice(("llama", "gpt2", "bert", "t5", "mixtral"))
        (path / "which").write_text(folder.name)
        if rng.random() < 0.25:
            tensor_file(folder / "model.safetensors", rng)
        if rng.random() < 0.8:
            json_file(folder / "config.json", rng)

    def read(self, path: Path) -> Any:
        which = path / "which"
        names = [which.read_text()] if which.exists() else sorted(p.name for p in path.iterdir())
        models = [load_model(str(path / name)) for name in names]
        for model in models:
            require_weights(model)
        return names, models

    def check(self, path: Path, content: Any) -> None:
        for name, model in zip(*content, strict=True):
            theirs = type(model).from_pretrained(path / name)
            assert same_bits_by_name(model.state_dict(), theirs.state_dict()), "other weights than transformers'"
            assert model.config.to_diff_dict() == theirs.config.to_diff_dict()


class Quantised(Kind):
    """Folders of quantised models, of each format."""

    count, sample, costly = MODELS, 10, True
    formats = tuple(FORMATS)

    def make(self, path: Path) -> None:
        path.mkdir()
        for name, (dtype, writer, options) in FORMATS.items():
            write(path / name, llama(dtype), writer, options)

    def change(self, path: Path, rng: random.Random) -> None:
        folder = path / rng.choice(self.formats)
        (path / "which").write_text(folder.name)
        if rng.random() < 0.7:
            tensor_file(folder / "model.safetensors", rng)
        else:
            json_file(folder / "config.json", rng, mutated_quantisation)

    def read(self, path: Path) -> Any:
        which = path / "which"
        name = which.read_text() if which.exists() else "gptq 4"
        model = graftc.load_base(path / name)
        require_weights(model)
        return name, model

    def check(self, path: Path, content: Any) -> None:
        name, model = content
        require_values(path / name, model)


class Adapters(Kind):
    """PEFT folders."""

    count, sample, costly = MODELS, 8, True

    def make(self, path: Path) -> None:
        import peft

        path.mkdir()
        self.base = path.parent / "base"
        with quiet_transformers():
            tiny("llama", layers=1).save_pretrained(self.base)
        kinds = {
            "lora": peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], rank_pattern={"v_proj": 3}),
            "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
            "loha": peft.LoHaConfig(r=2, target_modules="model.*(q_proj|up_proj)"),
            "oft": peft.OFTConfig(oft_block_size=8, target_modules=["k_proj", "up_proj"]),
        }
        self.names, self.merged = sorted(kinds), dict[str, dict[str, Tensor]]()
        for name, config in kinds.items():
            peft_adapter(path / name, self.base, config)

    def change(self, path: Path, rng: random.Random) -> None:
        folder = path / rng.choice(self.names)
        (path / "which").write_text(folder.name)
        if rng.random() < 0.5:
            tensor_file(folder / "adapter_model.safetensors", rng)
        if rng.random() < 0.7:
            json_file(folder / "adapter_config.json", rng)

    def read(self, path: Path) -> Any:
        which, merged = path / "which", {}
        for name in [which.read_text()] if which.exists() else self.names:
            shutil.rmtree(path / "out", ignore_errors=True)
            graftc.merge_checkpoint(path / name, self.base, path / "out")
            merged[name] = load_file(path / "out" / "model.safetensors")
        return merged

    def check(self, path: Path, content: Any) -> None:
        import peft

        for name, merged in content.items():
            try:
                loaded: Any = peft.PeftModel.from_pretrained(load_model(str(self.base)), path / name)
            except Exception:  # a change that peft rejects must not have changed the result
                theirs = self.merged[name]
            else:
                theirs = loaded.merge_and_unload().state_dict()
            assert all(torch.allclose(merged[key], theirs[key], atol=1e-5, rtol=1e-4) for key in merged), name
            self.merged.setdefault(name, merged)


class Rows(Kind):
    """Files of data."""

    files = ("train.csv", "train.tsv", "train.jsonl")

    def make(self, path: Path) -> None:
        path.mkdir()
        rows = [{"text": f"a b{n}, c", "label": "yn"[n % 2], "more": f'"{n}"'} for n in range(6)]
        with (path / "train.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
        (path / "train.tsv").write_text("\n".join(lines) + "\n")
        (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def change(self, path: Path, rng: random.Random) -> None:
        file = path / rng.choice(self.files)
        (path / "which").write_text(file.name)
        data_file(file, rng)

    def read(self, path: Path) -> Any:
        which = path / "which"
        names = [which.read_text()] if which.exists() else list(self.files)
        return {name: load_rows(path / name, ["y", "n"]) for name in names}

    def check(self, path: Path, content: Any) -> None:
        for name, rows in content.items():
            theirs = list(_plain_rows(path / name))
            assert [row["label"] for row in theirs] == [rows.names[number] for number in rows.labels]
            for mine, other in zip(rows.rows, theirs, strict=True):
                wanted = {k: v for k, v in other.items() if k != "label" and isinstance(v, str)}
                assert {k: v for k, v in mine.items() if isinstance(other[k], str)} == wanted


def _plain_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield rows as the standard library reads them."""
    if path.suffix == ".jsonl":
        text = path.read_bytes().decode("utf-8-sig")
        yield from (json.loads(line) for line in text.split("\n") if line.strip("\ufeff \t\r"))
        return
    limit = csv.field_size_limit(10**7)
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file, **options)
    csv.field_size_limit(limit)


KINDS: tuple[type[Kind], ...] = (Headers, Indexes, Configs, Quantised, Adapters, Rows)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[type[Kind], Kind]:
    kinds: dict[type[Kind], Kind] = {}
    return kinds


def _kind(kind: type[Kind], kinds: dict[type[Kind], Kind], tmp_path_factory: pytest.TempPathFactory) -> Kind:
    if kind not in kinds:
        kinds[kind] = kind(tmp_path_factory.mktemp("files"))
        kinds[kind].run(0, change=False)  # runs lazy imports first
    return kinds[kind]


def _many(files: Kind, numbers: range) -> None:
    started, endings, failures = time.process_time(), Counter[str](), []
    assert files.run(0, change=False) == "read"
    files.parsed = 0
    for number in numbers:
        try:
            endings[files.run(number)] += 1
        except Exception as error:
            failures.append(f"{number}: {type(error).__name__}: {str(error)[:300]}")
            print(failures[-1], flush=True)
    share = files.parsed / len(numbers)
    seconds = time.process_time() - started
    print(f"{type(files).__name__}: {dict(endings)}, {share:.0%} parse, in {seconds:.0f} s of the processor")
    assert not failures, "\n".join([f"{len(failures)} of {len(numbers)}", *failures[:20]])
    assert len(endings) > 1 and endings["read"] and share > 1 / 3


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.full if kind.costly else ()) for kind in KINDS])
def test_a_sample(kind: type[Kind], kinds: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    _many(_kind(kind, kinds, tmp_path_factory), range(1, kind.sample + 1))


@pytest.mark.gate
@pytest.mark.parametrize("kind", KINDS)
def test_all(kind: type[Kind], kinds: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    _many(_kind(kind, kinds, tmp_path_factory), range(1, kind.count + 1))
