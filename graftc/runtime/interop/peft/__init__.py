"""Checkpoints of peft, read and written by the tables that methods have beside their specs (`graftc.specs.peft`).

peft itself is never imported, and nothing that a file names is. `importing` compiles what is in them.
"""

from graftc.runtime.interop.peft.folder import read_peft

__all__ = ["read_peft"]
