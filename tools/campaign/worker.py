"""The code of the processes that run seeds: a server that has imported everything, and one fork of it per seed.

Importing this module is slow on purpose: the server does it once, and every fork starts from there.
"""

from __future__ import annotations

import importlib
import os
from multiprocessing.connection import Connection

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRAFTC_CACHE"] = "off"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from tools.campaign.case import check, draw_case, findings
from tools.campaign.minimising import failures_of, minimised, script
from tools.forked import Record, finish
from tools.warm import warm_up

warm_up("graftc.runtime.serving.drivers")
for _name in ("onnxruntime", "onnxscript", "torch.onnx._internal.exporter._core", "tools.campaign.routes"):
    importlib.import_module(_name)
for _family in ("bert", "roberta", "gpt2", "gpt_neox", "llama", "mixtral", "t5", "vit"):
    importlib.import_module(f"transformers.models.{_family}.modeling_{_family}")


def work(sender: Connection, seed: int, only: str | None, minimising: float) -> None:
    """Run the case of a seed, reduce what fails, and send records.

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
    finish(sender, record)
