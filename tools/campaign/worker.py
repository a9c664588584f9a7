"""The code of the processes that run seeds: a server that has imported everything, and one fork of it per seed.

Importing this module is slow on purpose: the server does it once, and every fork starts from there.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from multiprocessing.connection import Connection

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRAFTC_CACHE"] = "off"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import transformers

import graftc
from tools.campaign.case import Record, check, draw_case, findings
from tools.campaign.minimising import failures_of, minimised, script

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]

# All modules are imported at once, so that a run tests one state of the sources even if they are edited meanwhile.
for _found in pkgutil.walk_packages(graftc.__path__, "graftc."):
    if not _found.name.startswith(("graftc.__main__", "graftc.runtime.serving.drivers")):
        importlib.import_module(_found.name)
for _name in ("onnxruntime", "onnxscript", "torch.onnx._internal.exporter._core", "tools.campaign.routes"):
    importlib.import_module(_name)
for _family in ("bert", "roberta", "gpt2", "gpt_neox", "llama", "mixtral", "t5", "vit"):
    importlib.import_module(f"transformers.models.{_family}.modeling_{_family}")


def _warm() -> None:
    """Import the modules that torch and transformers only import at the first capture."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    graftc.roles(model, {"input": torch.ones(2, 4)}, cache=False)
    importlib.import_module("transformers.exporters.exporter_dynamo")


_warm()


def work(sender: Connection, seed: int, only: str | None, minimising: float) -> None:
    """Run the case of a seed, reduce what fails, and send records; the last has ``done``.

    Args:
        sender: the connection to send to.
        seed: the seed.
        only: the one route to take.
        minimising: seconds for reducing each failure, at most two of a seed.
    """
    case = draw_case(seed, only)
    facts: Record = {"methods": [e["method"] for e in case.spec["adapt"]], "routes": list(case.routes)}
    record = check(case, lambda partial: sender.send({**partial, **facts}))
    record |= facts | {"findings": findings(record)}
    sender.send(record)
    if record["findings"]:
        record["case"] = case.to_json()
        for failure in sorted(failures_of(record))[: 2 if minimising else 0]:
            smallest = minimised(case, failure, seconds=minimising / 2)
            record.setdefault("scripts", {})[failure[0]] = script(smallest)
            sender.send(record)
    sender.send({**record, "done": True})
    sender.close()
