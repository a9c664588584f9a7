"""Calls of texts that are longer than a table of positions are refused before a kernel reads beyond it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftc.compiler.compilation import Compilation
from graftc.compiler.positions import PositionTable, position_tables
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import ProgramKey
from graftc.passes.core.weights.store import Store
from graftc.runtime.model.blocks import Runner


class Positioned(Runner):
    """The part of a Runner that knows of tables of positions."""

    _active: Compilation

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._tables: dict[ProgramKey, tuple[PositionTable, ...]] = {}

    def install(self, key: ProgramKey, program: Program) -> None:
        """See `Runner.install`."""
        super().install(key, program)
        self._tables.pop(key, None)

    def tables(self, key: ProgramKey) -> tuple[PositionTable, ...]:
        """Where a Program reads at the positions of tokens; on the meta device there are no values that would tell."""
        if self._store.device().type == "meta":
            return ()
        found = self._tables.get(key)
        if found is None:
            program = self._programs[key] if key in self._programs else self._active.programs[key]
            found = self._tables[key] = position_tables(program, self._store)
        return found

    def require_positions(self, key: ProgramKey, present: Mapping[str, Any]) -> None:
        """Whether every token of a call has a position.

        Raises:
            GraftError: GC143.
        """
        for table in self.tables(key):
            table.require(present, self._store)
