"""Banks whose adapters come and go: each row has its adapter, whatever happens to the other slots meanwhile."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import graftc
from graftc.compiler.resolve.slots import decoded, encoded
from graftc.runtime.loading.verify import verify
from graftc.runtime.slots import Slots
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb, same_bits, tiny
from tests.kit.coroutines import result_of
from tests.kit.serving import IDS, TENSORS, adapter_folders, traffic
from tests.runtime.interop.adapters import outputs, written

pytest.importorskip("peft")
FULL, SLOW = pytest.mark.full, pytest.mark.slow
NAMES = ("ann", "bob", "cho")
SPEC = {
    "adapt": [{"name": "first", "method": "lora", "rank": 4, "alpha": 6, "target": {"role": "attn.{q,v}"}}],
    "compose": {"bank": ["first"], "slots": 3, "name": "users"},
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama").eval()


@pytest.fixture(scope="module")
def folders(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three adapters of PEFT's, of ranks 3, 2 (rsLoRA) and 4, on two projections and an MLP."""
    return adapter_folders(model, tmp_path_factory.mktemp("adapters"), NAMES)


@pytest.fixture(scope="module")
def once(model: Any, folders: dict[str, Path]) -> Any:
    return graftc.import_peft({"first": folders["ann"]}, model, bank=True, slots=3, rank=4)


@pytest.fixture
def compiled(once: Any) -> Any:
    """A bank of four slots, of which one has the adapter of ``ann``."""
    return copy.deepcopy(once)


def random(compiled: Any, seed: int) -> dict[str, Tensor]:
    """Return random tensors for a slot."""
    generator = torch.Generator().manual_seed(seed)
    tensors = compiled.bank().slots.tensors
    return {fqn: torch.randn(t.shape[1:], generator=generator) / 5 for fqn, t in tensors.items()}


def logits(compiled: Any, *names: Any, **more: Any) -> Tensor:
    """Return the logits of one text for each name."""
    with torch.no_grad():
        ids = IDS.expand(len(names) or 1, -1)
        chosen = {"adapter_ids": list(names)} if names else {}
        values: Tensor = compiled(input_ids=ids, use_cache=False, **chosen, **more).logits
    return values


def refused(code: str, call: Callable[[], object]) -> GraftError:
    with pytest.raises(GraftError) as caught:
        call()
    assert caught.value.code == code, caught.value
    return caught.value


# --- what is in the slots -------------------------------------------------------------------------------------------


@SLOW
def test_every_row_has_its_adapter_as_in_peft(model: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    """Ranks, scales and modules differ; patterns of PEFT's and artifacts are accepted as well."""
    patterns = {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"v_proj": 3}}
    odd = written(model, tmp_path / "odd", 8, r=4, target_modules=["q_proj", "v_proj"], **patterns)
    alone = graftc.compile({"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.{k,o}"}}]}, model).eval()
    perturb(alone, 0.3)
    artifact = alone.save(tmp_path / "artifact")
    paths = {**folders, "odd": odd, "own": artifact}
    bank = graftc.import_peft(paths, model, bank=True)
    assert bank.bank().names == tuple(paths) and bank.bank().capacity == 5
    mixed = logits(bank, *paths)
    for row, (name, folder) in zip(mixed, paths.items(), strict=True):
        expected = logits(alone)[0] if name == "own" else outputs(model, folder, IDS)[0]
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)
        bank.activate(name)
        torch.testing.assert_close(logits(bank)[0], expected, atol=1e-5, rtol=1e-5)
        assert bank.active() == name


@SLOW
def test_an_empty_slot_computes_nothing_and_is_refused(model: Any) -> None:
    compiled = graftc.compile(SPEC, model).eval()
    with torch.no_grad():
        base = model(IDS, use_cache=False).logits
    assert same_bits([logits(compiled)], [base])
    assert all(not tensor[1:].any() for tensor in compiled.bank().slots.tensors.values())
    assert not [name for name, parameter in compiled.named_parameters() if parameter.requires_grad]
    weights = torch.tensor([[0.5, 0.0, 0.0, 0.5]])
    for chosen in ({"adapter_ids": 2}, {"adapter_ids": torch.tensor([3])}, {"adapter_weights": weights}):
        error = refused("GC038", lambda chosen=chosen: compiled(IDS, **chosen))
        assert "is empty" in error.message
    refused("GC038", lambda: compiled(IDS, adapter_ids="nobody"))
    wrong: list[dict[str, Any]] = [
        *({"adapter_ids": ids} for ids in (9, [[0]], [None], *map(torch.tensor, ([9], [0.5], [[0]], [True], [False])))),
        *({"adapter_weights": torch.ones(shape)} for shape in ((), (3,), (2, 4), (1, 3))),
    ]
    for chosen in wrong:
        refused("GC038", lambda chosen=chosen: compiled(IDS, **chosen))


@SLOW
def test_mixtures_read_every_slot(compiled: Any, folders: dict[str, Path]) -> None:
    bank = compiled.bank()
    bank.add("bob", folders["bob"])
    mixed = {"adapter_weights": torch.tensor([[0.25, 0.75, 0.0, 0.0]])}
    with torch.no_grad():
        found = compiled(IDS, use_cache=False, **mixed).logits
        fixed = compiled.fix({"first": 0.25, "bob": 0.75}).eval()(IDS, use_cache=False).logits
    torch.testing.assert_close(found, fixed, atol=1e-5, rtol=1e-5)


@SLOW
def test_tensors_of_another_model(model: Any, compiled: Any) -> None:
    """A bank adds the tensors that `adapter_state_dict` and `tensors` return, with their factor."""
    alone = graftc.compile({"adapt": [{"method": "lora", "rank": 2, "alpha": 5, "target": {"role": "attn.q"}}]}, model)
    perturb(alone.eval(), 0.3)
    bank = compiled.bank()
    bank.add("other", alone.adapter_state_dict(), scale=2.5)
    torch.testing.assert_close(logits(compiled, "other"), logits(alone), atol=1e-5, rtol=1e-5)
    bank.add("again", bank.tensors("other"))
    assert same_bits([logits(compiled, "again")], [logits(compiled, "other")])


@FULL
def test_slots_are_in_the_dtype_of_the_base(folders: dict[str, Path]) -> None:
    """In 16 bits, a slot computes what one adaptation with the same rounded factors computes."""
    narrow = tiny("llama").to(torch.bfloat16).eval()
    compiled = graftc.import_peft({"first": folders["ann"]}, narrow, bank=True, slots=1)
    bank = compiled.bank()
    assert {tensor.dtype for tensor in bank.slots.tensors.values()} == {torch.bfloat16}
    bank.add("same", bank.tensors("first"))
    assert same_bits([logits(compiled, "same")], [logits(compiled, "first")])
    alone = compiled.fix("same").eval()
    assert torch.nn.functional.mse_loss(logits(alone).float(), logits(compiled, "same").float()) < 1e-3


# --- changes --------------------------------------------------------------------------------------------------------


@pytest.mark.full
@SLOW
def test_changes_capture_and_compile_nothing(compiled: Any, folders: dict[str, Path]) -> None:
    """Neither graphs nor code of ``torch.compile`` know names or contents; each row follows its own slot only."""
    import torch._dynamo

    torch._dynamo.reset()
    bank = compiled.bank()
    bank.add("bob", folders["bob"])
    alone = {name: logits(compiled, name) for name in ("first", "bob")}
    run = torch.compile(compiled, backend="eager", fullgraph=True, dynamic=True)
    run_ids = IDS.expand(3, -1)
    signatures, tensors = len(compiled.compilation.signatures), dict(compiled.named_parameters())
    with torch.no_grad():
        with bank.use("first", "bob", "bob") as rows:
            first = run(input_ids=run_ids, adapter_ids=rows, use_cache=False).logits
        with torch._dynamo.config.patch(error_on_recompile=True):
            bank.add("cho", folders["cho"])
            bank.replace("bob", folders["ann"])
            bank.rename("cho", "dan")
            with bank.use("first", "bob", "dan") as rows:
                second = run(input_ids=run_ids, adapter_ids=rows, use_cache=False).logits
    assert same_bits([logits(compiled, "first", "bob", "dan")], [second])
    assert len(compiled.compilation.signatures) == signatures
    assert all(tensors[name] is tensor for name, tensor in compiled.named_parameters())
    torch.testing.assert_close(first[1:2], alone["bob"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(second[:2], alone["first"].expand(2, -1, -1), atol=1e-5, rtol=1e-5)
    with pytest.raises(Exception, match="pass numbers"):
        run(input_ids=run_ids, adapter_ids=["first", "bob", "dan"], use_cache=False)


@FULL
def test_generation_by_names(model: Any, compiled: Any, folders: dict[str, Path]) -> None:
    """Each row continues as its adapter does alone, for adapters that were added after the first generation."""
    bank, options = compiled.bank(), {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}
    compiled.generate(IDS, adapter_ids=["first"], **options)
    signatures = len(compiled.compilation.signatures)
    for name in ("bob", "cho"):
        bank.add(name, folders[name])
    rows = ["cho", "first", "bob"]
    tokens = compiled.generate(IDS.expand(3, -1), adapter_ids=rows, **options)
    assert len(compiled.compilation.signatures) == signatures
    for row, name in zip(tokens, ("cho", "ann", "bob"), strict=True):
        alone = graftc.import_peft(folders[name], model)
        assert torch.equal(row, alone.generate(IDS, **options)[0])
    beams = compiled.generate(IDS.expand(2, -1), adapter_ids=["bob", "cho"], num_beams=2, **options)
    alone = graftc.import_peft(folders["bob"], model)
    assert torch.equal(beams[0], alone.generate(IDS, num_beams=2, **options)[0])
    refused("GC038", lambda: compiled.generate(IDS, adapter_ids=["nobody"], **options))
    assert bank.slots._uses == [0, 0, 0, 0]


@FULL
def test_slots_in_onnx_runtime(compiled: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    """The slots are inputs of the graph, so that an adapter can be put in one there as well."""
    ort = pytest.importorskip("onnxruntime")
    bank = compiled.bank()
    bank.add("bob", folders["bob"])
    inputs = {"input_ids": IDS.expand(3, -1), "attention_mask": torch.ones(3, 6, dtype=torch.int64)}
    rows = torch.tensor([1, 0, 1])
    path = compiled.export(tmp_path / "bank.onnx", example_inputs={**inputs, "adapter_ids": rows}, inputs=["bank"])
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(rows: list[int]) -> Tensor:
        stored = {fqn: tensor.numpy() for fqn, tensor in bank.slots.tensors.items()}
        feed = {name: tensor.numpy() for name, tensor in inputs.items()}
        return torch.from_numpy(session.run(["logits"], {**feed, **stored, "adapter_ids": rows})[0])

    assert load_file(f"{path}.bank.safetensors").keys() == bank.slots.tensors.keys()
    torch.testing.assert_close(run([1, 0, 1]), logits(compiled, "bob", "first", "bob"), atol=1e-4, rtol=1e-4)
    bank.add("cho", folders["cho"])
    torch.testing.assert_close(run([2, 0, 1]), logits(compiled, "cho", "first", "bob"), atol=1e-4, rtol=1e-4)


@pytest.mark.full
@SLOW
def test_saved_slots_are_loaded_with_their_names(
    model: Any, compiled: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    bank = compiled.bank()
    bank.add("é/2", folders["bob"])
    bank.add("gone", folders["cho"])
    bank.evict("gone")
    compiled.activate("é/2")
    loaded = graftc.load(compiled.save(tmp_path / "artifact"), model=model).eval()
    assert all(check.passed is not False for check in verify(tmp_path / "artifact", model).checks)
    assert loaded.bank().slots.names == ["first", "é/2", None, None] and loaded.active() == "é/2"
    assert same_bits([logits(loaded, "first", "é/2")], [logits(compiled, "first", "é/2")])
    loaded.bank().add("cho", folders["cho"])
    other = copy.deepcopy(loaded)
    other.bank().evict("cho")
    assert loaded.bank().names == ("first", "é/2", "cho") and other.bank().names == ("first", "é/2")
    other.load_adapter_state_dict(loaded.adapter_state_dict())
    assert other.bank().names == loaded.bank().names
    assert same_bits([logits(other, "cho")], [logits(loaded, "cho")])
    fixed = loaded.fix("é/2").eval()
    assert [entry.name for entry in fixed.spec.adapt] == ["bank"] and fixed.spec.compose == ()
    torch.testing.assert_close(logits(fixed), logits(loaded, "é/2"), atol=1e-5, rtol=1e-5)
    assert fixed.merge().certificate.passed


# --- refusals -------------------------------------------------------------------------------------------------------


def _changed(folder: Path, to: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Path:
    import shutil

    path = Path(shutil.copytree(folder, to))
    save_file(dict(change(load_file(path / TENSORS))), path / TENSORS)
    return path


@SLOW
def test_what_does_not_fit_changes_nothing(model: Any, compiled: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    """Each adapter is refused by a code and a site, and every tensor keeps its bits, also under `replace`."""
    bank = compiled.bank()
    other = tiny("llama", seed=3).eval()
    lora = {"method": "lora", "rank": 2, "target": {"role": "attn.q"}}
    elsewhere = graftc.compile({"adapt": [lora]}, other).save(tmp_path / "elsewhere")
    two = graftc.compile({"adapt": [lora, {**lora, "target": {"role": "attn.k"}}]}, model).save(tmp_path / "two")
    dora = graftc.compile({"adapt": [{**lora, "method": "dora"}]}, model).save(tmp_path / "dora")
    saved = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    fine = bank.tensors("first")
    last = list(fine)[-1]

    def nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: t.where(torch.tensor(i < len(tensors) - 1), torch.nan) for i, (k, t) in enumerate(tensors.items())}

    cases: dict[str, tuple[str, Any, str]] = {
        "rank": ("GC191", written(model, tmp_path / "high", r=7, target_modules=["v_proj"]), "rank 7"),
        "module": ("GC191", written(model, tmp_path / "out", r=1, target_modules=["v_proj", "o_proj"]), "o_proj"),
        "head": (
            "GC191",
            written(model, tmp_path / "head", **saved),
            "head",
        ),
        "dora": ("GC191", written(model, tmp_path / "dora2", target_modules=["q_proj"], use_dora=True), "dora"),
        "values": ("GC053", _changed(folders["bob"], tmp_path / "nan", nan), "not finite"),
        "tensors": ("GC053", _changed(folders["bob"], tmp_path / "less", lambda t: dict([*t.items()][1:])), "pair"),
        "base": ("GC087", elsewhere, "another base"),
        "several": ("GC191", two, "several"),
        "method": ("GC191", dora, "dora"),
        "nothing": ("GC080", tmp_path / "nothing", "does not exist"),
        "shape": ("GC191", {**fine, last: fine[last][:-1]}, "B is"),
        "whole numbers": ("GC191", {n: t.long() for n, t in fine.items()}, "floating-point"),
        "complex": ("GC191", {n: t.to(torch.complex64) for n, t in fine.items()}, "floating-point"),
        "meta": ("GC191", {n: t.to("meta") for n, t in fine.items()}, "with values"),
        "sparse": ("GC191", {n: t.to_sparse() for n, t in fine.items()}, "dense"),
        "half": ("GC053", {n: t for n, t in fine.items() if n != last}, "pair"),
        "name": ("GC053", {**fine, "model.weight": fine[last]}, "model.weight"),
        "kind": ("GC073", 7, ""),
    }
    names, before = bank.slots.names, {fqn: tensor.clone() for fqn, tensor in bank.slots.tensors.items()}
    for code, source, word in cases.values():
        for change in (lambda s=source: bank.add("new", s), lambda s=source: bank.replace("first", s)):
            error = refused(code, change)
            assert word in f"{error.message} {error.details}", error
    for scale in ("2", True, float("nan")):
        refused("GC073", lambda s=scale: bank.add("new", fine, scale=s))
    for change in (bank.add, bank.replace):  # a folder states its own
        name = "first" if change == bank.replace else "new"
        error = refused("GC073", lambda c=change, n=name: c(n, folders["bob"], scale=2.0))
        assert str(folders["bob"]) in error.message
    assert bank.slots.names == names
    assert all(torch.equal(tensor, before[fqn]) for fqn, tensor in bank.slots.tensors.items())


@SLOW
def test_names_and_room(compiled: Any, folders: dict[str, Path]) -> None:
    bank = compiled.bank()
    for name in ("bob", "cho", "x" * 128):
        bank.add(name, folders["bob"])
    for code, call in (
        ("GC190", lambda: bank.add("more", folders["bob"])),
        ("GC005", lambda: bank.add("bob", folders["bob"])),
        ("GC002", lambda: bank.rename("bob", "x" * 129)),
        ("GC002", lambda: bank.rename("bob", "")),
        ("GC002", lambda: bank.rename("bob", "a\nb")),
        ("GC005", lambda: bank.rename("bob", "cho")),
        ("GC038", lambda: bank.rename("nobody", "dan")),
        ("GC038", lambda: bank.evict("nobody")),
        ("GC038", lambda: bank.replace("nobody", folders["bob"])),
        ("GC190", lambda: bank.evict("first")),
        ("GC038", lambda: compiled.activate("nobody")),
        ("GC091", lambda: compiled.bank("other")),
    ):
        refused(code, call)
    assert bank.names == ("first", "bob", "cho", "x" * 128)
    assert refused("GC038", lambda: bank.evict("bobb")).hint == "did you mean 'bob'?"


def test_names_are_stored_as_they_are() -> None:
    names = ["a", None, "é" * 64, "漢字/1"]
    assert decoded(encoded(names)) == names
    assert encoded(names).shape == (4, 128)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"adapt": [{**SPEC["adapt"][0], "method": "ia3"}]}, "GC002"),
        ({"compose": {**SPEC["compose"], "share": ["A"]}}, "GC002"),
        ({"compose": {**SPEC["compose"], "slots": -1}}, "GC002"),
    ],
)
def test_specs_without_such_slots(change: dict[str, Any], code: str) -> None:
    with pytest.raises(GraftError):
        graftc.Spec.model_validate({"version": 1, **SPEC, **change})


@SLOW
@pytest.mark.parametrize("change", [{"method": "dora"}, {"init": "pissa"}, {"bias": "lora_only"}])
def test_slots_contain_plain_lora(change: dict[str, Any], model: Any) -> None:
    error = refused("GC036", lambda: graftc.compile({**SPEC, "adapt": [{**SPEC["adapt"][0], **change}]}, model))
    assert "slot" in error.message
    plain = graftc.compile({**SPEC, "compose": {"bank": ["first"]}}, model)
    refused("GC190", plain.bank)


# --- several threads ------------------------------------------------------------------------------------------------


def beside(call: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    """Start a call in another thread; its error, if any, is appended to the returned list."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, errors


@SLOW
def test_a_use_keeps_what_it_began_with(compiled: Any, folders: dict[str, Path]) -> None:
    """Evicted and replaced adapters stay for those who use them; others see the change at once."""
    bank = compiled.bank()
    bank.add("bob", folders["bob"])
    bob, ann = logits(compiled, "bob"), logits(compiled, "first")
    with bank.use("bob") as rows:
        bank.replace("bob", folders["ann"])
        assert same_bits([logits(compiled, *rows.tolist())], [bob])
        torch.testing.assert_close(logits(compiled, "bob"), ann, atol=1e-6, rtol=1e-6)
        with bank.use("bob") as others:
            bank.evict("bob")
            refused("GC038", lambda: logits(compiled, "bob"))
            bank.add("dan", folders["cho"])
            assert bank.slots.names == ["first", None, None, "dan"]
            assert same_bits([logits(compiled, *rows.tolist())], [bob])
            torch.testing.assert_close(logits(compiled, *others.tolist()), ann, atol=1e-6, rtol=1e-6)
            refused("GC190", lambda: bank.add("eve", folders["cho"]))
    assert all(not tensor[1:3].any() for tensor in bank.slots.tensors.values())
    refused("GC038", lambda: logits(compiled, *rows.tolist()))


@pytest.mark.full
@SLOW
def test_without_an_empty_slot_a_replacement_waits(compiled: Any, folders: dict[str, Path]) -> None:
    bank = compiled.bank()
    for name in ("bob", "cho", "dan"):
        bank.add(name, folders["bob"])
    before = logits(compiled, "bob")
    with bank.use("bob") as rows:
        begun = time.monotonic()
        refused("GC190", lambda: bank.replace("bob", folders["cho"], wait=0.05))
        assert 0.04 < time.monotonic() - begun < 5
        thread, errors = beside(lambda: bank.replace("bob", folders["cho"]))
        time.sleep(0.05)
        assert thread.is_alive()
        assert same_bits([logits(compiled, *rows.tolist())], [before])
    thread.join(10)
    assert not thread.is_alive() and not errors
    torch.testing.assert_close(logits(compiled, "bob")[0], outputs(compiled.compilation.source, folders["cho"], IDS)[0])
    with bank.use("first"):  # the active adapter stays in its slot
        refused("GC190", lambda: bank.replace("first", folders["cho"], wait=0.0))


@SLOW
def test_a_write_that_fails_leaves_the_slot_as_it_was(
    compiled: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, write = compiled.bank(), Slots.write
    bank.add("bob", folders["bob"])
    before, names = {n: t.clone() for n, t in bank.slots.tensors.items()}, bank.slots.names
    fails = [True]

    def half(self: Slots, slot: int, values: Mapping[str, Tensor]) -> None:
        write(self, slot, dict([*values.items()][: len(values) // 2]) if fails[0] else values)
        if fails[0]:
            fails[0] = False
            raise MemoryError

    monkeypatch.setattr(Slots, "write", half)
    for change in (lambda: bank.replace("bob", folders["cho"]), lambda: bank.add("cho", folders["cho"])):
        fails[0] = True
        with pytest.raises(MemoryError):
            change()
        assert bank.slots.names == names
        assert all(torch.equal(tensor, before[name]) for name, tensor in bank.slots.tensors.items())
    bank.add("cho", folders["cho"])


@SLOW
def test_the_pool_keeps_what_was_used_last(compiled: Any, folders: dict[str, Path]) -> None:
    """Three adapters beside the active one: the fourth takes the place of the one unused for longest."""
    read: list[str] = []

    def source(name: str) -> Path:
        read.append(name)
        return folders["cho" if name == "cho" else "bob"]

    pool = graftc.AdapterPool(compiled, source, wait=0.05)
    for name in ("a", "b", "cho", "a", "d"):
        with pool.use(name) as rows:
            assert logits(compiled, *rows.tolist()).shape[0] == 1
    assert pool.bank.names == ("first", "a", "d", "cho") and read == ["a", "b", "cho", "d"]
    counters = pool.counters
    assert (counters.hits, counters.loads, counters.evictions) == (1, 4, 1)
    with pool.use("a", "cho", "a") as rows:
        assert rows.tolist() == [1, 3, 1]
        with pool.use("d"):
            refused("GC190", pool.use("e").__enter__)
        refused("GC190", pool.use("d", "e", "f", "g").__enter__)
        assert pool.bank.names == ("first", "a", "d", "cho")
        with pool.use("e", "a"):
            assert pool.bank.names == ("first", "a", "e", "cho")
    assert pool.bank.slots._uses == [0] * 4 and not pool.bank.slots._coming and not pool.bank.slots._written


@SLOW
def test_an_adapter_that_cannot_be_read_drives_out_no_other(compiled: Any, folders: dict[str, Path]) -> None:
    pool = graftc.AdapterPool(compiled, folders["ann"].parent)
    with pool.use("ann", "bob", "cho"):
        pass
    for name in ("nobody", "..", "../adapters", "", "/etc"):
        refused("GC002" if not name else "GC091", pool.use("bob", name).__enter__)
    assert pool.bank.names == ("first", "ann", "bob", "cho") and pool.counters.evictions == 0
    assert pool.bank.slots._uses == [0] * 4 and not pool.bank.slots._coming


@SLOW
def test_requests_for_one_adapter_read_it_once(compiled: Any, folders: dict[str, Path]) -> None:
    read, begun = [], threading.Event()

    def slowly(name: str) -> Path:
        begun.set()
        time.sleep(0.1)
        read.append(name)
        return folders[name]

    pool = graftc.AdapterPool(compiled, slowly)

    def request() -> None:
        with pool.use("bob", "cho") as rows:
            assert rows.tolist() == [pool.bank.slots.number(name) for name in ("bob", "cho")]

    started = [beside(request) for _ in range(4)]
    assert begun.wait(10)
    with pool.use("first"):  # others do not wait for files
        assert read == []
    for thread, errors in started:
        thread.join(10)
        assert not thread.is_alive() and not errors
    assert sorted(read) == ["bob", "cho"] and pool.counters.loads == 2 and pool.counters.hits == 7


@SLOW
def test_coroutines(compiled: Any, folders: dict[str, Path]) -> None:
    """The event loop goes on while an adapter is read, and a request that is cancelled keeps nothing."""
    release = threading.Event()

    def source(name: str) -> Path:
        assert release.wait(10)
        return folders["bob"]

    pool = graftc.AdapterPool(compiled, source)

    async def request(name: str) -> list[int]:
        async with pool.use(name) as rows:
            return rows.tolist()

    async def requests() -> list[int]:
        gone, stays = asyncio.create_task(request("bob")), asyncio.create_task(request("cho"))
        await asyncio.sleep(0.05)
        gone.cancel()
        await asyncio.sleep(0)
        assert gone.cancelled() and not stays.done()
        release.set()
        found = await asyncio.wait_for(stays, 10)
        while pool.bank.slots._coming or any(pool.bank.slots._uses):
            await asyncio.sleep(0.01)
        return found

    assert result_of(asyncio.wait_for(requests(), 20)) in ([1], [2])
    assert set(pool.bank.names) == {"first", "bob", "cho"}


@SLOW
def test_requests_from_four_threads(tmp_path: Path) -> None:
    """The gate's requests (tests/gates/test_slots.py), fewer of them."""
    served = traffic(tiny("llama").eval(), tmp_path, adapters=9, slots=4)
    served.run(150, threads=4)
    assert served.wrong == []
    assert served.done == 150
    counters = served.pool.counters
    assert counters.evictions > 10 and counters.loads > 10 and counters.hits > 10
    assert served.pool.bank.slots._uses == [0] * 5 and not served.pool.bank.slots._coming
