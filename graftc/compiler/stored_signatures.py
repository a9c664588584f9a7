"""Compile the signatures of an artifact when calls need them, so that loading reads only the first one's graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftc.compiler.capture.isolation import exclusive
from graftc.compiler.capture.past import has_encoder
from graftc.compiler.capture.signature import inputs_of
from graftc.compiler.compilation import Compilation


def compile_stored(compilation: Compilation, inputs: Mapping[str, Any] | None = None) -> None:
    """Compile the stored signatures that a call may have, or all of them, in the artifact's order.

    Args:
        compilation: the Compilation to which they are added.
        inputs: the tensors and flags of a call, by name; by default, every stored signature is compiled.

    Raises:
        GraftError: as for `graftc.load`, for a signature that differs from what the artifact states. It is not added,
            so that the next call with it is refused as well.
    """
    if not compilation.table.stored:
        return
    with exclusive():
        stored = compilation.table.stored
        wanted = list(stored)
        if inputs is not None:
            key = inputs_of({name: value for name, value in inputs.items() if name not in compilation.controls})
            wanted = [each for each in stored if each.inputs == key]
            if wanted and has_encoder(compilation.model):  # a decoder's graph is checked beside its encoder's
                wanted = stored[: stored.index(wanted[-1]) + 1]
        if wanted:
            compilation.watch.look()
        for each in wanted:
            before = list(compilation.signatures)
            try:
                each.compile(compilation)
            except BaseException:
                for signature in [own for own in compilation.signatures if own not in before]:
                    compilation.table.remove(signature)
                raise
            stored.remove(each)
