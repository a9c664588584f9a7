"""Published counts of trainable parameters, from configs alone on the meta device.

Rows are those of the table of published figures. The exact integers are derived from the architecture; the figure that
a paper prints (``shown``, with its unit) is checked as well if the two agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

import graftc
from tests.kit.depth import each_way, on_meta

ROBERTA_LARGE = (
    *("RobertaForSequenceClassification", "RobertaConfig"),
    {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
    },
)
BERT_BASE = ("BertForSequenceClassification", "BertConfig", {})
GPT2_MEDIUM = ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 1024, "n_layer": 24, "n_head": 16})
GPT2_LARGE = ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 1280, "n_layer": 36, "n_head": 20})
LLAMA_7B = ("LlamaForCausalLM", "LlamaConfig", {})
LLAMA_13B = (
    *("LlamaForCausalLM", "LlamaConfig"),
    {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
)
LLAMA3_8B = (
    *("LlamaForCausalLM", "LlamaConfig"),
    {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
)

QV = ["attn.q", "attn.v"]
UP_DOWN = {"role": ["ffn.up", "ffn.down"]}
FIVE = ["attn.q", "attn.k", "attn.v", "ffn.up", "ffn.down"]


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        number: the number of the row; a letter distinguishes variants of one row.
        model: the model's class, config class and config values.
        method, roles, rank: the adaptation.
        trainable: the exact count.
        shown: the published figure, in millions or as a percentage of base plus added; None if it cannot be derived.
    """

    number: str
    model: tuple[str, str, dict[str, Any]]
    method: str
    roles: list[str]
    rank: int
    trainable: int
    shown: str | None


ROWS = (
    Row("11", ROBERTA_LARGE, "lora", QV, 8, 786_432, "0.8M"),
    Row("17", BERT_BASE, "lora", QV, 8, 294_912, "0.3M"),
    Row("27", GPT2_MEDIUM, "lora", QV, 4, 393_216, None),  # published as 0.35M, which is 0.1 % of the model
    Row("32", GPT2_LARGE, "lora", QV, 4, 737_280, None),  # published as 0.77M, likewise
    Row("39", LLAMA_7B, "lora", FIVE, 32, 56_098_816, "0.83%"),
    Row("40", LLAMA_13B, "lora", FIVE, 32, 87_818_240, "0.67%"),
    Row("41", LLAMA_7B, "lora", FIVE, 32, 56_098_816, "0.83%"),  # LLaMA 2 has the shapes of LLaMA
    Row("42", LLAMA3_8B, "lora", FIVE, 32, 56_623_104, "0.70%"),
    Row("43", LLAMA_7B, "dora", FIVE, 32, 56_975_360, "0.84%"),
    Row("43b", LLAMA_7B, "dora", FIVE, 16, 28_925_952, "0.43%"),
    Row("44", LLAMA_13B, "dora", FIVE, 32, 89_190_400, "0.68%"),
    Row("44b", LLAMA_13B, "dora", FIVE, 16, 45_281_280, "0.35%"),
    Row("45", LLAMA3_8B, "dora", FIVE, 32, 57_409_536, "0.71%"),
    Row("46", LLAMA3_8B, "dora", FIVE, 16, 29_097_984, None),  # published as 0.35 %, which leaves magnitudes out
)


@pytest.mark.full
@each_way
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"row {row.number}")
def test_a_published_row(row: Row, count: Any) -> None:
    entry = {"method": row.method, "target": {"role": row.roles}, "rank": row.rank}
    report = count([entry], row.model)
    assert report.trainable_parameters == report.deployed_parameters == row.trainable
    if row.shown is not None and row.shown.endswith("%"):
        assert f"{report.percent:.2f}%" == row.shown
    elif row.shown is not None:
        assert f"{report.trainable_parameters / 1e6:.1f}M" == row.shown


MI = 2**20


@dataclass(frozen=True)
class Adapter:
    """One row of bottleneck adapters.

    Attributes:
        number: the number of the row; a letter distinguishes variants of one row.
        model: the model's class, config class and config values.
        entry: the adaptation.
        trainable: the exact count, including biases and norms of the adapter itself.
        weights: the part of the count that is the weights of the two projections.
        shown: the published figure, in millions or as a percentage of base plus added.
        unit: the size of a million; 2^20 for rows that show the weights alone.
    """

    number: str
    model: tuple[str, str, dict[str, Any]]
    entry: dict[str, Any]
    trainable: int
    weights: int
    shown: str
    unit: int = 10**6


def _a(method: str, bottleneck: int, **fields: Any) -> dict[str, Any]:
    return {"method": method, "bottleneck": bottleneck, **fields}


PARALLEL = _a("llm_adapters", 256, placement="parallel", target=UP_DOWN)
ADAPTERS = (
    Adapter("7", ROBERTA_LARGE, _a("pfeiffer", 64), 3_171_840, 3_145_728, "3.0M", MI),
    Adapter("8", ROBERTA_LARGE, _a("pfeiffer", 16), 811_392, 786_432, "0.8M"),
    Adapter("9", ROBERTA_LARGE, _a("houlsby", 64), 6_343_680, 6_291_456, "6.0M", MI),
    Adapter("10", ROBERTA_LARGE, _a("houlsby", 8), 835_968, 786_432, "0.8M"),
    Adapter("14", BERT_BASE, {"method": "pfeiffer", "reduction": 16}, 894_528, 884_736, "0.9M"),
    Adapter("14b", BERT_BASE, _a("houlsby", 24), 903_744, 884_736, "0.9M"),
    Adapter("22", GPT2_MEDIUM, _a("adapter_l", 6), 368_784, 294_912, "0.37M"),
    Adapter("23", GPT2_MEDIUM, _a("adapter_l", 224), 11_089_152, 11_010_048, "11.09M"),
    Adapter("31", GPT2_LARGE, _a("adapter_l", 8), 875_808, 737_280, "0.88M"),
    Adapter("31b", GPT2_LARGE, _a("adapter_l", 248), 23_002_848, 22_855_680, "23.00M"),
    Adapter("35", LLAMA_7B, _a("llm_adapters", 256), 67_108_864, 67_108_864, "0.99%"),
    Adapter("36", LLAMA_13B, _a("llm_adapters", 256), 104_857_600, 104_857_600, "0.80%"),
    Adapter("37", LLAMA_7B, PARALLEL, 247_463_936, 247_463_936, "3.54%"),
    Adapter("38", LLAMA_13B, PARALLEL, 387_973_120, 387_973_120, "2.89%"),
)


@pytest.mark.full
@each_way
@pytest.mark.parametrize("row", ADAPTERS, ids=lambda row: f"row {row.number}")
def test_a_published_row_of_adapters(row: Adapter, count: Any) -> None:
    """The trained parameters are the deployed ones; rows 7 and 9 show the weights alone, in units of 2^20."""
    report = count([row.entry], row.model)
    assert report.trainable_parameters == report.deployed_parameters == row.trainable
    bare = count([_weights_alone(row.entry)], row.model).trainable_parameters
    assert bare == row.weights
    if row.shown.endswith("%"):
        assert f"{report.percent:.2f}%" == row.shown
        return
    digits = len(row.shown.partition(".")[2]) - 1
    assert f"{(bare if row.unit == MI else row.trainable) / row.unit:.{digits}f}M" == row.shown


def _weights_alone(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the entry without biases and without a norm of its own."""
    if entry["method"] == "adapter_l":
        wired = {"method": "bottleneck", "reads": "output", "adds_to": "output"}
        return {**wired, "bottleneck": entry["bottleneck"], "bias": False}
    return {**entry, "bias": False}


@pytest.mark.full
@each_way
def test_houlsby_with_norms(count: Any) -> None:
    """The paper's own setting: adapters of 8 and every norm of BERT large, including that of the embeddings."""
    bert_large = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    report = count([_a("houlsby", 8, norms=True)], ("BertForSequenceClassification", "BertConfig", bert_large))
    assert report.trainable_parameters == 835_968 + (2 * 24 + 1) * 2 * 1024 == 835_968 + 100_352


@pytest.mark.parametrize(
    ("model", "size"),
    [(LLAMA_7B, 6_738_415_616), (LLAMA_13B, 13_015_864_320), (LLAMA3_8B, 8_030_261_248), (GPT2_LARGE, 774_030_080)],
    ids=["7B", "13B", "3-8B", "GPT-2 large"],
)
def test_bases_are_the_published_ones(model: tuple[str, str, dict[str, Any]], size: int) -> None:
    assert sum(p.numel() for p in on_meta(model).parameters()) == size


BERT_LARGE_CASED = (
    *("BertForSequenceClassification", "BertConfig"),
    {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "vocab_size": 28996,
    },
)
PREFIXES = (
    ("3", BERT_LARGE_CASED, {"method": "p_tuning_v2", "length": 20}, 983_040, 983_040),
    ("16", BERT_BASE, {"method": "prefix", "reparameterization": {"hidden": 512}}, 9_857_024, 184_320),
    ("18", BERT_BASE, {"method": "unipelt", "parts": ["adapter", "prefix"]}, 10_770_008, 1_097_304),
    ("19", BERT_BASE, {"method": "unipelt"}, 11_083_376, 1_410_672),
    ("34", LLAMA_13B, {"method": "prefix"}, 4_096_000, 4_096_000),
    ("34 with shared keys", LLAMA3_8B, {"method": "prefix"}, 655_360, 655_360),
)
"""Row, model, adaptation, what trains, and what is deployed: ``2 L p`` times the width of keys; for UniPELT the other
parts too, and ``12 * 769`` for each gate of a layer: 1,078,848 and 1,373,760 without gates."""


@pytest.mark.full
@each_way
@pytest.mark.parametrize(("number", "model", "entry", "trained", "deployed"), PREFIXES, ids=lambda v: str(v)[:22])
def test_a_published_prefix(
    number: str, model: Any, entry: dict[str, Any], trained: int, deployed: int, count: Any
) -> None:
    report = count([entry], model)
    assert (report.trainable_parameters, report.deployed_parameters) == (trained, deployed)


@pytest.mark.full
@pytest.mark.sample("3-1373760-two depths")
@pytest.mark.slow
@each_way
@pytest.mark.parametrize(("parts", "published"), [(2, 1_078_848), (3, 1_373_760)])
def test_the_parts_of_unipelt_without_gates(parts: int, published: int, count: Any) -> None:
    """Rows 18 and 19 as the paper counts them: its adapters, its prefix and its updates, each without a gate."""
    adapt = [
        {"method": "pfeiffer", "reduction": 16},
        {"method": "prefix", "reparameterization": {"hidden": 512}},
        {"method": "lora", "target": {"role": ["attn.q", "attn.v"]}, "rank": 8},
    ]
    assert count(adapt[:parts], BERT_BASE).deployed_parameters == published


T5_WIDTHS = {"small": (512, 51_200), "base": (768, 76_800), "large": (1024, 102_400), "XL": (2048, 204_800)}
T5_WIDTHS["XXL"] = (4096, 409_600)


@pytest.mark.full
@pytest.mark.parametrize("size", [pytest.param(s, marks=() if s == "small" else pytest.mark.full) for s in T5_WIDTHS])
def test_published_prompts_of_t5(size: str) -> None:
    """100 virtual tokens precede the encoder, whatever its depth; prompting both stacks takes twice the parameters."""
    width, published = T5_WIDTHS[size]
    config = {"d_model": width, "num_layers": 1, "num_heads": 8, "d_kv": 64, "d_ff": 2 * width, "vocab_size": 32128}
    model = on_meta(("T5ForConditionalGeneration", "T5Config", config))
    report = graftc.check({"adapt": [{"method": "prompt"}]}, model)
    assert (report.trainable_parameters, report.deployed_parameters) == (published, published)
    if size == "base":
        both = {"method": "prompt", "target": {"role": ["encoder.embed.token", "decoder.embed.token"]}}
        assert graftc.check({"adapt": [both]}, model).trainable_parameters == 2 * published


@pytest.mark.full
@each_way
def test_pre_embed_and_pre_layer_on_gpt2_medium(count: Any) -> None:
    """``d (l_p + l_i)`` parameters, or as many for each of ``L`` layers; keys and values of each layer are deployed."""
    slots = {"length": 10, "infix": 4}
    embed = count([{"method": "pre_embed", **slots}], GPT2_MEDIUM)
    layer = count([{"method": "pre_layer", **slots}], GPT2_MEDIUM)
    assert (embed.trainable_parameters, layer.trainable_parameters) == (14 * 1024, 24 * 14 * 1024)
    assert layer.deployed_parameters == layer.trainable_parameters
    front = count([{"method": "pre_layer", "length": 10}], GPT2_MEDIUM)
    assert (front.trainable_parameters, front.deployed_parameters) == (24 * 10 * 1024, 2 * 24 * 10 * 1024)


@pytest.mark.full
@each_way
@pytest.mark.parametrize(("slots", "trained", "shown"), [(2, 49_152, "0.0147%"), (3, 73_728, "0.0221%")])
def test_published_vectors_at_special_tokens(slots: int, trained: int, shown: str, count: Any) -> None:
    """Row 1: ``24 k 1024`` for single texts and for pairs, over BERT large without its head."""
    entry = {"method": "pasta", "special_tokens": [101, 102], "slots": slots}
    report = count([entry], BERT_LARGE_CASED)
    assert report.trainable_parameters == report.deployed_parameters == trained
    assert f"{100 * trained / 333_579_264:.4f}%" == shown


TRAINED = (
    ("2", BERT_LARGE_CASED, {"method": "bitfit"}, 272_384),
    ("15", BERT_BASE, {"method": "bitfit"}, 102_912),
    ("25", GPT2_MEDIUM, {"method": "last_layers", "count": 2}, 25_192_448),
    ("30", GPT2_LARGE, {"method": "full"}, 774_030_080),
)
"""Row, model, adaptation, and what trains."""


@pytest.mark.full
@each_way
@pytest.mark.parametrize(("number", "model", "entry", "trained"), TRAINED, ids=lambda v: str(v)[:22])
def test_published_subsets(number: str, model: Any, entry: dict[str, Any], trained: int, count: Any) -> None:
    """Biases, layers or everything; the authors' code also trains the norm behind the last layers (row 25)."""
    report = count([entry], model)
    assert (report.trainable_parameters, report.deployed_parameters) == (trained, trained)
    if number == "25":
        last = {"method": "norms", "target": {"modules": "transformer.ln_f"}}
        assert count([entry, last], model).trainable_parameters == 25_194_496


@pytest.mark.full
@pytest.mark.parametrize("layers", [2, pytest.param(24, marks=pytest.mark.full)])
def test_diff_pruning_of_bert_large(layers: int) -> None:
    """Row 4: 0.5 % of the model without its head, ``floor(0.005 N)`` = 1,675,709, after either stage of training."""
    name, config, values = BERT_LARGE_CASED
    described = (name, config, {**values, "vocab_size": 30522, "num_hidden_layers": layers})
    model = on_meta(described)
    sizes = {n: p.numel() for n, p in model.named_parameters() if not n.startswith("classifier")}
    size = sum(sizes.values())
    layer = sum(number for n, number in sizes.items() if ".layer.0." in n)
    assert size + (24 - layers) * layer == 335_141_888 and 335_141_888 // 200 == 1_675_709
    first = graftc.check({"adapt": [{"method": "diff_pruning"}]}, model)
    assert (first.trainable_parameters, first.deployed_parameters) == (2 * size + len(sizes), size // 200)
    second = graftc.check({"adapt": [{"method": "diff_pruning", "stage": 2}]}, model)
    assert second.trainable_parameters == second.deployed_parameters == size // 200


@pytest.mark.full
@each_way
@pytest.mark.parametrize(("layers", "width", "published"), [(6, 512, 6_303_744), (12, 1024, 50_380_800)])
def test_cross_attention_of_published_sizes(layers: int, width: int, published: int, count: Any) -> None:
    """The cross-attention of a translation model has ``4 L (d^2 + d)`` parameters."""
    config = {"d_model": width, "encoder_layers": 1, "decoder_layers": layers, "vocab_size": 100}
    config |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_attention_heads": 8}
    described = ("BartForConditionalGeneration", "BartConfig", {**config, "encoder_attention_heads": 8})
    assert count([{"method": "cross_attention"}], described).trainable_parameters == published


@pytest.mark.full
@each_way
@pytest.mark.parametrize(
    ("model", "each", "rank", "shown"),
    [(LLAMA_7B, 2_498_560, 64, "2.37%"), (LLAMA_13B, 3_911_680, 64, "1.92%"), (LLAMA_7B, 2_498_560, 8, None)],
    ids=["7B", "13B", "7B at rank 8"],
)
def test_entries_as_many_as_parameters_of_a_rank(
    model: tuple[str, str, dict[str, Any]], each: int, rank: int, shown: str | None, count: Any
) -> None:
    """SpIEL on LLaMA trains as many entries as LoRA of a rank, `r (in + out)` over the seven maps of every layer.

    Each weight gets its share of them, rounded down. The published percentage is of the base.
    """
    base = on_meta(model)
    sizes = [p.shape for n, p in base.named_parameters() if n.endswith("_proj.weight")]
    assert len(sizes) == 7 * base.config.num_hidden_layers
    assert sum(sum(shape) for shape in sizes) == each
    total = sum(shape.numel() for shape in sizes)
    allocated = sum(rank * each * shape.numel() // total for shape in sizes)
    assert 0 <= rank * each - allocated < len(sizes)
    for variant in ("AG", "MA"):
        report = count([{"method": "spiel", "variant": variant, "equivalent_rank": rank}], model)
        assert report.trainable_parameters == report.deployed_parameters == allocated
    if shown is not None:
        assert f"{100 * rank * each / report.base_parameters:.2f}%" == shown
