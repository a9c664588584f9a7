"""Reading and writing of peft's checkpoints by the tables that methods have beside their specs (`graftc.specs.peft`).

Neither peft nor anything that a file names is imported for this. `importing` compiles what the files contain.
"""

from graftc.runtime.interop.peft.folder import read_peft

__all__ = ["read_peft"]
