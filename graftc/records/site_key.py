"""The key of a site, which is the same in every Program of a Compilation."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, order=True)
class SiteKey:
    """The name of a site, which denotes the same place in every Program of a Compilation.

    Attributes:
        module: path of the owning module.
        name: parameter name or value role within it.
        part: the rows of a fused tensor, by the last word of their role; empty for the whole tensor.
        use: number of the use of the tensor, for layers that are used several times.
    """

    module: str
    name: str
    part: str = ""
    use: int = 0

    @property
    def place(self) -> SiteKey:
        """The key without its use, since all uses of a tensor share what is adapted there."""
        return replace(self, use=0)

    @property
    def whole(self) -> SiteKey:
        """The key of this use of the whole tensor."""
        return replace(self, part="")

    def __str__(self) -> str:
        text = f"{self.module}.{self.name}" if self.module else self.name
        text += f"[{self.part}]" if self.part else ""
        return f"{text}#{self.use}" if self.use else text
