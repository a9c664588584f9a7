"""The code of the processes that examine: a server that has imported everything, and one fork of it per entry.

Importing this module is slow on purpose: the server does it once, and every fork starts from there.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import resource
from multiprocessing.connection import Connection

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRAFTC_CACHE"] = "off"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import transformers

import graftc
from tools.coverage import examine
from tools.coverage.catalogue import Entry

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]

# All modules are imported at once, so that a run examines one state of the sources even if they are edited meanwhile.
for _found in pkgutil.walk_packages(graftc.__path__, "graftc."):
    if not _found.name.startswith(("graftc.__main__", "graftc.testing", "graftc.runtime.export")):
        importlib.import_module(_found.name)


def _warm() -> None:
    """Import the modules that torch and transformers only import at the first capture."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    inputs = {"input": torch.ones(2, 4)}
    graftc.roles(model, inputs, cache=False)
    importlib.import_module("transformers.exporters.exporter_dynamo")


_warm()


def work(sender: Connection, entry: Entry, memory: int, seconds: int) -> None:
    """Examine an entry under limits and send its record.

    Args:
        sender: the connection that the record is sent to.
        entry: the entry to examine.
        memory: the bytes of data that the process may allocate.
        seconds: the CPU time that it may take.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    record = examine.examine(entry, progress=sender.send)
    record["_megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    sender.send(record | {"_done": True})
    sender.close()
