"""What torch's symbolic sizes are made of: its own functions of sympy, and where a symbol is from. None is public."""

from torch._dynamo.source import ConstantSource
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod

__all__ = ["ConstantSource", "FloorDiv", "Max", "Min", "Mod"]
