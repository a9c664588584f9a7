"""Models quantised by bitsandbytes or torchao: their modules are taken over, bit for bit."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

import graftc
from graftc.compiler.quantised_sources.convert import arrived
from graftc.passes.core.packing.modules import packed_weights
from graftc.passes.core.packing.packed_tensor import dense as dense_value
from graftc.specs.errors.diagnostics import GraftError
from tests.runtime.sources.quantised import writers
from tests.runtime.sources.quantised.saving import require_refused, saved_and_loaded

LORA: dict[str, Any] = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": ["attn.q", "ffn.up"]}}]}
IDS = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))


def llama(dtype: torch.dtype = torch.float32) -> Any:
    # Widths are multiples of a block: for others, bitsandbytes' kernel for the CPU reads scales of the wrong blocks.
    return writers.llama(dtype, inner=128)


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 99, "n_positions": 32}
    still = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **still, bos_token_id=1, eos_token_id=1)).eval()


@pytest.fixture(scope="module")
def bnb() -> Any:
    return pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def quantization() -> Any:
    pytest.importorskip("torchao", minversion="0.18")  # earlier ones have other classes of tensors
    return importlib.import_module("torchao.quantization")


@pytest.mark.filterwarnings("ignore:GC164")
class TestBitsAndBytes:
    """Models as transformers loads them with bitsandbytes on a CPU."""

    def load(self, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(**options), dtype=dtype, device_map="cpu"
        )

    def dense(self, bnb: Any, model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        weights = {}
        for path, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, bnb.nn.Linear4bit):
                weights[f"{path}.weight"] = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).to(dtype)
            elif isinstance(module, bnb.nn.Linear8bitLt):
                codes = weight.data if weight.CB is None else weight.CB
                weights[f"{path}.weight"] = bnb.functional.int8_vectorwise_dequant(codes, weight.SCB).to(dtype)
        return weights

    @pytest.mark.parametrize(
        ("dtype", "options"),
        [
            (torch.float32, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
            (torch.bfloat16, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
            (torch.float16, {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16}),
            (torch.float32, {"load_in_8bit": True}),
        ],
        ids=["nf4", "nf4 double", "fp4 in bfloat16", "int8"],
    )
    def test_weights_share_its_codes_and_are_its_own(
        self, bnb: Any, dtype: torch.dtype, options: dict[str, Any], tmp_path: Path
    ) -> None:
        """Weights are exact both in memory and read from the folder without the library."""
        llama(dtype).save_pretrained(tmp_path / "dense")
        model = self.load(tmp_path / "dense", dtype, **options)
        expected = self.dense(bnb, model, dtype)
        packed = packed_weights(arrived(model))
        assert packed.keys() == expected.keys()
        assert all(torch.equal(dense_value(packed[name]), weight) for name, weight in expected.items())
        layer = "model.layers.0.mlp.up_proj"
        theirs, ours = (
            model.get_submodule(layer).weight,
            arrived(model).get_submodule(layer)._parameters["weight_codes"],
        )
        assert ours is not None and ours.untyped_storage().data_ptr() == theirs.untyped_storage().data_ptr()
        assert isinstance(model.get_submodule(layer), bnb.nn.Linear4bit | bnb.nn.Linear8bitLt), "the source has changed"
        model.save_pretrained(tmp_path / "quantised")
        read = packed_weights(graftc.load_base(tmp_path / "quantised"))
        assert read.keys() == expected.keys()
        assert all(torch.equal(dense_value(read[name]), weight) for name, weight in expected.items())

    @pytest.mark.full
    def test_outputs_are_the_librarys(self, bnb: Any, tmp_path: Path) -> None:
        """In float32, outputs of 4 bits agree, and those of 8 bits up to the rounding of inputs.

        Inputs are not rounded here. The library's CPU kernel rounds 4-bit scales in eval mode, so train mode is used.
        """
        for make in (llama, gpt2):
            make().save_pretrained(tmp_path / make.__name__)
            for options, far in (({"load_in_4bit": True}, 1e-6), ({"load_in_8bit": True}, 0.03)):
                model = self.load(tmp_path / make.__name__, **options)
                compiled: Any = graftc.compile(LORA, model).eval()
                with torch.no_grad():
                    ours, theirs = compiled(input_ids=IDS).logits, model.train(far < 1e-3)(IDS).logits
                assert torch.allclose(ours, theirs, atol=far)
                assert far < 1e-3 or not torch.allclose(ours, theirs, atol=1e-6), "inputs were not rounded there"

    @pytest.mark.full
    @pytest.mark.parametrize("make", [llama, gpt2])
    def test_adapters_load_on_the_dense_folder_that_was_quantised_while_loading(
        self, bnb: Any, make: Any, tmp_path: Path
    ) -> None:
        make().save_pretrained(tmp_path / "base")
        compiled: Any = graftc.compile(LORA, self.load(tmp_path / "base", load_in_4bit=True))
        places = saved_and_loaded(tmp_path, compiled, IDS)
        other = make()
        with torch.no_grad():
            # Only packed weights differ, and rounding hides the difference except in their scales.
            next(p for name, p in other.named_parameters() if ".0." in name and p.dim() == 2).mul_(1.01)
        require_refused(places, other)

    def test_other_modules_of_it_are_refused(self, bnb: Any) -> None:
        model = nn.ModuleList([bnb.nn.Embedding4bit(8, 64)])
        with pytest.raises(GraftError, match=r"GC162.*Embedding4bit"):
            arrived(model)
        with pytest.raises(GraftError, match=r"GC162.*not quantised yet"):
            arrived(nn.ModuleList([bnb.nn.Linear4bit(64, 64)]))

    def test_scales_that_a_kernel_rounded_are_refused(self, bnb: Any) -> None:
        linear = bnb.nn.Linear4bit(64, 64).to("cpu")
        linear.weight.quant_state.packing_format_for_cpu = True
        with pytest.raises(GraftError, match=r"GC162.*rounded for a CPU kernel"):
            arrived(nn.ModuleList([linear]))


class TestTorchao:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "IntxWeightOnlyConfig", "int4", "Float8WeightOnlyConfig"])
    def test_weights_are_its_own(self, quantization: Any, name: str, dtype: torch.dtype) -> None:
        if name == "int4":
            granularity = quantization.granularity.PerGroup(32)
            config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity)
        else:
            config = getattr(quantization, name)()
        model = llama(dtype)
        quantization.quantize_(model, config)
        packed = packed_weights(arrived(model))
        linear = {f"{path}.weight": m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
        assert packed.keys() == linear.keys()
        assert all(torch.equal(dense_value(packed[name]), m.weight.dequantize()) for name, m in linear.items())
        codes = arrived(model).model.layers[0].mlp.up_proj.weight_codes
        assert codes.data_ptr() == model.model.layers[0].mlp.up_proj.weight.qdata.data_ptr()

    @pytest.mark.full
    def test_a_model_of_it_trains(self, quantization: Any) -> None:
        model = llama()
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        compiled: Any = graftc.compile(LORA, model)
        with torch.no_grad():
            assert torch.allclose(compiled.eval()(input_ids=IDS).logits, model(IDS).logits, atol=1e-5)
        compiled.train()(input_ids=IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for p in compiled.parameters() if p.requires_grad)


class _Foreign(nn.Linear):
    pass


@pytest.mark.slow
def test_modules_of_other_libraries_are_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules are recognised by the package of their class; none of these libraries is installed."""
    for package, way in (("gptqmodel", "load_base"), ("eetq", "base: {quantize: nf4}"), ("hqq", "load_base")):
        monkeypatch.setattr(_Foreign, "__module__", f"{package}.nn")
        with pytest.raises(GraftError, match=f"GC162.*_Foreign of {package}") as caught:
            graftc.compile(LORA, nn.ModuleList([_Foreign(2, 2)]))
        assert way in str(caught.value.hint)


def test_a_plain_model_is_left_as_it_is() -> None:
    model = llama()
    assert arrived(model) is model


def test_what_a_library_says_of_its_model_is_not_said_of_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers refuse models that are marked as quantised."""
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.ModuleDict({"linear": bnb.nn.Linear4bit(64, 64).to("cpu")})
    model.hf_quantizer, model.is_loaded_in_4bit = SimpleNamespace(), True  # type: ignore[assignment]
    copied = arrived(model)
    assert not hasattr(copied, "hf_quantizer") and not hasattr(copied, "is_loaded_in_4bit") and model.is_loaded_in_4bit
