"""The examples of ``docs/errors.md`` that come from calls: graftc prints each text in ``tests/docs/golden``.

GRAFTC_UPDATE_GOLDEN=1 writes them.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import DynamicCache

import graftc
from graftc.applications.chat.answering import answer, prompt_ids
from graftc.applications.chat.conversation import Conversation
from graftc.applications.chat.opening import open_text_model
from graftc.applications.pet.data import load_rows
from graftc.applications.pet.encoding import ClozeEncoder
from graftc.cli.schemas import published_schema
from graftc.records.applications.answers import Settings
from graftc.runtime.onnx_generation import load as load_graphs
from graftc.runtime.sources.models import load_model
from graftc.specs import registry
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.pet.io import load_pet_spec
from graftc.specs.pet.pattern import PatternSpec
from graftc.specs.pet.verbalizer import Verbalizer
from graftc.testing import perturb, tiny
from tests.applications.pet.small_tokenizers import tokenizer
from tests.cli.speakers import save_tokenizer
from tests.kit.models import fresh
from tests.kit.places import ROOT
from tests.kit.plugins import installing
from tests.runtime.onnx_generation import onnx_toy
from tests.runtime.sources.quantised.writers import FORMATS, gptq
from tests.runtime.sources.quantised.writers import llama as quantised_llama
from tests.runtime.sources.quantised.writers import write as write_quantised

GOLDEN = Path(__file__).parent / "golden"
LORA: dict[str, Any] = {"method": "lora", "target": {"role": ["attn.q", "attn.v"]}}


def a_missing_spec(patch: pytest.MonkeyPatch) -> None:
    Path("spec.yaml").touch()
    graftc.load_spec("sepc.yaml")


def a_gap_of_tokens(patch: pytest.MonkeyPatch) -> None:
    fresh("bert", LORA, tokens={"add": ["<ent>"], "first": 200})


def a_call_without_a_graph(patch: pytest.MonkeyPatch) -> None:
    fresh("llama", LORA)(input_ids=torch.ones(2, 7, dtype=torch.int64), labels=torch.zeros(2, 3, 4))


def gates_behind_a_cache(patch: pytest.MonkeyPatch) -> None:
    spec = {"adapt": [{"method": "unipelt"}]}
    graftc.compile(spec, tiny("llama"))(input_ids=torch.ones(2, 7, dtype=torch.int64), use_cache=True)


def an_encoder_that_generates(patch: pytest.MonkeyPatch) -> None:
    fresh("bert", LORA).generate(torch.ones(2, 7, dtype=torch.int64))


def a_missing_model(patch: pytest.MonkeyPatch) -> None:
    (Path("models") / "bert").mkdir(parents=True)
    (Path("models") / "bert" / "config.json").touch()
    load_model("models/bret/")


def another_dtype(patch: pytest.MonkeyPatch) -> None:
    fresh("bert", LORA).to(torch.bfloat16)


class Shallow(nn.Module):
    """A model without repeated layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.tanh(self.inner(x)))
        return out


def no_layers(patch: pytest.MonkeyPatch) -> None:
    spec = {"adapt": [{"method": "lora", "target": {"modules": "inner"}, "rank": 2}], "checkpoint": "layers"}
    graftc.compile(spec, Shallow(), (torch.ones(2, 6),))


def no_values(patch: pytest.MonkeyPatch) -> None:
    graftc.compile({"adapt": [LORA]}, tiny("bert").to("meta")).merge()


def no_budget(patch: pytest.MonkeyPatch) -> None:
    model = fresh("bert", LORA)
    perturb(model)
    model.merge(budget=0)


def other_tensors(patch: pytest.MonkeyPatch) -> None:
    tensors = fresh("bert", LORA).adapter_state_dict()
    first = min(tensors)
    fresh("bert", LORA).load_adapter_state_dict({**tensors, first: tensors[first][:2]})


def training_a_merged_model(patch: pytest.MonkeyPatch) -> None:
    fresh("bert", LORA).merge(allow_unchanged=True).train()


def a_merge_into_packed_weights(patch: pytest.MonkeyPatch) -> None:
    fresh("bert", LORA, base={"quantize": "nf4"}).merge()


def a_folder_of_packed_weights(patch: pytest.MonkeyPatch) -> None:
    model = fresh("bert", LORA, base={"quantize": "int8"})
    perturb(model)
    model.merge(base="requantized").save("merged")


def nothing_to_merge(patch: pytest.MonkeyPatch) -> None:
    fresh("bert", LORA).merge()


def an_unknown_format(patch: pytest.MonkeyPatch) -> None:
    fresh("bert", LORA).export("model.gguf", format="tensorrt")  # type: ignore[arg-type]


def no_onnx_runtime(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "onnxruntime", None)
    fresh("bert", LORA).export("model.onnx")


def a_taken_path(patch: pytest.MonkeyPatch) -> None:
    Path("model.onnx").touch()
    fresh("bert", LORA).export("model.onnx")


def a_tag_that_is_taken(patch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "examples/plugin/graftc_scale/spec.py").read_text(encoding="utf-8")
    Path("my_lora").mkdir()
    Path("my_lora/__init__.py").touch()
    Path("my_lora/spec.py").write_text(text.replace('"scale"', '"lora"'), encoding="utf-8")
    plug_in(patch, "my_lora")


def a_broken_plugin(patch: pytest.MonkeyPatch) -> None:
    plug_in(patch, "graftc_mine")


def plug_in(patch: pytest.MonkeyPatch, package: str) -> None:
    patch.syspath_prepend(Path.cwd())
    patch.setattr(registry, "entry_points", lambda group: [EntryPoint("mine", package, group)])
    registry.reload_methods()
    registry.method_specs()


def a_pass_without_its_place(patch: pytest.MonkeyPatch) -> None:
    Path("site").mkdir()
    source = 'AddedPass(Pass("macs", print, rewrites=False), after="insrt")'
    with installing(Path("site")) as install:
        install("graftc-macs", f"from graftc.extend import AddedPass, Pass\nCOUNT = {source}\n", macs="COUNT")
        fresh("bert", LORA)


def a_missing_exporter(patch: pytest.MonkeyPatch) -> None:
    Path("site").mkdir()
    with installing(Path("site")) as install:
        install("graftc-shapes", "", group="graftc.exporters", shapes="SHAPES")
        fresh("bert", LORA).export("shapes.txt", "shapes")


def saved() -> Path:
    return fresh("bert", LORA).save("artifact", base="models/tiny", certify=False)


def no_artifact(patch: pytest.MonkeyPatch) -> None:
    Path("empty").mkdir()
    graftc.load("empty")


def a_newer_format(patch: pytest.MonkeyPatch) -> None:
    manifest = saved() / "manifest.json"
    data = json.loads(manifest.read_text(encoding="utf-8"))
    manifest.write_text(json.dumps({**data, "schema_version": data["schema_version"] + 1}), encoding="utf-8")
    graftc.load("artifact")


def a_file_cut_short(patch: pytest.MonkeyPatch) -> None:
    file = saved() / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    graftc.load("artifact")


def a_file_that_is_gone(patch: pytest.MonkeyPatch) -> None:
    (saved() / "adapters.safetensors").unlink()
    graftc.load("artifact")


def a_file_that_is_not_listed(patch: pytest.MonkeyPatch) -> None:
    (saved() / "model.pkl").touch()
    graftc.load("artifact")


def a_base_that_was_moved(patch: pytest.MonkeyPatch) -> None:
    model: Any = tiny("bert")
    model.save_pretrained("tiny-bert")
    graftc.compile({"adapt": [LORA]}, model).save("artifact", base="tiny-bert", certify=False)
    Path("tiny-bert").rename("elsewhere")
    graftc.load("artifact")


def another_base(patch: pytest.MonkeyPatch) -> None:
    saved()
    model: Any = tiny("bert")
    with torch.no_grad():
        model.classifier.bias += 1
    graftc.load("artifact", model)


def an_unknown_schema(patch: pytest.MonkeyPatch) -> None:
    published_schema("chekc")


def an_unknown_name(patch: pytest.MonkeyPatch) -> None:
    fresh("bert", LORA).explain("bert.encoder.layer.0.attention.self.querry")


def rows_that_no_target_means(patch: pytest.MonkeyPatch) -> None:
    every = graftc.select(tiny("gpt2"))
    (every.role("attn.q").layers(0) | every.role("attn.k").layers(1)).to_target()


def a_folder_that_is_a_file(patch: pytest.MonkeyPatch) -> None:
    Path("runs").touch()
    fresh("bert", LORA).save("runs/first", certify=False)


def an_input_that_has_folded(patch: pytest.MonkeyPatch) -> None:
    fresh("bert", LORA).merge(allow_unchanged=True).export("model.onnx", inputs=["lora"])


def an_adapter_for_no_graph(patch: pytest.MonkeyPatch) -> None:
    Path("model.onnx").touch()
    fresh("bert", LORA).export("lora.onnx_adapter", "onnx-adapter", graph="model.onnx")


def a_method_of_peft(patch: pytest.MonkeyPatch) -> None:
    getattr(fresh("bert", LORA), "merge_and_unload")()  # noqa: B009


def a_name_for_a_model(patch: pytest.MonkeyPatch) -> None:
    graftc.compile({"adapt": [LORA]}, "org/model")  # type: ignore[arg-type]


def pickling(patch: pytest.MonkeyPatch) -> None:
    torch.save(fresh("bert", LORA), "model.pt")


def adapter(**fields: Any) -> None:
    """Write a folder in PEFT's format, for two layers of BERT."""
    Path("adapter").mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["query"], **fields}
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    path = "base_model.model.bert.encoder.layer.{}.attention.self.query.lora_{}.weight"
    shapes = {"A": (2, 48), "B": (48, 2)}
    tensors = {path.format(i, part): torch.ones(shape) for i in range(2) for part, shape in shapes.items()}
    save_file(tensors, "adapter/adapter_model.safetensors")


def pickled_weights(patch: pytest.MonkeyPatch) -> None:
    adapter()
    Path("adapter/adapter_model.safetensors").rename("adapter/adapter_model.bin")
    graftc.import_peft("adapter", tiny("bert"))


def a_config_with_an_unknown_field(patch: pytest.MonkeyPatch) -> None:
    adapter(rank_patern={"query": 4})
    graftc.import_peft("adapter", tiny("bert"))


def a_type_that_is_not_here(patch: pytest.MonkeyPatch) -> None:
    adapter(peft_type="POLY")
    graftc.import_peft("adapter", tiny("bert"))


def a_config_of_other_modules(patch: pytest.MonkeyPatch) -> None:
    adapter(target_modules=["query", "value"])
    graftc.import_peft("adapter", tiny("bert"))


def an_adapter_of_a_larger_model(patch: pytest.MonkeyPatch) -> None:
    adapter()
    graftc.import_peft("adapter", tiny("bert", hidden_size=64))


def several_adaptations(patch: pytest.MonkeyPatch) -> None:
    graftc.compile({"adapt": [LORA, {"method": "ia3"}]}, tiny("bert")).export("adapter", format="peft")


@contextmanager
def a_process_group() -> Iterator[torch.distributed.DeviceMesh]:
    """Create a group of one process, as each of several processes would, while the block runs."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def a_model_that_is_sharded_already(patch: pytest.MonkeyPatch) -> None:
    with a_process_group() as mesh:
        graftc.compile({"adapt": [LORA]}, fully_shard(tiny("bert"), mesh=mesh))


def a_process_that_writes_alone(patch: pytest.MonkeyPatch) -> None:
    model = fresh("bert", LORA)
    with a_process_group() as mesh:
        fully_shard(model, mesh=mesh)
        store = torch.distributed.distributed_c10d._get_default_store()
        patch.setattr("graftc.runtime.model.sharded.ranks_of", lambda tensor: (0, 1))
        store.set_timeout(timedelta(seconds=0.1))
        model.save("artifact")


def a_toy(**config: Any) -> Any:
    return load_graphs(onnx_toy.write(Path("onnx"), **config), threads=1)


def a_graph_without_a_cache(patch: pytest.MonkeyPatch) -> None:
    load_graphs(onnx_toy.write(Path("onnx"), onnx_toy.model(cached=False)))


def a_cache_of_another_model(patch: pytest.MonkeyPatch) -> None:
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    a_toy()(input_ids=torch.ones(1, 1, dtype=torch.int64), cache=cache)


def what_the_graph_does_not_give(patch: pytest.MonkeyPatch) -> None:
    a_toy()(input_ids=torch.ones(1, 4, dtype=torch.int64), output_attentions=True)


def more_tokens_than_positions(patch: pytest.MonkeyPatch) -> None:
    a_toy().generate(torch.ones(1, 20, dtype=torch.int64), max_new_tokens=20, eos_token_id=None)


def a_model_without_a_tokenizer(patch: pytest.MonkeyPatch) -> None:
    tiny("llama").save_pretrained("model")
    open_text_model(Path("model"))


def logits_while_training(patch: pytest.MonkeyPatch) -> None:
    ids = torch.ones(2, 7, dtype=torch.int64)
    call = {"input_ids": ids, "labels": ids}
    spec = {"adapt": [LORA], "memory": {"loss": "chunked"}}
    graftc.compile(spec, tiny("llama"), call).train()(**call).logits  # noqa: B018


def a_budget_without_a_unit(patch: pytest.MonkeyPatch) -> None:
    graftc.plan({"adapt": [LORA]}, tiny("bert"), sequence=16, budget="24 Gigs")


def a_budget_for_nothing(patch: pytest.MonkeyPatch) -> None:
    graftc.plan({"adapt": [LORA]}, tiny("bert"), batch=8, sequence=16, budget="300kB")


def second_derivatives_of_a_chunked_loss(patch: pytest.MonkeyPatch) -> None:
    ids = torch.ones(2, 7, dtype=torch.int64)
    call = {"input_ids": ids, "labels": ids}
    compiled = graftc.compile({"adapt": [LORA], "memory": {"loss": "chunked"}}, tiny("llama"), call).train()
    own = [p for p in compiled.parameters() if p.requires_grad]
    torch.autograd.grad(compiled(**call).loss, own, create_graph=True)


def a_base_with_nothing_to_quantise(patch: pytest.MonkeyPatch) -> None:
    graftc.compile({"adapt": [LORA], "base": {"quantize": "nf4", "skip": ["model.layers.*"]}}, tiny("llama"))


def loftq_without_a_quantised_base(patch: pytest.MonkeyPatch) -> None:
    graftc.compile({"adapt": [{**LORA, "init": "loftq"}]}, tiny("llama"))


def a_model_that_is_not_for_chat(patch: pytest.MonkeyPatch) -> None:
    tiny("llama").save_pretrained("model")
    save_tokenizer(Path("model"), template=None)
    Conversation(open_text_model(Path("model")), Settings())


def sampling_at_a_temperature_of_zero(patch: pytest.MonkeyPatch) -> None:
    tiny("llama").save_pretrained("model")
    save_tokenizer(Path("model"))
    Path("model/generation_config.json").write_text('{"do_sample": true, "temperature": 0.0}')
    model = open_text_model(Path("model"))
    answer(model, prompt_ids(model, "w1 w2"), Settings())


def a_format_that_is_not_read(patch: pytest.MonkeyPatch) -> None:
    write_quantised(Path("model"), quantised_llama(), gptq(4), {"quant_method": "aqlm"})
    graftc.load_base("model")


def a_module_of_another_library(patch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    linear = type("TorchQuantLinear", (nn.Linear,), {"__module__": "gptqmodel.nn_modules.qlinear.torch"})
    model.lm_head.__class__ = linear  # type: ignore[assignment]
    graftc.compile({"adapt": [LORA]}, model)


def scales_that_are_missing(patch: pytest.MonkeyPatch) -> None:
    dtype, writer, options = FORMATS["awq"]
    write_quantised(
        Path("model"), quantised_llama(dtype), lambda weight: (_without_scales(writer(weight)[0]), weight), options
    )
    graftc.load_base("model")


def _without_scales(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in stored.items() if name != "scales"}


def a_pattern_without_a_blank(patch: pytest.MonkeyPatch) -> None:
    text = 'patterns: ["{text} It was {blnk}."]\nverbalizer: {good: great, bad: terrible}\n'
    Path("pet.yaml").write_text(text, encoding="utf-8")
    load_pet_spec("pet.yaml")


def labels_with_the_same_words(patch: pytest.MonkeyPatch) -> None:
    load_pet_spec({"patterns": ["{text} It was {blank}."], "verbalizer": {"good": "great", "better": "great"}})


def a_bank_of_whole_models(patch: pytest.MonkeyPatch) -> None:
    data = {"patterns": ["{text} It was {blank}."], "verbalizer": {"good": "great", "bad": "terrible"}}
    load_pet_spec({**data, "members": "bank"})


def cloze(kind: str, text: str, **words: str) -> None:
    ClozeEncoder([PatternSpec(name="pattern-1", text=text)], [Verbalizer(words)], tokenizer(kind))


def a_word_of_several_tokens(patch: pytest.MonkeyPatch) -> None:
    cloze("wordpiece", "{text} It was {blank}.", good="great", bad="terribly")


def a_pattern_that_goes_on_behind_its_blank(patch: pytest.MonkeyPatch) -> None:
    cloze("gpt2", "{text} It was {blank}.", good="great", bad="terrible")


def a_label_that_is_not_there(patch: pytest.MonkeyPatch) -> None:
    Path("train.jsonl").write_text('{"text": "Great film", "label": "god"}\n', encoding="utf-8")
    load_rows("train.jsonl", ["good", "bad"], ["text"])


CASES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "GC006": a_missing_spec,
    "GC018": a_gap_of_tokens,
    "GC031": a_call_without_a_graph,
    "GC032": a_missing_model,
    "GC033": another_dtype,
    "GC034": no_layers,
    "GC050": no_values,
    "GC051": no_budget,
    "GC053": other_tensors,
    "GC054": training_a_merged_model,
    "GC060": an_unknown_format,
    "GC061": no_onnx_runtime,
    "GC063": a_taken_path,
    "GC064": a_folder_that_is_a_file,
    "GC065": an_input_that_has_folded,
    "GC192": an_adapter_for_no_graph,
    "GC070": a_tag_that_is_taken,
    "GC071": a_broken_plugin,
    "GC072": a_method_of_peft,
    "GC073": a_name_for_a_model,
    "GC074": pickling,
    "GC077": a_pass_without_its_place,
    "GC078": a_missing_exporter,
    "GC080": no_artifact,
    "GC081": a_newer_format,
    "GC082": a_file_cut_short,
    "GC083": a_file_that_is_gone,
    "GC085": a_file_that_is_not_listed,
    "GC086": a_base_that_was_moved,
    "GC087": another_base,
    "GC090": an_unknown_schema,
    "GC091": an_unknown_name,
    "GC093": rows_that_no_target_means,
    "GC104": nothing_to_merge,
    "GC110": pickled_weights,
    "GC111": a_config_with_an_unknown_field,
    "GC112": a_type_that_is_not_here,
    "GC113": a_config_of_other_modules,
    "GC114": an_adapter_of_a_larger_model,
    "GC115": several_adaptations,
    "GC130": a_model_that_is_sharded_already,
    "GC131": a_process_that_writes_alone,
    "GC144": a_graph_without_a_cache,
    "GC140": a_cache_of_another_model,
    "GC145": what_the_graph_does_not_give,
    "GC141": gates_behind_a_cache,
    "GC142": an_encoder_that_generates,
    "GC143": more_tokens_than_positions,
    "GC146": a_model_without_a_tokenizer,
    "GC147": a_model_that_is_not_for_chat,
    "GC148": sampling_at_a_temperature_of_zero,
    "GC150": logits_while_training,
    "GC152": second_derivatives_of_a_chunked_loss,
    "GC160": a_base_with_nothing_to_quantise,
    "GC167": loftq_without_a_quantised_base,
    "GC161": a_format_that_is_not_read,
    "GC162": a_module_of_another_library,
    "GC163": scales_that_are_missing,
    "GC165": a_merge_into_packed_weights,
    "GC166": a_folder_of_packed_weights,
    "GC175": a_pattern_without_a_blank,
    "GC176": labels_with_the_same_words,
    "GC177": a_bank_of_whole_models,
    "GC178": a_word_of_several_tokens,
    "GC179": a_pattern_that_goes_on_behind_its_blank,
    "GC180": a_label_that_is_not_there,
    "GC154": a_budget_without_a_unit,
    "GC155": a_budget_for_nothing,
}


@pytest.mark.slow
@pytest.mark.sample("GC054", "GC082", "GC114", "GC150", "GC179")
@pytest.mark.parametrize("code", CASES)
def test_the_example_is_what_graftc_says(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        try:
            with pytest.raises(GraftError) as caught:
                CASES[code](patch)
        finally:
            patch.undo()
            registry.reload_methods()
    assert caught.value.code == code
    text = re.sub(r"\d\.\d+e[-+]\d+", "#.#e-##", f"{caught.value}\n").replace(f"{tmp_path}/", "")
    path = GOLDEN / f"{code}.txt"
    if os.environ.get("GRAFTC_UPDATE_GOLDEN") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_golden_text_has_its_case() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == CASES.keys()
