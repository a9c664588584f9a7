"""Components of torch's symbolic sizes: its own sympy functions, and the source of a symbol. None of them is public."""

from torch._dynamo.source import ConstantSource
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod

__all__ = ["ConstantSource", "FloorDiv", "Max", "Min", "Mod"]
