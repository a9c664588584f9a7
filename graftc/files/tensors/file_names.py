"""Names that identify the contents of a folder or of a file of tensors."""

from __future__ import annotations

MANIFEST, MANIFEST_BYTES = "manifest.json", 2**26
"""The file that says what an artifact holds, and the bytes that it may have."""
STATE_RECORD = "_extra_state"
"""The record in a compiled model's state dict: that of a module's extra state, to which torch gives this name."""
