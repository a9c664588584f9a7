"""Detect changes to a source model after it was compiled."""

from __future__ import annotations

from torch import nn

from graftc.compiler.capture.identity.capture_key import digests_of_holdings
from graftc.specs.errors.diagnostics import warn


class SourceWatch:
    """Watches a source model, and warns once if it has changed.

    Args:
        source: the model as it is now.
    """

    def __init__(self, source: nn.Module) -> None:
        self._source = source
        self._before = digests_of_holdings(source)

    def look(self) -> None:
        """Warn, once, if the model has changed, since graphs that are created from now on reflect its present state."""
        if self._before is None:
            return
        before, now = self._before, digests_of_holdings(self._source)
        changed = [name for name in {**before, **(now or {})} if now is None or now.get(name) != before.get(name)]
        if not changed:
            return
        where = changed[0].removeprefix("the module").strip()
        message = f"{type(self._source).__name__} has changed since it was compiled"
        message += f" ({where})" if where and now is not None else ""
        message += ": graphs created from now on reflect the change, but earlier ones do not"
        warn("GC048", message, hint="compile it again")
        self._before = None
