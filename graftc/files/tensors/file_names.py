"""Names that identify the contents of a folder or of a tensor file."""

from __future__ import annotations

MANIFEST, MANIFEST_BYTES = "manifest.json", 2**26
"""The file that describes an artifact's contents, and its maximum size in bytes."""
STATE_RECORD = "_extra_state"
"""The key of the record in a compiled model's state dict, which is torch's name for a module's extra state."""
