"""One process of several over which a compiled model is sharded."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import graftc
from graftc.runtime.artifact import open_artifact
from graftc.testing.perturb import perturb
from tests.families import tiny

SPEC = {"adapt": [{"method": "lora", "rank": 4, "target": {"role": ["attn.q", "ffn.up"]}}]}
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert not hasattr(found[name], "full_tensor") and torch.equal(found[name], tensor), name


def main(rank: int, processes: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=processes)
    compiled = graftc.compile(SPEC, tiny("llama"))
    perturb(compiled, 0.05)
    compiled.eval()
    with torch.no_grad():
        logits = compiled(input_ids=IDS).logits
    adapters = {name: tensor.clone() for name, tensor in compiled.adapter_state_dict().items()}
    folded = {name: tensor.clone() for name, tensor in compiled.merge().folded_state_dict().items()}

    mesh = init_device_mesh("cpu", (processes,))
    for block in compiled.blocks.values():
        fully_shard(block, mesh=mesh)
    fully_shard(compiled, mesh=mesh)
    assert all(hasattr(parameter, "full_tensor") for parameter in compiled.parameters())
    with torch.no_grad():
        assert torch.equal(compiled(input_ids=IDS).logits, logits)
    same(compiled.adapter_state_dict(), adapters)
    merged = compiled.merge()
    assert merged.certificate.passed
    same(merged.folded_state_dict(), folded)
    doubled = {name: 2 * tensor for name, tensor in adapters.items()}
    compiled.load_adapter_state_dict(doubled)
    same(compiled.adapter_state_dict(), doubled)
    compiled.load_adapter_state_dict(adapters)
    compiled.save(folder / f"artifact-{rank}")
    if rank == 0:
        loaded = graftc.load(folder / "artifact-0", tiny("llama")).eval()
        same(loaded.adapter_state_dict(), adapters)
        records = open_artifact(folder / "artifact-0").manifest.adapters
        assert records and all(record.trainable for record in records.values())
    compiled.train()
    compiled(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in compiled.parameters() if p.requires_grad)
    dist.destroy_process_group()
    print("done")


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
