"""The engines as data: what each one reads, refuses and ignores.

A row states what an engine's source does in the version that it names. Where graftc runs an engine in its tests, the
row is confirmed by what the engine computes. Anything that an engine is not known to read as PEFT defines it is a
problem, so that a new field of PEFT is never passed on in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeAlias

from graftc.specs.errors.diagnostics import GraftError, alternatives

Form: TypeAlias = Literal["peft", "gguf-adapter", "model", "gguf-model", "onnx-generate"]
"""The form of a folder or file: a PEFT folder, a LoRA adapter in GGUF, a transformers model (merged, or never adapted),
a whole model in GGUF, or a folder with a graph and ``genai_config.json``."""

FORMS: Mapping[Form, str] = MappingProxyType(
    {
        "peft": "a PEFT folder",
        "gguf-adapter": "a GGUF adapter",
        "model": "a model folder",
        "gguf-model": "a GGUF model",
        "onnx-generate": "an ONNX folder for generation",
    }
)
"""The name of each form in messages."""

Treatment: TypeAlias = Literal["read", "refused", "ignored", "unverified"]
"""An engine's treatment of something: it reads it as PEFT defines it, raises an error, loads the rest without it, or
does something that nobody has compared with PEFT."""

Place: TypeAlias = Literal["embedding", "head", "experts"]
"""A place where only some engines take a LoRA. All linear maps in layers are read by every engine that reads LoRA."""


@dataclass(frozen=True)
class Fact:
    """An engine's treatment of a field of a config or of a LoRA at a place.

    Attributes:
        treatment: what it does.
        remedy: what to do about it; empty if it is read. ``{engine}`` and ``{layout}`` stand for the engine's own.
        only: the architectures for which this is read; for others, it is refused. Empty for all of them.
    """

    treatment: Treatment
    remedy: str = ""
    only: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One engine.

    Attributes:
        name: its name on the command line.
        title: its name in texts.
        version: the version, or the commit, whose source was read.
        read_on: the day on which it was read.
        source: the files that the statements were taken from.
        forms: the forms that it loads.
        layout: the layout of ``graftc convert`` that it reads; None if it reads no PEFT folder.
        option: the option that sets the largest rank; None if there is none.
        default_rank: the largest rank that it accepts without that option; None if the option is always needed.
        ranks: allowed values of that option; empty if there is no restriction.
        fields: what it does with fields of ``adapter_config.json``.
        saved: names of the heads that it accepts along with an adapter (``modules_to_save``).
        initialisers: values of ``init_lora_weights`` that it loads although they are for a changed base.
        rank_from: whether the rank in a scale is the config's, or the number of rows of ``A``.
        strays: what it does with a LoRA whose name is not a module of the base.
        lists: whether it refuses a regular expression in ``target_modules``.
        added_tokens: whether it refuses a folder whose ``added_tokens.json`` has tokens beyond the base's vocabulary.
        companions: by a module's last name, modules of the same parent without which it refuses a LoRA on it.
        by_target: whether it refuses a LoRA that ``target_modules`` does not select.
        places: what it does with a LoRA at a place.
        needs: fields that it needs at the top level of a model's ``config.json``.
        architectures: the architectures of GGUF models that it loads; empty if there is no restriction.
        file_types: the types of matrices in GGUF models that it reads correctly; empty if there is no restriction.
        unread: tensors of a GGUF model that it ignores.
    """

    name: str
    title: str
    version: str
    read_on: str
    source: str
    forms: tuple[Form, ...]
    layout: str | None = None
    option: str | None = None
    default_rank: int | None = None
    ranks: tuple[int, ...] = ()
    fields: Mapping[str, Fact] = field(default_factory=dict)
    saved: tuple[str, ...] = ()
    initialisers: tuple[str, ...] = ()
    rank_from: Literal["config", "tensor"] = "config"
    strays: Treatment = "ignored"
    lists: bool = False
    added_tokens: bool = False
    companions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    by_target: bool = False
    places: Mapping[Place, Fact] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    file_types: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def read(self) -> str:
        """The engine with the version that was read."""
        return f"{self.title} {self.version}"

    @property
    def refused(self) -> Mapping[str, Fact]:
        """The fields that have to be off, because the engine refuses or ignores them, or because nobody knows."""
        return {name: fact for name, fact in self.fields.items() if fact.treatment != "read"}

    def rank_for(self, rank: int) -> int | None:
        """Return the smallest allowed maximum rank that covers an adapter's rank; None if none does."""
        return rank if not self.ranks else min((r for r in self.ranks if r >= rank), default=None)

    def option_for(self, rank: int | None) -> str | None:
        """Return the option with which it has to be started for a maximum rank; None if it needs none."""
        if self.option is None or not rank or (self.default_rank is not None and rank <= self.default_rank):
            return None
        return f"{self.option} {rank}"


_CONVERT = "graftc convert turns it into a LoRA"
_MERGE = "merge it: graftc merge"
_UNIFORM = "graftc convert --to {layout} gives all maps one rank and one scale"
_PLAIN = "export the artifact for the server (--for {engine}), which writes the scale as alpha / rank"
_EXPERTS = "graftc convert --to {layout} lays out the experts as it reads them"
_SAVED = f"fold it into the base (graftc convert --into-base trained), or {_MERGE}"
_BIAS = f"fold the biases into the base, or {_MERGE}"

_REMEDIES: Mapping[str, str] = MappingProxyType(
    {
        "use_rslora": _PLAIN,
        "rank_pattern": _UNIFORM,
        "alpha_pattern": _UNIFORM,
        "use_dora": _CONVERT,
        "modules_to_save": _SAVED,
        "trainable_token_indices": _MERGE,
        "target_parameters": _EXPERTS,
        "layer_replication": _MERGE,
        "lora_bias": _MERGE,
        "bias": _BIAS,
        "alora_invocation_tokens": "serve it with graftc, or with llama.cpp: no conversion keeps it",
        "use_qalora": _CONVERT,
        "use_bdlora": _CONVERT,
        "kasa_config": _CONVERT,
        "monteclora_config": _CONVERT,
        "velora_config": _CONVERT,
        "arrow_config": _MERGE,
        "ensure_weight_tying": _MERGE,
    }
)
"""Fields of PEFT's LoRA config that change what an adapter computes, each with what to do if an engine lacks it."""


def _fields(default: Treatment, **others: Treatment) -> Mapping[str, Fact]:
    """Return a fact for every field that changes what an adapter computes."""
    facts = {name: others.get(name, default) for name in _REMEDIES}
    return MappingProxyType({n: Fact(t, "" if t == "read" else _REMEDIES[n]) for n, t in facts.items()})


_LLAMAS = frozenset({"LlamaForCausalLM", "LLaMAForCausalLM", "InternLM3ForCausalLM", "IQuestCoderForCausalLM"})
_READ = Fact("read")
_NO_TABLE = "leave it out of the adapter, or merge the model: graftc merge"

ENGINES: Mapping[str, Engine] = MappingProxyType(
    {
        engine.name: engine
        for engine in (
            Engine(
                name="vllm",
                title="vLLM",
                version="0.32",
                read_on="2026-12-01",
                source="vllm/lora: peft_helper.py, lora_model.py, utils.py, model_manager.py",
                forms=("peft", "model"),
                layout="vllm",
                option="--max-lora-rank",
                ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
                fields=_fields(
                    "refused",
                    use_rslora="read",
                    rank_pattern="read",
                    alpha_pattern="read",
                    target_parameters="unverified",
                    kasa_config="ignored",
                    monteclora_config="ignored",
                    velora_config="ignored",
                    arrow_config="ignored",
                    ensure_weight_tying="ignored",
                ),
                saved=("classifier", "score"),
                initialisers=("mica", "lora_ga"),
                places=MappingProxyType(
                    {
                        "embedding": Fact("read", _NO_TABLE, _LLAMAS),
                        "head": Fact("read", _NO_TABLE, _LLAMAS),
                        "experts": _READ,
                    }
                ),
            ),
            Engine(
                name="sglang",
                title="SGLang",
                version="0.5.23",
                read_on="2026-12-01",
                source="sglang/srt/lora: lora_config.py, lora.py, lora_manager.py, mem_pool.py, utils.py",
                forms=("peft", "model"),
                layout="sglang",
                option="--max-lora-rank",
                fields=_fields("ignored", use_dora="refused", target_parameters="unverified"),
                initialisers=("pissa", "olora", "corda", "loftq", "mica", "lora_ga"),
                lists=True,
                added_tokens=True,
                companions=MappingProxyType(
                    {
                        "q_proj": ("v_proj",),
                        "k_proj": ("q_proj", "v_proj"),
                        "v_proj": ("q_proj",),
                        "up_proj": ("gate_proj",),
                    }
                ),
                places=MappingProxyType({"embedding": _READ, "head": _READ, "experts": _READ}),
            ),
            Engine(
                name="mistralrs",
                title="mistral.rs",
                version="0.9.5",
                read_on="2026-12-01",
                source="mistralrs-quant/src/lora: mod.rs (01de6db), dynamic/loader.rs (05a9aea); the messages of 0.9.5",
                forms=("peft", "model"),
                layout="vllm",
                option="--lora-max-rank",
                default_rank=256,
                fields=_fields(
                    "refused",
                    use_rslora="read",
                    rank_pattern="read",
                    alpha_pattern="read",
                    velora_config="ignored",
                    kasa_config="ignored",
                    target_parameters="unverified",
                ),
                initialisers=("mica",),
                strays="refused",
                by_target=True,
                places=MappingProxyType(
                    {
                        "embedding": Fact("refused", _NO_TABLE),
                        "head": Fact("refused", _NO_TABLE),
                        "experts": Fact("unverified", _MERGE),
                    }
                ),
                needs=("rope_theta",),
            ),
            Engine(
                name="tensorrt-llm",
                title="TensorRT-LLM",
                version="007e181",
                read_on="2026-12-01",
                source="tensorrt_llm/lora_manager.py",
                forms=("peft", "model"),
                layout="vllm",
                option="lora_config.max_lora_rank",
                fields=_fields(
                    "ignored",
                    use_rslora="read",
                    rank_pattern="read",
                    use_dora="unverified",
                    target_parameters="refused",
                    bias="refused",
                    lora_bias="refused",
                ),
                initialisers=("pissa", "olora", "corda", "loftq", "mica", "lora_ga"),
                rank_from="tensor",
                places=MappingProxyType(
                    {
                        "embedding": Fact("ignored", _NO_TABLE),
                        "head": Fact("ignored", _NO_TABLE),
                        "experts": Fact("unverified", _MERGE),
                    }
                ),
            ),
            Engine(
                name="llama.cpp",
                title="llama.cpp",
                version="0650ea8",
                read_on="2026-12-01",
                source="src/llama-adapter.cpp",
                forms=("gguf-adapter", "gguf-model"),
                rank_from="tensor",
                strays="refused",
            ),
            Engine(
                name="genai",
                title="ONNX Runtime GenAI",
                version="0.18",
                read_on="2026-12-01",
                source="src/models/model_type.h, src/config.h",
                forms=("onnx-generate",),
            ),
            Engine(
                name="openvino",
                title="OpenVINO GenAI",
                version="2026.4",
                read_on="2026-12-01",
                source="src/cpp/src/gguf_utils: gguf.cpp (08c1314), gguf_modeling.cpp (0a7a0fa); src/cpp/src/lora",
                forms=("gguf-model",),
                architectures=("llama", "qwen2", "qwen3"),
                file_types=("F16",),
                unread=("rope_freqs.weight",),
            ),
        )
    }
)
"""All engines, by name."""

OF_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base unchanged; others are relative to a modified base, which no engine has."""

INERT = frozenset(
    {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "init_lora_weights"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config"),
        *("megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
        "runtime_config",
    }
)
"""Fields of PEFT's LoRA config that do not change what a saved adapter computes, or that are checked on their own."""


def engines_for(*forms: Form) -> tuple[str, ...]:
    """Return the names of the engines that load one of the given forms."""
    return tuple(name for name, engine in ENGINES.items() if set(forms) & set(engine.forms))


PEFT_ENGINES, GGUF_ENGINES = engines_for("peft"), engines_for("gguf-model")
"""The engines that load PEFT folders, and those that load models in GGUF."""


def engine_of(name: str, *forms: Form) -> Engine:
    """Return the engine with a given name.

    Args:
        name: the name.
        forms: the forms of which it has to load one; by default, any engine is returned.

    Raises:
        GraftError: GC068 for an unknown engine, or one that loads none of the forms.
    """
    engine = ENGINES.get(name)
    if engine is None:
        hint = alternatives(name, ENGINES, "engines")
        raise GraftError("GC068", f"the limits of a server {name!r} are not known", hint=hint)
    if forms and not set(forms) & set(engine.forms):
        hint = f"the engines that do are {', '.join(engines_for(*forms))}"
        raise GraftError("GC068", f"{name} does not load {FORMS[forms[0]]}", hint=hint)
    return engine
