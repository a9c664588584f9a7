"""The scripts of `make walk` as data: what they run, in which order, and the extras that they need."""

from __future__ import annotations

from dataclasses import dataclass

EXTRAS = ("demo", "train", "export")
"""The extras that every script may use."""

SMOLLM2 = """\
from graftc.applications.demo.decoder import find_decoder
from pathlib import Path

folder = Path("HuggingFaceTB")
folder.mkdir()
(folder / "SmolLM2-135M-Instruct").symlink_to(find_decoder())
"""
"""Python that puts SmolLM2 where transformers finds it by its name on the hub, without network."""


@dataclass(frozen=True)
class Page:
    """A page: the blocks marked with ``<!-- run -->``, or the first block of a language; or a notebook, all of it.

    Attributes:
        path: its path in the checkout.
        first: the language of the one block to run.
        needs: packages without which it is left out, if the environment is one of those that leave them out.
    """

    path: str
    first: str | None = None
    needs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True)
class Shell:
    """A line that a shell runs."""

    line: str

    def __str__(self) -> str:
        return self.line


@dataclass(frozen=True)
class Code:
    """Python that is run before a page, under a name."""

    name: str
    text: str

    def __str__(self) -> str:
        return self.name


Step = Page | Shell | Code


@dataclass(frozen=True)
class Script:
    """Steps that run one after the other in one folder, which is empty when they begin.

    Attributes:
        name: the name of its folder.
        steps: what it runs.
        extras: extras of graftc that it needs beside `EXTRAS`.
    """

    name: str
    steps: tuple[Step, ...]
    extras: tuple[str, ...] = ()


SCRIPTS = (
    Script("readme", (Code("SmolLM2 from its package", SMOLLM2), Page("README.md", first="python"))),
    Script("demo", (Shell("graftc demo --quick"),)),
    Script("demo-llm", (Shell("graftc demo --llm --quick"),)),
    Script("quickstart", (Page("docs/quickstart.md"),)),
    Script("merging", (Page("docs/merging.md"),)),
    Script(
        "tutorials",
        (
            Page("docs/tutorials/chat.md"),
            Page("docs/tutorials/merge.md"),
            Page("docs/tutorials/serve.md", needs=("onnxruntime-genai",)),
            Page("docs/tutorials/changed.md"),
        ),
        extras=("serve",),
    ),
    Script("method", (Page("docs/tutorials/method.md"),), extras=("dev",)),
    Script("encoder", (Page("docs/tutorials/encoder.md"),)),
    Script("notebook", (Page("examples/tour.ipynb"),)),
    Script("vision-language", (Page("docs/tutorials/vision-language.md"),)),
    Script("ten-adapters", (Page("docs/tutorials/ten-adapters.md"),)),
)
