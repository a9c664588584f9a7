"""Jobs that several processes run together in tests of distributed training; `tests.runtime.processes` starts them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.families import tiny
from graftc.testing.perturbing import perturb
from tests.kit.comparing import gradients_of, same_tensors
from tests.kit.training import adamw

STEPS = 6
BATCH = 4
LENGTH = 6
MAPS = {"role": ["attn.q", "ffn.up"]}
SPECS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 4, "target": MAPS},
    "dora": {"method": "dora", "rank": 4, "target": MAPS},
    "adalora": {
        "method": "adalora",
        "rank": 4,
        "target_rank": 2,
        "warmup_steps": 1,
        "final_steps": 1,
        "interval": 1,
        "total_steps": STEPS,
        "target": MAPS,
    },
    "sora": {"method": "sora", "rank": 4, "threshold": 0.02, "l1": 0.1, "target": MAPS},
    "vera": {"method": "vera", "rank": 4, "target": MAPS},
    "spiel": {"method": "spiel", "variant": "MA", "density": 0.1, "interval": 3, "accumulation_steps": 1},
    "spiel-ag": {"method": "spiel", "density": 0.1, "interval": 3, "accumulation_steps": 1},
    "prefix": {"method": "prefix", "length": 3},
    "houlsby": {"method": "houlsby", "bottleneck": 5},
}
SPECS["overlay"] = SPECS["lora"]
SPECS["spiel"]["total_steps"] = SPECS["spiel-ag"]["total_steps"] = STEPS
SHARDED = ("lora", "overlay", "dora", "adalora", "sora", "vera", "prefix", "houlsby")
"""Those that train sharded."""


def base(name: str) -> nn.Module:
    """Return the model for an adaptation, without dropout, because each process would draw its own."""
    if name == "houlsby":
        return tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return tiny("llama")


def model_with(name: str) -> Any:
    """Compile a model with the adaptation of that name."""
    trained = ["model.norm", "model.layers.1.mlp.down_proj"] if name == "overlay" else []
    return graftc.compile({"adapt": [SPECS[name]], "train": trained}, base(name), seed=0)


def sharded(compiled: Any, processes: int, **options: Any) -> Any:
    """Shard the model, with a unit for each layer and one for the rest."""
    mesh = init_device_mesh("cpu", (processes,))
    for block in compiled.blocks.values():
        fully_shard(block, mesh=mesh, **options)
    fully_shard(compiled, mesh=mesh, **options)
    return compiled


def spread(compiled: Any, kind: str, processes: int) -> Any:
    """Return the module that the training loop calls: the model sharded, replicated or unchanged."""
    if kind == "fsdp":
        return sharded(compiled, processes)
    return DistributedDataParallel(compiled) if kind == "ddp" else compiled


def optimiser(name: str, compiled: Any) -> torch.optim.Optimizer:
    """Return the optimiser that an adaptation is trained with."""
    if name == "spiel":
        return graftc.optim.SM3(compiled, lr=1e-2)
    if name == "spiel-ag":
        return graftc.optim.AgedAdamW(compiled, lr=1e-2)
    return adamw(compiled, lr=1e-2)


def batches(rank: int, processes: int) -> Iterator[Tensor]:
    """Yield, for each step, this process's part of the common batch."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        yield torch.randint(3, 90, (BATCH, LENGTH), generator=generator).chunk(processes)[rank]


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """Compute a loss that is a mean over the rows of the batch."""
    if getattr(model, "module", model).config.model_type == "llama":
        return model(input_ids=ids, labels=ids).loss
    output = model(input_ids=ids)[0]
    return (output * torch.randn(output.shape[1:], generator=torch.Generator().manual_seed(1))).mean()


def step(model: Any, compiled: Any, by: torch.optim.Optimizer, ids: Tensor) -> float:
    """Do one optimiser step and return the loss."""
    loss = loss_of(model, ids)
    (loss + compiled.extra_loss()).backward()
    by.step()
    compiled.after_step()
    by.zero_grad()
    return loss.item()


def train(rank: int, processes: int, folder: Path, name: str, kind: str) -> None:
    """Train, and write the adapter tensors."""
    compiled = model_with(name)
    model = spread(compiled, kind, processes)
    compiled.train()
    by = optimiser(name, compiled)
    for ids in batches(rank, processes):
        step(model, compiled, by, ids)
    tensors = compiled.adapter_state_dict()
    if rank == 0:
        torch.save(tensors, folder / f"{name}-{kind}.pt")


@contextmanager
def coded(code: str, text: str = "") -> Iterator[None]:
    """Check that the block raises an error of this code, with this text in its message."""
    try:
        yield
    except GraftError as error:
        if error.code != code or text not in error.message:
            raise
    else:
        raise AssertionError(f"there is no {code}")


def training_refused(rank: int, processes: int, folder: Path, name: str, kind: str) -> None:
    """Check that training is an error in every process."""
    compiled = model_with(name)
    model = spread(compiled, kind, processes)
    compiled.train()
    with coded("GC130"):
        loss_of(model, next(batches(rank, processes)))


def artifacts(rank: int, processes: int, folder: Path, kind: str, formats: str) -> None:
    """Save, merge and export a model with given tensors, with the same calls in every process."""
    compiled = model_with("lora")
    perturb(compiled, 0.05)
    tensors = {name: tensor.clone() for name, tensor in compiled.adapter_state_dict().items()}
    compiled.load_adapter_state_dict({name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    compiled.eval()
    spread(compiled, kind, processes)
    ids = next(batches(0, 1))
    with torch.no_grad():
        before = compiled(input_ids=ids).logits
    # This follows a pass without gradients, and only the first process's values count.
    compiled.load_adapter_state_dict(tensors if rank == 0 else {n: torch.full_like(t, 7) for n, t in tensors.items()})
    with torch.no_grad():
        logits = compiled(input_ids=ids).logits
    assert not torch.equal(before, logits)
    loaded = compiled.adapter_state_dict()
    assert same_tensors(loaded, tensors)

    assert compiled.save(folder / "artifact") == folder / "artifact"
    merged = compiled.merge()
    streamed = {name: tensor.clone() for name, tensor in compiled.merged_state_dict()}
    partial = compiled.merge_partially()
    for format in formats.split(","):
        compiled.export(folder / format, format)
    if rank == 0:
        merged.save(folder / "merged")
        torch.save([logits, merged.folded_state_dict(), streamed, partial.merged.folded_state_dict()], folder / "made")
    else:
        torch.save([logits, merged.folded_state_dict(), streamed], folder / "other")


def alone(rank: int, processes: int, folder: Path) -> None:
    """Check that a collective operation is an error if one process does it alone."""
    compiled = sharded(model_with("lora"), processes)
    if rank == 0:
        with coded("GC131", "process 1"):
            compiled.save(folder / "artifact")
        assert not (folder / "artifact").exists()
        (folder / "over").touch()
    while not (folder / "over").exists():
        time.sleep(0.1)


def apart(rank: int, processes: int, folder: Path) -> None:
    """Check for errors if processes do different operations, and if the process that writes cannot."""
    compiled = sharded(model_with("lora"), processes)
    (folder / "taken").mkdir(exist_ok=True)
    with coded("GC131", f"process {1 - rank}"):
        compiled.merge() if rank else compiled.save(folder / "artifact")
    with coded("GC063"):
        compiled.save(folder / "taken")


def brief(rank: int, processes: int, folder: Path) -> None:
    """Train the whole batch in each process, then together over shards; check that both agree and that saving works."""
    whole = model_with("adalora")
    by = optimiser("adalora", whole.train())
    for ids in list(batches(0, 1))[:3]:
        step(whole, whole, by, ids)
    compiled = sharded(model_with("adalora"), processes)
    by = optimiser("adalora", compiled.train())
    for ids in list(batches(rank, processes))[:3]:
        step(compiled, compiled, by, ids)
    tensors, expected = compiled.adapter_state_dict(), whole.adapter_state_dict()
    torch.testing.assert_close(tensors, expected, rtol=0, atol=1e-5)
    assert any((tensor == 0).any() for name, tensor in tensors.items() if name.endswith(".kept"))
    compiled.load_adapter_state_dict(expected)
    for one, two in zip(compiled.merged_state_dict(), whole.merged_state_dict(), strict=True):
        assert one[0] == two[0] and torch.equal(one[1], two[1]), one[0]
    path = compiled.save(folder / "artifact", certify=False)
    loaded = graftc.load(path, base("adalora")).adapter_state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def parts(rank: int, processes: int, folder: Path) -> None:
    """Check that the base model, the head and the reference of a policy, each run by itself, agree over shards."""
    whole, compiled = model_with("overlay").train(), sharded(model_with("overlay"), processes).train()
    ids = next(batches(0, 1))
    results = []
    for model in (whole, compiled):
        hidden = model.base_model(input_ids=ids).last_hidden_state
        logits = hidden @ model.get_output_embeddings().weight.T
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        grads = gradients_of(model)
        with torch.no_grad():
            reference = model.reference()(input_ids=ids).logits
        results.append((logits.detach(), reference, grads))
    (one, base_one, grads_one), (two, base_two, grads_two) = results
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5)
    torch.testing.assert_close(base_two, base_one, rtol=0, atol=1e-5)
    assert grads_one.keys() == grads_two.keys() and grads_one
    for name, grad in grads_one.items():
        torch.testing.assert_close(grads_two[name].full_tensor(), grad, rtol=0, atol=1e-5)


def sixteen_bits(rank: int, processes: int, folder: Path) -> None:
    """Check that float32 factors over shards of a bfloat16 base train as in one process, with and without a policy."""
    spec = {"adapt": [SPECS["lora"]], "train": ["model.norm"]}
    ids = [(own, every) for own, every in zip(batches(rank, processes), batches(0, 1), strict=True)]
    results = []
    for policy in (None, MixedPrecisionPolicy(), MixedPrecisionPolicy(torch.bfloat16, torch.float32)):
        compiled = graftc.compile(spec, base("lora").to(torch.bfloat16), seed=0).train()
        if policy is not None:
            compiled = sharded(compiled, processes, mp_policy=policy).train()
        by = torch.optim.SGD([p for p in compiled.parameters() if p.requires_grad], lr=0.1)
        for own, every in ids:
            step(compiled, compiled, by, every if policy is None else own)
        tensors = compiled.adapter_state_dict()
        assert {t.dtype for t in tensors.values()} == {torch.float32}
        results.append(tensors)
    start = graftc.compile(spec, base("lora").to(torch.bfloat16), seed=0).adapter_state_dict()
    for tensors in results[1:]:
        for name, tensor in tensors.items():
            moved = (results[0][name] - start[name]).norm()
            assert moved > 0 and (tensor - results[0][name]).norm() <= 0.05 * moved, name  # activations are in 16 bits


def parallel_bases(rank: int, processes: int, folder: Path) -> None:
    """Check that a base spread by transformers is refused, and so is spreading a compiled model in the same way."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    if rank == 0:
        base("lora").save_pretrained(folder / "base")  # type: ignore[operator]
    torch.distributed.barrier()
    for config in (DistributedConfig(tp_size=processes, tp_plan="auto"), DistributedConfig(fsdp_size=processes)):
        model = AutoModelForCausalLM.from_pretrained(folder / "base", distributed_config=config)
        with coded("GC130"):
            graftc.compile({"adapt": [SPECS["lora"]]}, model, seed=0)
    with coded("GC130"):
        graftc.compile({"adapt": [SPECS["lora"]]}, DistributedDataParallel(base("lora")), seed=0)
    mesh = init_device_mesh("cpu", (processes,))
    with coded("GC130"):
        parallelize_module(model_with("lora"), mesh, {"model.layers.*.self_attn.q_proj": ColwiseParallel()})
    with coded("GC043"):  # what context parallelism of Accelerate does to a model
        from accelerate.big_modeling import _attach_context_parallel_hooks

        _attach_context_parallel_hooks(model_with("lora"))


def kept(rank: int, processes: int, folder: Path, name: str, kind: str) -> None:
    """Train, and write a distributed checkpoint halfway."""
    compiled, model, by = begun(name, kind, processes)
    for number, ids in enumerate(batches(rank, processes)):
        if number == STEPS // 2:
            model_state, optimiser_state = get_state_dict(model, by)
            dcp.save({"model": model_state, "optimiser": optimiser_state}, checkpoint_id=str(folder / "checkpoint"))
        step(model, compiled, by, ids)
    tensors = compiled.adapter_state_dict()
    if rank == 0:
        torch.save(tensors, folder / "whole.pt")


def resumed(rank: int, processes: int, folder: Path, name: str, kind: str) -> None:
    """Resume from that checkpoint, with the same or another number of processes."""
    compiled, model, by = begun(name, kind, processes)
    model_state, optimiser_state = get_state_dict(model, by)
    state = {"model": model_state, "optimiser": optimiser_state}
    dcp.load(state, checkpoint_id=str(folder / "checkpoint"))
    set_state_dict(model, by, model_state_dict=model_state, optim_state_dict=optimiser_state)
    for ids in list(batches(rank, processes))[STEPS // 2 :]:
        step(model, compiled, by, ids)
    tensors = compiled.adapter_state_dict()
    if rank == 0:
        torch.save(tensors, folder / f"resumed-{processes}.pt")


def begun(name: str, kind: str, processes: int) -> tuple[Any, Any, torch.optim.Optimizer]:
    """Return a compiled model in train mode, the module that the loop calls, and the optimiser."""
    compiled = model_with(name)
    model = spread(compiled, kind, processes)
    return compiled, model, optimiser(name, compiled.train())


def policies(rank: int, processes: int, folder: Path) -> None:
    """Check that training is the same, bit for bit, when offloaded to the host and when layers are recomputed.

    A base in bfloat16 trains in mixed precision.
    """
    options: list[dict[str, Any]] = [{}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}, {}]
    results = []
    for number, option in enumerate(options):
        compiled = sharded(model_with("overlay"), processes, **option)
        if number == 2:
            compiled.activation_checkpointing_enable()
        by = optimiser("overlay", compiled.train())
        for ids in batches(rank, processes):
            step(compiled, compiled, by, ids)
        results.append(compiled.adapter_state_dict())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    with coded("GC130", "computes in bfloat16"):
        loss_of(sharded(model_with("lora"), processes, mp_policy=policy), next(batches(rank, processes)))
    narrow = graftc.compile({"adapt": [SPECS["lora"]]}, tiny("llama", dtype=torch.bfloat16), seed=0)
    sharded(narrow, processes, mp_policy=policy)
    by = optimiser("lora", narrow.train())
    losses = [step(narrow, narrow, by, ids) for ids in [next(batches(rank, processes))] * 20]
    assert losses[-1] < losses[0]


def full_states(rank: int, processes: int, folder: Path) -> None:
    """Check that the state dict that torch gathers is that of one process."""
    whole, compiled = model_with("overlay"), sharded(model_with("overlay"), processes)
    perturb(whole, 0.05)
    compiled.load_adapter_state_dict(whole.adapter_state_dict())
    state = get_model_state_dict(compiled, options=StateDictOptions(full_state_dict=True))
    expected = whole.state_dict()
    assert same_tensors(state, expected)
    every = compiled.full_state_dict()
    assert all(torch.equal(every[name], tensor) for name, tensor in whole.full_state_dict().items())


def accelerated(rank: int, processes: int, folder: Path, kind: str) -> None:
    """Train with Accelerate, save its state, continue, and load the state again.

    On CPUs, Accelerate never chooses FSDP by itself.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    accelerator = Accelerator(cpu=True)
    if kind.startswith("fsdp"):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=kind == "fsdp-meta",
            activation_checkpointing=kind == "fsdp-recomputed",
            state_dict_type="SHARDED_STATE_DICT",
        )
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
    compiled = model_with("overlay").train()
    by = optimiser("overlay", compiled)
    if kind == "fsdp-meta":
        with coded("GC130", "sharded without its weights"):
            accelerator.prepare(compiled, by)
        return
    model, by = accelerator.prepare(compiled, by)
    compiled = accelerator.unwrap_model(model)
    for _ in range(2):
        for number, ids in enumerate(batches(rank, processes)):
            if number < STEPS // 2 and (folder / "state").exists():
                continue
            accelerator.backward(loss_of(model, ids))
            by.step()
            by.zero_grad()
            if number == STEPS // 2 - 1:
                accelerator.save_state(str(folder / "state"))
        tensors = compiled.adapter_state_dict()
        if rank == 0 and not (folder / f"overlay-{kind}.pt").exists():
            torch.save(tensors, folder / f"overlay-{kind}.pt")
        torch.distributed.barrier()
        first = torch.load(folder / f"overlay-{kind}.pt")
        assert all(torch.equal(tensors[name], tensor) for name, tensor in first.items())
        accelerator.load_state(str(folder / "state"))
    if kind.startswith("fsdp"):
        assert all(hasattr(parameter, "full_tensor") for parameter in compiled.parameters())
        compiled.save(folder / "artifact")


def trainer(rank: int, processes: int, folder: Path, name: str, stage: str) -> None:
    """Train with the transformers Trainer, which writes a checkpoint halfway, or resume from that checkpoint."""
    from transformers import Trainer, TrainingArguments

    compiled = model_with(name)
    rows = torch.cat(list(batches(0, 1)))
    examples = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        str(folder / f"run-{name}"),
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // processes,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        save_steps=STEPS // 2,
        report_to=[],
        disable_tqdm=True,
        max_grad_norm=0.0,
    )
    loop = Trainer(compiled, arguments, train_dataset=examples, callbacks=[compiled.callback()])
    loop.train(
        resume_from_checkpoint=str(folder / f"run-{name}" / f"checkpoint-{STEPS // 2}") if stage != "whole" else None
    )
    tensors = compiled.adapter_state_dict()
    if rank == 0:
        torch.save(tensors, folder / f"{name}-{stage}-{processes}.pt")


def documented(rank: int, processes: int, folder: Path, title: str) -> None:
    """Run an example of ``docs/distributed.md``, and load what it saves."""
    from tools.docs.blocks import blocks

    os.chdir(folder)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    (block,) = (block for block in blocks("distributed.md", "python") if block.title == title)
    scope: dict[str, Any] = {"__name__": title}
    exec(compile(block.text, str(block), "exec"), scope)
    model, initial = tiny("llama"), graftc.compile(scope["SPEC"], tiny("llama"), seed=0).adapter_state_dict()
    scope["train"](model, list(batches(rank, processes)))
    torch.distributed.barrier()
    trained = graftc.load("adapter", tiny("llama")).adapter_state_dict()
    assert trained.keys() == initial.keys()
    assert all(not torch.equal(trained[name], tensor) for name, tensor in initial.items())


def quantised(rank: int, processes: int, folder: Path) -> None:
    """Check that a quantised base over shards trains, saves and merges as in one process.

    Codes and scales are sharded, and the files and merged weights equal those of the whole model, bit for bit.
    """
    spec = {"adapt": [SPECS["lora"]], "base": {"quantize": "nf4", "double": True}}
    whole, compiled = (graftc.compile(spec, base("lora"), seed=0) for _ in range(2))
    sharded(compiled, processes)
    parts = {name: p for name, p in compiled.named_parameters() if p.dtype == torch.uint8}
    names = {part for name, own in compiled.compilation.store.packed.items() for part in own.names(name)}
    assert parts.keys() == names and not any(p.requires_grad for p in parts.values())
    for name, part in parts.items():
        assert torch.equal(part.full_tensor(), whole.get_parameter(name)), name
        assert name.endswith("_offset") or part.to_local().numel() <= part.numel() // processes + part[0].numel()
    for model, ids in ((whole, list(batches(0, 1))), (compiled, list(batches(rank, processes)))):
        by = torch.optim.SGD([p for p in model.train().parameters() if p.requires_grad], lr=0.1)
        for own in ids:
            step(model, model, by, own)
    tensors, expected = compiled.adapter_state_dict(), whole.adapter_state_dict()
    torch.testing.assert_close(tensors, expected, rtol=0, atol=1e-6)
    assert all(tensor.abs().max() > 1e-3 for name, tensor in expected.items() if name.endswith(".B"))
    compiled.load_adapter_state_dict(expected)
    for one, two in zip(compiled.merged_state_dict(), whole.merged_state_dict(), strict=True):
        assert one[0] == two[0] and torch.equal(one[1], two[1]), one[0]
    for form in ("full", "requantized"):
        one, two = (model.merge(base=form).folded_state_dict() for model in (compiled, whole))
        assert same_tensors(one, two)
    state = compiled.full_state_dict()
    assert names < state.keys() and all(torch.equal(state[name], whole.get_parameter(name)) for name in names)
    path = compiled.save(folder / "artifact")
    written = load_file(path / "adapters.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


def quantised_in_16_bits(rank: int, processes: int, folder: Path) -> None:
    """Check that a policy that casts parameters to bfloat16 leaves codes and scales unchanged."""
    spec = {"adapt": [SPECS["lora"]], "base": {"quantize": "int4", "group": 16}}
    whole = graftc.compile(spec, base("lora").to(torch.bfloat16), seed=0).eval()
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    compiled = sharded(
        graftc.compile(spec, base("lora").to(torch.bfloat16), seed=0), processes, mp_policy=policy
    ).eval()
    ids = next(batches(0, 1))
    seen: set[torch.dtype] = set()

    def look(module: nn.Module, args: Any) -> None:
        seen.update(p.dtype for name, p in module.named_parameters() if name.rpartition("_")[2] in ("codes", "scales"))

    block = next(iter(compiled.blocks.values()))
    block.register_forward_pre_hook(look)
    with torch.no_grad():
        assert torch.equal(compiled(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert seen == {torch.uint8}
