"""State dicts of a compiled model: what is in them, what loads, and that the base is never written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import graftc
from graftc.testing import perturb, tiny
from tests.kit.comparing import same_adapters
from tests.kit.models import adapted
from tests.kit.refusals import refused

SPEC: dict[str, Any] = {
    "adapt": [{"method": "lora", "rank": 2, "target": {"role": ["attn.q", "attn.v"]}}],
    "train": ["**.ln_f"],
}
RECORD = "_extra_state"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("gpt2")


@pytest.fixture(scope="module")
def trained(model: Any) -> Any:
    return adapted(model, **SPEC)


@pytest.fixture
def other(trained: Any) -> Any:
    """The model before training."""
    compiled = copy.deepcopy(trained)
    with torch.no_grad():
        for tensor in compiled.adapter_state_dict().values():
            tensor.zero_()
    return compiled


@pytest.mark.slow
def test_a_state_dict_holds_what_trains_and_no_value_of_the_base(model: Any, trained: Any) -> None:
    state = trained.state_dict()
    adapters = trained.adapter_state_dict()
    assert {name: t for name, t in state.items() if name in adapters}.keys() == adapters.keys()
    rest = {name: t.numel() for name, t in state.items() if name not in adapters}
    assert rest.pop(RECORD) < 5000
    assert sum(rest.values()) == 0 and len(rest) == 1, "one empty tensor in the place of the base's"


@pytest.mark.slow
def test_the_full_state_dict_has_everything_and_ties_once(model: Any, trained: Any) -> None:
    full = trained.full_state_dict()
    own = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    assert full.keys() == own.keys() | trained.adapter_state_dict().keys()
    assert all(torch.equal(full[name], tensor) for name, tensor in own.items())


@pytest.mark.parametrize("kind", ["state", "full", "full with ties", "adapters"])
@pytest.mark.parametrize("assign", [False, True])
def test_every_kind_loads(model: Any, trained: Any, other: Any, kind: str, assign: bool) -> None:
    state = {
        "state": trained.state_dict,
        "full": trained.full_state_dict,
        "full with ties": lambda: {**trained.full_state_dict(), "lm_head.weight": model.lm_head.weight},
        "adapters": trained.adapter_state_dict,
    }[kind]()
    addresses = {name: t.data_ptr() for name, t in other.named_parameters() if ".graftc." not in name}
    given = set(state)
    result = other.load_state_dict(state, assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    assert same_adapters(other, trained) and set(state) == given
    assert addresses == {name: t.data_ptr() for name, t in other.named_parameters() if ".graftc." not in name}


def test_what_is_missing_or_unknown_is_an_error_of_the_usual_form(trained: Any, other: Any) -> None:
    state = trained.state_dict()
    name = next(iter(trained.adapter_state_dict()))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*graftc"):
        other.load_state_dict({n: t for n, t in state.items() if n != name})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*graftc"):
        other.load_state_dict({**state, name + "x": torch.ones(1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict({**state, name: state[name][:1]})
    result = other.load_state_dict(
        {**{n: t for n, t in state.items() if n != name}, "new": torch.ones(1)}, strict=False
    )
    assert result.missing_keys == [name] and result.unexpected_keys == ["new"]


@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.1.mlp.c_fc.bias", "lm_head.weight"])
@pytest.mark.parametrize("change", ["value", "size"])
@pytest.mark.parametrize("strict", [True, False])
def test_another_base_is_refused_and_nothing_is_written(
    model: Any, trained: Any, other: Any, name: str, change: str, strict: bool
) -> None:
    before = copy.deepcopy(model.state_dict())
    mine = copy.deepcopy(other)
    full = {**trained.full_state_dict(), "lm_head.weight": model.lm_head.weight.detach()}
    full[name] = full[name] + 1 if change == "value" else full[name][:1]
    refused(other.load_state_dict, full, strict, code="GC087")
    assert same_adapters(other, mine), "nothing was copied"
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.slow
def test_what_was_trained_on_another_base_is_refused(model: Any, trained: Any) -> None:
    base = copy.deepcopy(model)
    with torch.no_grad():
        base.transformer.h[0].mlp.c_fc.bias += 1
    compiled = graftc.compile(SPEC, base)
    refused(compiled.load_state_dict, trained.state_dict(), code="GC087")
    compiled.load_adapter_state_dict(trained.adapter_state_dict())


def test_a_model_that_holds_a_compiled_one(trained: Any, other: Any) -> None:
    outer = nn.ModuleDict({"first": nn.Linear(2, 2), "inner": trained})
    state = outer.state_dict(keep_vars=True)
    own = {f"inner.{name}" for name in trained.state_dict()}
    assert state.keys() == {"first.weight", "first.bias", *own}
    assert any(isinstance(t, nn.Parameter) and t.requires_grad for n, t in state.items() if n.startswith("inner."))
    again = nn.ModuleDict({"first": nn.Linear(2, 2), "inner": other})
    result = again.load_state_dict(outer.state_dict())
    assert not result.missing_keys and same_adapters(other, trained)


def test_the_functions_of_torch_distributed(trained: Any, other: Any) -> None:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    state = get_model_state_dict(trained)
    assert state.keys() == trained.state_dict().keys()
    set_model_state_dict(other, state)
    assert same_adapters(other, trained)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit"])
def test_no_loader_takes_it_for_a_plain_model(family: str, tmp_path: Path) -> None:
    """transformers refuses it even with the config beside it, and so does torch, strict or not."""
    from transformers import AutoModel

    model: Any = tiny(family)
    roles = ["attn.q"] if family != "t5" else ["encoder.attn.q"]
    compiled = graftc.compile({"adapt": [{"method": "lora", "rank": 2, "target": {"role": roles}}]}, model)
    save_file(compiled.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoModel.from_pretrained(tmp_path)
    for config in (model.config, compiled.config):
        config.save_pretrained(tmp_path)
        for loader in (AutoModel, type(model)):
            with pytest.raises(RuntimeError, match="mismatch"):
                loader.from_pretrained(tmp_path)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="size mismatch"):
            model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict)


# Checkpoints.


@pytest.fixture(scope="module")
def checkpoint(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_file(trained.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "training_args.bin").write_bytes(b"whatever a trainer writes")
    return folder


@pytest.mark.full
def test_a_checkpoint_is_enough_to_make_the_model_again(model: Any, trained: Any, checkpoint: Path) -> None:
    for path in (checkpoint, str(checkpoint / "model.safetensors")):
        loaded: Any = graftc.load(path, model)
        assert same_adapters(loaded, trained) and loaded.spec == trained.spec
        ids = torch.arange(5, 19).reshape(2, 7)
        with torch.no_grad():
            assert torch.equal(loaded.eval()(input_ids=ids).logits, trained.eval()(input_ids=ids).logits)


@pytest.mark.full
def test_the_base_is_found_where_it_was(tmp_path: Path) -> None:
    base: Any = tiny("gpt2")
    base.save_pretrained(tmp_path / "base")
    compiled: Any = graftc.compile(SPEC, type(base).from_pretrained(tmp_path / "base"))
    perturb(compiled)
    (tmp_path / "run").mkdir()
    save_file(compiled.state_dict(), tmp_path / "run" / "model.safetensors")
    assert same_adapters(graftc.load(tmp_path / "run"), compiled)


def test_a_checkpoint_of_another_base_or_without_one(model: Any, checkpoint: Path, tmp_path: Path) -> None:
    base = copy.deepcopy(model)
    with torch.no_grad():
        base.transformer.wpe.weight += 1
    refused(graftc.load, checkpoint, base, code="GC087")
    refused(graftc.load, checkpoint, code="GC086")
    model.save_pretrained(tmp_path / "plain")
    refused(graftc.load, tmp_path / "plain", model, code="GC080")


@pytest.mark.full
def test_a_damaged_checkpoint_is_refused_by_code(model: Any, trained: Any, tmp_path: Path) -> None:
    state = trained.state_dict()
    text = bytes(state[RECORD].numpy())
    name = next(iter(trained.adapter_state_dict()))

    def load(**changes: Any) -> Callable[[], object]:
        changed = {n: t for n, t in {**state, **changes}.items() if t is not None}
        save_file(changed, tmp_path / "model.safetensors")
        return lambda: graftc.load(tmp_path, model)

    def record(text: bytes) -> torch.Tensor:
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)

    for damaged in (
        text[:-3],
        b"[" * 100_000,
        b"[1]",
        b"\xff\xfe",
        text.replace(b'"seed":0', b'"seed":"0"'),
        text.replace(b'"seed"', b'"extra":1,"seed"'),
        text.replace(b'"dtype":"i64"', b'"dtype":"zz"'),
    ):
        assert damaged != text
        refused(load(**{RECORD: record(damaged)}), code="GC082")
    newer = text.replace(b'"schema_version":1', b'"schema_version":2')
    refused(load(**{RECORD: record(newer)}), code="GC081")
    refused(load(**{name: None}), code="GC084")
    refused(load(**{name + "x": torch.ones(1)}), code="GC084")
    refused(load(**{name: state[name][:1].clone()}), code="GC084")
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 20)
    refused(graftc.load, tmp_path, model, code="GC082")


@pytest.mark.full
@pytest.mark.parametrize("assign", [False, True])
def test_tensors_of_another_type_are_cast(assign: bool) -> None:
    """Tensors are cast with ``assign`` as well, because graphs take the dtypes that they were made for."""
    compiled = graftc.compile(
        {"adapt": [{"method": "lora", "rank": 2, "target": {"role": ["attn.q"]}}]}, tiny("bert")
    ).eval()
    state = {n: t.double() if t.is_floating_point() else t for n, t in compiled.state_dict().items()}
    compiled.load_state_dict(state, assign=assign)
    assert {t.dtype for t in compiled.adapter_state_dict().values()} == {torch.float32}
    compiled(torch.ones(2, 3, dtype=torch.long))
