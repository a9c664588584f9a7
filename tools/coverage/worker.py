"""The code of the processes that examine: a server that has imported everything, and one fork of it per entry.

Importing this module is slow on purpose: the server does it once, and every fork starts from there.
"""

from __future__ import annotations

import os
import resource
from multiprocessing.connection import Connection

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRAFTC_CACHE"] = "off"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from tools.coverage import examine
from tools.coverage.catalogue import Entry
from tools.forked import confine, finish
from tools.warm import warm_up

warm_up("graftc.testing", "graftc.runtime.export")


def work(sender: Connection, entry: Entry, memory: int, seconds: int) -> None:
    """Examine an entry under limits and send its record.

    Args:
        sender: the connection that the record is sent to.
        entry: the entry to examine.
        memory: the bytes of data that the process may allocate.
        seconds: the CPU time that it may take.
    """
    confine(memory, seconds)
    record = examine.examine(entry, progress=sender.send)
    record["_megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    finish(sender, record)
