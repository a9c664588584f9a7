"""aLoRA in other programs: GGUF adapters in llama.cpp's server, and what would apply them to every token."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftc
from graftc.runtime.interop.layouts.convert import AdapterSource
from graftc.specs.errors.diagnostics import GraftWarning
from tests.kit.models import adapted
from tests.kit.refusals import refused
from tests.kit.specs import varied

gguf = pytest.importorskip("gguf")
INVOCATION = [40, 41, 42]
PROMPT = [10, 11, 12, 13, 14, 15, 16, 17, *INVOCATION, 50, 51, 52]
START = PROMPT.index(INVOCATION[0])
ALORA: dict[str, Any] = {
    "method": "alora",
    "invocation": INVOCATION,
    "rank": 4,
    "target": {"role": ["attn.q", "attn.k", "attn.v", "ffn.down"]},
}
TOKENS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a tokenizer of bytes, as llama.cpp needs one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("alora")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(["<s>", "</s>", *letters, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    own.save_pretrained(path / "base")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "initializer_range": 0.3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(vocab), bos_token_id=0, eos_token_id=1, **sizes, **heads)
    LlamaForCausalLM(config).save_pretrained(path / "base")
    return path


@pytest.fixture(scope="module")
def compiled(folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    return adapted(LlamaForCausalLM.from_pretrained(folder / "base").eval(), ALORA, noise=0.3)


@pytest.mark.full
def test_the_key_in_the_file(compiled: Any, tmp_path: Path) -> None:
    """The tokens are an array of the type that llama.cpp reads; one file has adaptations of one invocation only."""
    compiled.export(tmp_path / "adapter.gguf", format="gguf")
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    field = reader.fields["adapter.alora.invocation_tokens"]
    assert field.contents() == INVOCATION and field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32]
    assert len(reader.tensors) == 16
    others = (
        varied(ALORA, "attn.o", name="other", invocation=[40, 41]),
        {"method": "lora", "target": {"role": "attn.o"}},
    )
    for other in others:
        both = adapted(compiled.compilation.source, ALORA, other)
        assert refused(both.export, tmp_path / "both.gguf", format="gguf").code == "GC066"
    assert not (tmp_path / "both.gguf").exists()


class Served:
    """A model in llama.cpp's server, within this process."""

    def __init__(self, base: Path, adapter: Path) -> None:
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(base)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 256, 1, False, 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server = xllamacpp.Server(params)

    def first(self, prompt: Sequence[int], *, scale: float = 1.0) -> tuple[int, float]:
        """Return the most likely token after a prompt and the logarithm of its probability."""
        asked = {"prompt": list(prompt), "max_tokens": 1, "temperature": 0, "logprobs": 1, "cache_prompt": False}
        answer = self._server.handle_completions({**asked, "lora": [{"id": 0, "scale": scale}]})
        (token,) = answer["choices"][0]["logprobs"]["content"]
        return int(token["id"]), float(token["logprob"])


@pytest.fixture(scope="module")
def served(folder: Path, compiled: Any) -> Iterator[Served]:
    pytest.importorskip("xllamacpp")
    compiled.export(folder / "adapter.gguf", format="gguf")
    unchanged = graftc.compile(
        {"adapt": [{"method": "lora", "target": {"role": "attn.q"}}]}, compiled.compilation.source
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", GraftWarning)
        unchanged.eval().merge(allow_unchanged=True).export(folder / "base.gguf", format="gguf")
    yield Served(folder / "base.gguf", folder / "adapter.gguf")


def ours(model: Any, prompt: Sequence[int], **more: Any) -> tuple[int, float]:
    """Return the same of our model."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([list(prompt)]), **more).logits[0, -1].log_softmax(-1)
    return int(logits.argmax()), float(logits.max())


def is_near(first: tuple[int, float], second: tuple[int, float]) -> bool:
    return first[0] == second[0] and abs(first[1] - second[1]) < 0.01


@pytest.mark.full
def test_in_llama_cpps_server(served: Served, compiled: Any) -> None:
    """The server reads the key and adapts from the last invocation on, but begins one token too early.

    Its prompt processing stops one token before the invocation to switch the adapter on, so the token in front of it is
    adapted as well. Where nothing is in front of the invocation, or the adapter is off, it gives our results.
    """
    with compiled.disabled():
        assert is_near(served.first(PROMPT, scale=0.0), ours(compiled, PROMPT))
    assert is_near(served.first(PROMPT[START:]), ours(compiled, PROMPT[START:]))
    assert is_near(served.first(PROMPT[:START]), ours(compiled, PROMPT[:START]))  # not invoked
    for prompt in (PROMPT, [*PROMPT[:-1], *INVOCATION, 52]):
        (start,) = compiled_start(prompt)
        assert is_near(served.first(prompt), ours(compiled, prompt, alora_start=[start - 1]))
        assert not is_near(served.first(prompt), ours(compiled, prompt, alora_start=[0]))


def compiled_start(prompt: Sequence[int]) -> list[int]:
    """Return where the last invocation of a prompt begins."""
    return [max(at for at in range(len(prompt)) if list(prompt[at : at + len(INVOCATION)]) == INVOCATION)]


@pytest.mark.slow
def test_programs_that_would_adapt_every_token(compiled: Any, tmp_path: Path) -> None:
    """Servers that ignore the field are refused, and so are layouts without it."""
    for server in ("vllm", "sglang", "mistralrs"):
        error = refused(compiled.export, tmp_path / server, format="peft", server=server)
        assert error.code == "GC068" and not (tmp_path / server).exists()
    compiled.export(tmp_path / "peft", format="peft")
    error = refused(AdapterSource.of(tmp_path / "peft").read)
    assert error.code == "GC069" and "gguf" in str(error.hint)
