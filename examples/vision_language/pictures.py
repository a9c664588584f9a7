"""Generated pictures of two coloured shapes side by side, with captions, questions and answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 64
"""The number of pixels along each side of a picture."""

COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.7, 0.2),
    "blue": (0.1, 0.2, 0.9),
    "yellow": (0.9, 0.85, 0.1),
    "white": (1.0, 1.0, 1.0),
    "purple": (0.55, 0.1, 0.65),
}
SHAPES = ("circle", "square", "triangle", "cross")


@dataclass(frozen=True)
class Thing:
    """A shape and its colour, as indices into `SHAPES` and `COLOURS`."""

    shape: int
    colour: int

    def __str__(self) -> str:
        return f"{list(COLOURS)[self.colour]} {SHAPES[self.shape]}"


@dataclass(frozen=True)
class Picture:
    """A picture: its left and right shapes, and its pixels, ``float32[3, 64, 64]``, from -1 to 1."""

    left: Thing
    right: Thing
    pixels: Tensor

    @property
    def caption(self) -> str:
        return f"a {self.left} and a {self.right}"

    @property
    def questions(self) -> list[tuple[str, str]]:
        """The questions and their answers."""
        left, right = str(self.left).split(), str(self.right).split()
        return [
            ("What is on the left?", f"a {self.left}"),
            ("What is on the right?", f"a {self.right}"),
            (f"What color is the {right[1]} on the right?", right[0]),
            (f"What shape is the {left[0]} one on the left?", left[1]),
        ]


def draw(count: int, seed: int) -> list[Picture]:
    """Draw ``count`` pictures; places and sizes of the shapes vary, and the pixels are noisy."""
    random = torch.Generator().manual_seed(seed)
    pictures = []
    for _ in range(count):
        shapes = torch.randint(len(SHAPES), (2,), generator=random).tolist()
        colours = torch.randint(len(COLOURS), (2,), generator=random).tolist()
        left, right = (Thing(shape, colour) for shape, colour in zip(shapes, colours, strict=True))
        pixels = torch.full((3, SIZE, SIZE), 0.15)
        for thing, centre in ((left, SIZE / 4), (right, 3 * SIZE / 4)):
            _draw(pixels, thing, centre, random)
        pixels = (pixels + 0.05 * torch.randn(pixels.shape, generator=random)).clamp(0, 1)
        pictures.append(Picture(left, right, 2 * pixels - 1))
    return pictures


def _draw(pixels: Tensor, thing: Thing, centre: float, random: torch.Generator) -> None:
    across, down, size = torch.rand(3, generator=random).tolist()
    radius = 9 + 4 * size
    x = torch.arange(SIZE)[None, :] - (centre + 4 * across - 2)
    y = torch.arange(SIZE)[:, None] - (SIZE / 2 + 16 * down - 8)
    match SHAPES[thing.shape]:
        case "circle":
            inside = x**2 + y**2 < radius**2
        case "square":
            inside = (x.abs() < 0.85 * radius) & (y.abs() < 0.85 * radius)
        case "triangle":
            inside = (y < 0.8 * radius) & (y > 2 * x.abs() - radius)
        case _:
            inside = ((x.abs() < radius / 3) | (y.abs() < radius / 3)) & (x.abs() < radius) & (y.abs() < radius)
    colour = torch.tensor(list(COLOURS.values())[thing.colour])
    pixels[:, inside] = colour[:, None]
