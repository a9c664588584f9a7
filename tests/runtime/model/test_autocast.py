"""Under autocast, a compiled model computes what its source computes, from the first call on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.utils.generic import maybe_autocast

import graftc
from graftc.testing import tiny

SITES = {"role": ["attn.v", "ffn.down"]}
EXACT: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "target": SITES},
    "dora": {"rank": 2, "target": SITES},
    "loha": {"rank": 2, "target": SITES},
    "c3a": {"block_size": 4, "target": SITES},
    "gralora": {"rank": 2, "hybrid_rank": 2, "target": SITES},
    "hira": {"rank": 2, "target": SITES},
    "lokr": {"factor": 4, "target": SITES},
    "miss": {"rank": 7, "target": SITES},
    "shira": {"rank": 2, "target": SITES},
    "diff_pruning": {"target": SITES},
    "lt_sft": {"target": SITES},
    "ia3": {},
}
"""Methods that change nothing at first: to the bit what the source gives."""

ROUNDED: dict[str, dict[str, Any]] = {
    **{"pfeiffer": {}, "houlsby": {}},
    **{"oft": {"block_size": 8, "target": SITES}, "boft": {"target": SITES}},
    **{"lily": {"rank": 2, "target": SITES}},
}
"""Methods that change nothing at first but add a branch, or have an input of their own for rows of a fused layer, whose
bias is then added separately: within the rounding of a sum in 16 bits."""

OTHER: dict[str, dict[str, Any]] = {"prefix": {"length": 3}, "prompt": {"length": 2}}
"""Methods that change the outputs from the start: held against their own in float32."""

QUICK = [("bert", "lora"), ("gpt2", "dora"), ("bert", "pfeiffer"), ("gpt2", "prefix")]
CASES = [
    pytest.param(family, method, marks=() if (family, method) in QUICK else pytest.mark.full)
    for family in ("bert", "llama", "gpt2")
    for method in (*EXACT, *ROUNDED, *OTHER)
]


def inputs(family: str) -> dict[str, Any]:
    ids, mask = torch.randint(2, 90, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def labels(family: str, ids: torch.Tensor) -> torch.Tensor:
    return torch.tensor([0, 1]) if family == "bert" else ids


@pytest.mark.full
@pytest.mark.parametrize(("family", "method"), CASES)
def test_the_first_call_under_autocast(family: str, method: str) -> None:
    source = tiny(family).requires_grad_(False)
    compiled = graftc.compile({"adapt": [{"method": method, **{**EXACT, **ROUNDED, **OTHER}[method]}]}, source).eval()
    given = inputs(family)
    before = compiled(**given).logits
    more = {**given, "output_hidden_states": True}  # a signature of its own
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            result, expected = compiled(**more).logits, source(**more, use_cache=False).logits
        with compiled.disabled(), torch.no_grad():
            assert torch.equal(compiled(**given).logits, expected)
        loss = compiled.train()(**given, labels=labels(family, given["input_ids"])).loss
    loss.backward()
    assert result.dtype == expected.dtype
    bound = 0.0 if method in EXACT else 0.05
    assert (result - (before if method in OTHER else expected)).abs().max() <= bound + 0.15 * (method in OTHER)
    grads = [p.grad for p in compiled.parameters() if p.requires_grad]
    assert all(grad is None or torch.isfinite(grad).all() for grad in grads) and any(g is not None for g in grads)
    assert torch.equal(compiled.eval()(**given).logits, before)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_kept_under_autocast_serves_float32(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFTC_CACHE", str(tmp_path))
    spec, source, given = {"adapt": [{"method": "ia3"}]}, tiny("bert").requires_grad_(False), inputs("bert")
    with torch.autocast("cpu", dtype):
        compiled = graftc.compile(spec, source).eval()
        compiled.merge(allow_unchanged=True)
        assert torch.equal(compiled(**given).logits, source(**given).logits)
    again = graftc.compile(spec, source).eval()
    assert again.report.cached
    assert torch.equal(again(**given).logits, source(**given).logits)


@pytest.mark.full
def test_a_model_that_is_trained_in_bfloat16_by_a_trainer(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class Rows(torch.utils.data.Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, number: int) -> dict[str, Any]:
            return {"input_ids": torch.arange(2, 8 + number % 1), "labels": number % 2}

    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": ["attn.v"]}}]}
    compiled = graftc.compile(spec, tiny("bert"))
    before = {name: tensor.clone() for name, tensor in compiled.adapter_state_dict().items()}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, bf16=True, use_cpu=True, report_to=[],
        save_strategy="no", learning_rate=1e-2,
    )  # fmt: skip
    module: nn.Module = compiled
    Trainer(module, arguments, train_dataset=Rows()).train()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in compiled.adapter_state_dict().items())


class Casting(nn.Module):
    """A model that casts to the dtype that a value has outside of autocast."""

    def __init__(self, cast: str) -> None:
        super().__init__()
        self.inner, self.cast = nn.Linear(6, 8), cast

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        casts: dict[str, Any] = {
            "float": lambda: y.float(),
            "to": lambda: y.to(torch.float32),
            "to of an input": lambda: y.to(x.dtype),
            "type": lambda: y.type(torch.float32),
            "norm": lambda: y.float().pow(2).mean(-1, keepdim=True) * y.float(),
        }
        result: torch.Tensor = casts[self.cast]()
        return result


@pytest.mark.parametrize("cast", ["float", "to", "to of an input", "type", "norm"])
def test_casts_to_the_same_type_hold_under_autocast(cast: str) -> None:
    model = Casting(cast).eval()
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": ["inner"]}}]}
    compiled = graftc.compile(spec, model, (torch.randn(3, 6),)).eval()
    x = torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected, result = model(x), compiled(x)
    assert result.dtype == expected.dtype == torch.float32 and torch.equal(result, expected)


class Angles(nn.Module):
    """The angles of rotary positions as releases of transformers before 5.15 compute them."""

    def __init__(self, known: Any) -> None:
        super().__init__()
        self.inv_freq = known.inv_freq

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        column = self.inv_freq[None, :, None].float().expand(position_ids.shape[0], -1, 1)
        with maybe_autocast(device_type=x.device.type, enabled=False):
            angles = (column.float() @ position_ids[:, None, :].float()).transpose(1, 2)
            both = torch.cat((angles, angles), dim=-1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)


@pytest.mark.slow
def test_positions_are_not_rounded() -> None:
    """A graph computes in float32 what the source keeps from autocast: bfloat16 has no odd numbers above 256."""
    model: Any = tiny("llama").eval()
    model.model.rotary_emb = Angles(model.model.rotary_emb)
    compiled = graftc.compile({"adapt": [{"method": "lora", "rank": 2, "target": {"role": ["attn.q"]}}]}, model).eval()
    example = {**inputs("llama"), "position_ids": torch.arange(9).expand(2, -1) + 300}
    with torch.no_grad():
        exact = model(**example).logits
        assert torch.equal(compiled(**example).logits, exact)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(compiled(**example).logits, model(**example).logits)


@pytest.mark.slow
def test_experts_are_chosen_as_by_the_source() -> None:
    """A router that computes in float32 also does so under autocast."""
    model = tiny("mixtral").eval()
    compiled = graftc.compile({"adapt": [{"method": "lora", "rank": 2, "target": {"role": ["attn.q"]}}]}, model).eval()
    given = inputs("mixtral")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(compiled(**given).logits, model(**given).logits)
