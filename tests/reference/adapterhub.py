"""Make ``tests/data/adapterhub_<arch>.safetensors`` with AdapterHub's ``adapters``: outputs to compare graftc with.

``adapters`` pins an older transformers than graftc needs, so this script runs once in a separate environment outside
the checkout, and the tests only read its files. From the root of the repository, with Python 3.11::

    python3.11 -m venv /tmp/adapterhub
    /tmp/adapterhub/bin/pip install torch==2.13.0 adapters==1.3.0 transformers==4.57.6 safetensors==0.8.0 numpy==2.4.6
    /tmp/adapterhub/bin/python tests/reference/adapterhub.py

A file holds one tiny model with random weights and many adaptations of it, each with random tensors:

* ``base/NAME``: the model's state dict; ``inputs/input_ids``, ``inputs/attention_mask``: one batch, padded right;
* ``CASE/adapter/NAME``: the tensors of a case under the names of ``adapters``; an adapter is called a, b or c;
* ``CASE/last_hidden_state``, ``CASE/logits``: the model's outputs in eval mode;
* ``unadapted/last_hidden_state``, ``unadapted/logits``: its outputs without an adapter.

Its metadata has one key, ``about``, whose JSON contains ``model`` (class, and the arguments of its config), ``cases``
(for each name the adapters' config, the composition, the fusion's config) and ``versions``.

What ``adapters`` 1.3.0 computes
--------------------------------
Names, in one block: ``x`` is the block's input; ``a`` and ``g`` are the results of the attention's output projection
and of the feed-forward layer's second projection, both after dropout and before any residual; ``h`` is the residual of
the feed-forward layer: ``LN1(x + a)`` in BERT and RoBERTa, ``x + a`` before ``ln_2`` in GPT-2. LN1 and LN2 are
``attention.output.LayerNorm`` and ``output.LayerNorm``. ``D`` and ``U`` are linear layers with biases
(``adapter_down.0``, ``adapter_up``), ``s`` is the scaling (1 by default) and ``up(v) = s * U(act(D(v)))``. Dropout
of the adapter (0 here) follows ``s``, before gate and residual.

Post-norm (BERT, RoBERTa):

* ``double_seq_bn``: ``h = LN1(x + a + up1(a))``, ``y = LN2(h + g + up2(g))``. Both read values before any norm.
* ``seq_bn``: ``u = LN2(h + g)``, ``z = g + up(u)``, ``y = LN2(h + z)``. LN2 is applied twice with the same weights; the
  adapter's own residual is ``g`` (``residual_before_ln=True``), ``h + g`` for ``"post_add"``, ``u`` for ``False``.
* ``par_bn``: ``y = LN2(h + g + up(h))`` with ``s = 4``. It reads the residual ``h``, normalised by LN1.

Pre-norm (GPT-2): no norm is passed to the adapter, and ``ln_1``, ``ln_2``, ``ln_f`` stay where they are.

* ``double_seq_bn``: ``h = x + a + up1(a)``, ``y = h + g + up2(g)``.
* ``seq_bn``: ``u = h + g`` (the stream, not normalised), ``y = h + g + up(u)``.
* ``par_bn``: ``y = h + g + up(h)``: it reads the stream before ``ln_2``, unlike the feed-forward layer.

Options: ``ln_before`` puts a new norm in front of ``D``, which reads ``u`` (then ``adapter_down.0`` is the norm and
``adapter_down.1`` is ``D``); ``ln_after`` puts one after it (``adapter_norm_after``): ``z = g + LN(up(u))``, or
``LN(up(u) + g)`` with ``adapter_residual_before_ln``. Learned scaling is a tensor ``scaling`` of shape [1], or [width]
for ``"channel"``.

Gate (``use_gating``): one number for each row of the batch, ``gate = mean_t sigmoid(w . v_t + b)``, where ``v`` is the
adapter's input (``u`` for seq_bn, ``h`` for par_bn) and the mean is over all positions, including padding.

* Bottleneck: ``z = g + gate * up(u)``; par_bn ``y = LN2(h + g + gate * up(h))``.
* LoRA on q and v: ``W v + c + gate * (v A^T B^T)``, ``v = x``. The gate replaces alpha / r; q and v have their
  own gates.
* Prefix: one gate for keys and values (``shared_gating``), of ``v = x``, times the layer's prefix keys and values. A
  flat prefix is one vector, to be viewed as [position, layer, key or value, head, head width]; its positions come
  first and are never masked.

Compositions of seq_bn adapters. ``residual_before_ln`` and similar options are those of each adapter in a stack, of
the last adapter in a fusion, and of the first in the others; ``original_ln_after`` is the last adapter's. GPT-2 has no
``LN2`` here.

* ``Stack(a, b)``: ``z1 = g + up_a(LN2(h + g))``, ``z2 = z1 + up_b(LN2(h + z1))``, ``y = LN2(h + z2)``.
* ``Fuse(a, b, c)``: ``u`` as above; ``o_i = up_i(u)`` without residual, gate or dropout; at each position
  ``p = softmax_i((Q u + q) . (K o_i + k))``, ``z = g + sum_i p_i V o_i``, ``y = LN2(h + z)``. Scores are not divided by
  the root of the width. Q and K have biases; V has none and starts as the identity plus 1e-6 off the diagonal; a static
  fusion has no V. ``query_before_ln`` uses ``g`` as the query instead of ``u``; ``residual_before`` adds ``g`` to
  each ``o_i`` instead of to the sum. ``temperature`` divides the scores by T, which starts at 50 and falls by 0.05
  at each call down to 1, in eval mode as well; without it T is 1. In training the scores, not the probabilities, pass a
  dropout with the fusion's ``dropout_prob`` or else the model's ``attention_probs_dropout_prob``, and a dynamic fusion
  (``regularization``) adds ``0.01 * sum (V - I)^2`` to the loss. ``train_adapter_fusion`` trains Q, K and V only.
* ``Average``: ``z = 1/n * sum_i w_i (g + up_i(u))``, with w normalised to the sum 1. It is a mean over the n adapters
  of values that are weighted already: with equal weights ``z``, and the ``g`` in it, is n times smaller than the
  average. Whether or not that is intended, the file contains it.
* ``Split``: adapter i on its own range of positions; ``BatchSplit``: on its own range of rows.

Initial values (not in the files): projections N(0, 0.02) with zero biases; par_bn has Kaiming-uniform (a = sqrt 5) down
and zero up; gates N(0, 0.02), with zero bias in bottlenecks and torch's own bias in LoRA and prefixes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import adapters
import torch
from adapters import (
    AdapterConfig,
    ConfigUnion,
    DoubleSeqBnConfig,
    LoRAConfig,
    ParBnConfig,
    PrefixTuningConfig,
    SeqBnConfig,
)
from adapters.composition import AdapterCompositionBlock, Average, BatchSplit, Fuse, Split, Stack
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

DATA = Path(__file__).parent.parent / "data"
LENGTHS = (7, 5, 4)
"""The lengths of the batch's rows, without padding."""
SPLITS = [4, 3]
ROWS = [1, 2]
WEIGHTS = [0.5, 0.3, 0.2]


@dataclass(frozen=True)
class Model:
    """A tiny model: the class, its config's class and arguments."""

    model: type[PreTrainedModel]
    config: type[Any]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One adaptation.

    Attributes:
        config: the config of each adapter.
        setup: the composition of the adapters.
        fusion: the name of the fusion's config, if the composition is a fusion.
    """

    config: AdapterConfig
    setup: AdapterCompositionBlock = field(default_factory=lambda: Stack("a"))
    fusion: str | None = None


ENCODER = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 20,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "num_labels": 2,
}
MODELS = {
    "bert": Model(BertForSequenceClassification, BertConfig, {**ENCODER, "type_vocab_size": 2, "pad_token_id": 0}),
    "roberta": Model(
        RobertaForSequenceClassification, RobertaConfig, {**ENCODER, "type_vocab_size": 1, "pad_token_id": 1}
    ),
    "gpt2": Model(
        GPT2ForSequenceClassification,
        GPT2Config,
        {
            "vocab_size": 97,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_inner": 64,
            "n_positions": 20,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "num_labels": 2,
            "pad_token_id": 0,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
}

# The widths of bottlenecks differ from all other dimensions: 32 // 6, 32 // 5 and 32 // 3.
DOUBLE = DoubleSeqBnConfig(reduction_factor=6)
SEQ = SeqBnConfig(reduction_factor=5)
PAR = ParBnConfig(reduction_factor=3)
LORA = LoRAConfig(r=3, alpha=6, use_gating=True)
PREFIX = PrefixTuningConfig(flat=True, prefix_length=3, use_gating=True)

WIRINGS = {"double_seq_bn": Case(DOUBLE), "seq_bn": Case(SEQ), "par_bn": Case(PAR)}
STACK = {"stack": Case(SEQ, Stack("a", "b"))}
FUSE = {"fuse": Case(SEQ, Fuse("a", "b", "c"), "dynamic")}
GATED = {"seq_bn_gated": Case(SEQ.replace(use_gating=True))}
CASES = {
    "bert": {
        **WIRINGS,
        "double_seq_bn_relu": Case(DOUBLE.replace(non_linearity="relu")),
        "seq_bn_post_add": Case(SEQ.replace(residual_before_ln="post_add")),
        "seq_bn_after_ln": Case(SEQ.replace(residual_before_ln=False)),
        "seq_bn_own_norms": Case(SEQ.replace(ln_before=True, ln_after=True)),
        "par_bn_learned": Case(PAR.replace(scaling="learned")),
        **STACK,
        **FUSE,
        "fuse_static": Case(SEQ, Fuse("a", "b"), "static"),
        "average": Case(SEQ, Average("a", "b", "c", weights=WEIGHTS)),
        "split": Case(SEQ, Split("a", "b", splits=SPLITS)),
        "batch_split": Case(SEQ, BatchSplit("a", "b", batch_sizes=ROWS)),
        **GATED,
        "par_bn_gated": Case(PAR.replace(use_gating=True)),
        "lora_gated": Case(LORA),
        "prefix_gated": Case(PREFIX),
        "unipelt": Case(ConfigUnion(PREFIX, SEQ.replace(use_gating=True), LORA)),
    },
    "roberta": {**WIRINGS, **GATED},
    "gpt2": {**WIRINGS, **STACK, **FUSE, **GATED},
}


def base(arch: str) -> PreTrainedModel:
    """Return the model, with values that show everywhere: nothing is 0 or 1, including norms and biases."""
    spec = MODELS[arch]
    model = spec.model(spec.config(**spec.arguments, attn_implementation="eager")).eval()
    noise = torch.Generator().manual_seed(sorted(MODELS).index(arch))
    norms = {id(module.weight) for module in model.modules() if isinstance(module, nn.LayerNorm)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3 if parameter.ndim == 1 else 0.2, generator=noise)
            if id(parameter) in norms:
                parameter.add_(1.0)
    return model


def inputs(arch: str) -> dict[str, Tensor]:
    """Return one batch in which only padding has the padding's id.

    From that id GPT-2 finds the last token, and RoBERTa the positions.
    """
    noise = torch.Generator().manual_seed(100)
    mask = torch.tensor([[1] * length + [0] * (LENGTHS[0] - length) for length in LENGTHS])
    ids = torch.randint(2, MODELS[arch].arguments["vocab_size"], mask.shape, generator=noise)
    return {
        "input_ids": torch.where(mask == 1, ids, MODELS[arch].arguments["pad_token_id"]),
        "attention_mask": mask,
    }


def adapt(model: PreTrainedModel, case: Case, seed: int) -> dict[str, Tensor]:
    """Adapt a model in place, move all new tensors away from their initial values, and return them.

    The tensors behind a fusion's scores move less, so that no adapter gets all of the attention.
    """
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    old = {id(parameter) for parameter in model.parameters()}
    adapters.init(model)
    for name in sorted(case.setup.flatten()):
        model.add_adapter(name, config=case.config)
    if case.fusion is not None:
        model.add_adapter_fusion(case.setup, case.fusion)
    model.set_active_adapters(case.setup)
    # A prefix also has a name in every layer; the model's own comes last.
    named = model.named_parameters(remove_duplicate=False)
    names = {id(parameter): name for name, parameter in named if id(parameter) not in old}
    new = {names[id(parameter)]: parameter for parameter in model.parameters() if id(parameter) in names}
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in new.items():
            scores = "adapter_fusion_layer" in name and ".value." not in name
            parameter.add_(torch.empty_like(parameter).normal_(std=0.1 if scores else 0.3, generator=noise))
    model.eval()
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    return {name: parameter.detach().clone() for name, parameter in new.items()}


def outputs(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the last hidden state and the logits."""
    with torch.no_grad():
        return {
            "last_hidden_state": model.base_model(**batch).last_hidden_state.clone(),
            "logits": model(**batch).logits.clone(),
        }


def tensors(arch: str) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a file, by name."""
    batch = inputs(arch)
    for name, tensor in batch.items():
        yield f"inputs/{name}", tensor
    plain = base(arch)
    for name, tensor in plain.state_dict().items():
        yield f"base/{name}", tensor.clone()
    expected = outputs(plain, batch)
    for name, tensor in expected.items():
        yield f"unadapted/{name}", tensor
    for seed, (name, case) in enumerate(CASES[arch].items()):
        model = base(arch)
        for part, tensor in adapt(model, case, seed).items():
            yield f"{name}/adapter/{part}", tensor
        for part, tensor in outputs(model, batch).items():
            assert (tensor - expected[part]).abs().max() > 0.05, (arch, name, part)
            yield f"{name}/{part}", tensor


def metadata(arch: str) -> dict[str, str]:
    """Return the metadata of a file, as JSON."""
    spec = MODELS[arch]
    cases = {
        name: {
            "config": case.config.to_dict(),
            "setup": case.setup.to_dict(),
            "fusion": None if case.fusion is None else adapters.ADAPTERFUSION_CONFIG_MAP[case.fusion].to_dict(),
        }
        for name, case in CASES[arch].items()
    }
    versions = {name: importlib.metadata.version(name) for name in ("adapters", "transformers", "torch")}
    model = {"class": spec.model.__name__, "config": spec.config.__name__, "arguments": spec.arguments}
    # One key only: safetensors writes several in random order.
    return {"about": json.dumps({"model": model, "cases": cases, "versions": versions})}


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description="Write tests/data/adapterhub_<arch>.safetensors.")
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write to")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    # The library warns that no adapter is active just before it activates one.
    logging.getLogger("adapters").setLevel(logging.ERROR)
    for arch in MODELS:
        torch.manual_seed(0)
        path = out / f"adapterhub_{arch}.safetensors"
        save_file(dict(tensors(arch)), path, metadata(arch))
        print(f"{path}: {path.stat().st_size:,} bytes, {len(CASES[arch])} cases")


if __name__ == "__main__":
    main()
