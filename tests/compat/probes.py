"""All probes."""

from tests.compat import (
    probes_of_libraries,
    probes_of_modules,
    probes_of_operators,
    probes_of_tensors,
    probes_of_tracing,
)
from tests.compat.table import PROBES

FILES = (probes_of_libraries, probes_of_modules, probes_of_operators, probes_of_tensors, probes_of_tracing)
"""The files that have filled the table."""

__all__ = ["FILES", "PROBES"]
