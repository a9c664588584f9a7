"""Import it to let transformers' ``Auto`` classes load what ``compiled.save_pretrained`` wrote.

In the process that compiled the model this is not needed.
"""

from __future__ import annotations

from graftc.runtime.loading import auto_classes

__all__ = ["auto_classes"]
