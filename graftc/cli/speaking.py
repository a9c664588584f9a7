"""The parts that ``graftc generate`` and ``graftc chat`` share: options, the model, text on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TextIO, TypeAlias

import typer

from graftc.cli import completion
from graftc.records.applications.answers import Answer, Settings
from graftc.records.results import CommandResult
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import printable

if TYPE_CHECKING:
    from graftc.applications.chat.opening import TextModel


TextArgument: TypeAlias = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        help="An artifact, a merged model or any other folder of transformers, or with --model an adapter of PEFT's.",
        show_default=False,
        autocompletion=completion.artifacts,
    ),
]
TokenizerOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="NAME",
        help="A folder or hub id with the tokenizer. Default: DIR, or its base.",
        show_default=False,
        autocompletion=completion.models,
    ),
]
MaxNewTokens: TypeAlias = Annotated[
    int, typer.Option("--max-new-tokens", "-n", metavar="N", min=1, help="Tokens of an answer at most.")
]
SampleOption: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--sample/--greedy",
        help="Draw tokens, or always take the most likely one. Default: as the model says, or --sample where an "
        "option of drawing is given.",
        show_default=False,
    ),
]
Temperature: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--temperature", "-t", metavar="X", min=0, help="Above 1 unlikely tokens are drawn more often; 0: never."
    ),
]
TopK: TypeAlias = Annotated[
    int | None, typer.Option("--top-k", metavar="N", min=1, help="Draw from the N most likely tokens.")
]
TopP: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--top-p", metavar="X", min=0, max=1, help="Draw from the fewest tokens that have the probability X together."
    ),
]
NumBeams: TypeAlias = Annotated[
    int | None,
    typer.Option("--num-beams", metavar="N", min=1, help="Beams of a beam search; with several nothing is streamed."),
]
SeedOption: TypeAlias = Annotated[
    int | None, typer.Option("--seed", metavar="N", min=0, help="Seed of what is drawn, for each answer.")
]
AdapterOption: TypeAlias = Annotated[
    str | None, typer.Option("--adapter", metavar="NAME", help="The adaptation of a bank that answers.")
]
BaseAlone: TypeAlias = Annotated[bool, typer.Option("--base", help="Let the base answer, without adaptations.")]
SystemOption: TypeAlias = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="What the system says before a chat.")
]
DeviceOption: TypeAlias = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="Where the model runs, such as cuda. Default: the CPU.")
]
NoCache: TypeAlias = Annotated[
    bool, typer.Option("--no-cache", help="Compute the whole text for every token: slow, but any adaptation can.")
]


@dataclass(frozen=True, kw_only=True)
class SpokenResult(
    Settings, CommandResult, behind={"": ("path", "kind", "adapter", "base"), "use_cache": ("warnings",)}
):
    """Who answered, and how. What is null of drawing tokens is as the model's `generation_config` says."""

    path: str
    """The DIR argument."""

    kind: Literal["artifact", "model", "onnx", "peft"]
    """What it holds: an artifact, a whole model, or an adapter of PEFT's."""

    adapter: str | None
    """The `--adapter` option."""

    base: bool
    """Whether the base answered, without adaptations."""


class Drawing(NamedTuple):
    """The options for choosing tokens, as `graftc.records.applications.answers.Settings` describes them."""

    sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None


def settings(max_new_tokens: int, drawing: Drawing, num_beams: int | None, no_cache: bool) -> dict[str, Any]:
    """Return the fields of Settings that the options determine, before anything is loaded.

    Raises:
        GraftError: GC090 for options that contradict each other.
    """
    sample, temperature, top_k, top_p, seed = drawing
    options = {"--temperature": temperature or None, "--top-k": top_k, "--top-p": top_p}
    given = next((name for name, value in options.items() if value is not None), None)
    if temperature == 0:
        if sample:
            raise GraftError("GC090", "--temperature 0 draws nothing, and --sample asks for it", hint="leave one out")
        sample, temperature = False, None
    if sample is False and given is not None:
        raise GraftError("GC090", f"{given} is of drawing tokens, and none are drawn", hint=f"leave out {given}")
    return {
        **{"max_new_tokens": max_new_tokens, "sample": True if given is not None else sample, "seed": seed},
        **{"temperature": temperature, "top_k": top_k, "top_p": top_p, "num_beams": num_beams},
        "use_cache": not no_cache,
    }


class Speaker(NamedTuple):
    """The options that choose the model, for `graftc.applications.chat.opening`."""

    directory: Path
    model: str | None
    tokenizer: str | None
    device: str | None
    adapter: str | None
    base: bool


@contextmanager
def opened(
    speaker: Speaker, given: dict[str, Any], step: Callable[[str], None]
) -> Iterator[tuple[TextModel, Settings]]:
    """Run the block with the model loaded and ready, and yield it with its settings.

    Args:
        speaker: the options that choose the model.
        given: fields of Settings.
        step: a function that is called with the name of each step.

    Raises:
        GraftError: the same as for `graftc.applications.chat.opening.open_text_model`; GC090 for options that
            contradict each other.
    """
    directory, model, tokenizer, device, adapter, base = speaker
    if adapter is not None and base:
        raise GraftError("GC090", "--base leaves out what --adapter chooses", hint="leave one out")
    step("loading")
    from graftc.applications.chat.answering import prepare
    from graftc.applications.chat.opening import adapted, open_text_model

    ready, how = open_text_model(directory, model, tokenizer, device=device), Settings(**given)
    with adapted(ready, adapter=adapter, base=base):
        step("preparing")
        prepare(ready, how)
        yield ready, how


def writer(to: TextIO) -> Callable[[str], None]:
    """Return a function that writes text at once, with control characters escaped."""

    def write(text: str) -> None:
        to.write(printable(text))
        to.flush()

    return write


def speed(answers: Sequence[Answer]) -> str:
    """Return a line with the time that answers took."""
    tokens, seconds = sum(len(a.ids) for a in answers), sum(a.seconds for a in answers)
    parts = [f"{tokens} {'token' if tokens == 1 else 'tokens'} in {seconds:.1f} s"]
    firsts = [(len(a.ids) - 1, a.seconds, first) for a in answers if (first := a.first_token_seconds) is not None]
    streamed = [(count, seconds - first) for count, seconds, first in firsts if count > 0]
    if streamed and (took := sum(each for _, each in streamed)) > 0:
        parts.append(f"{sum(count for count, _ in streamed) / took:.1f} tokens/s")
    elif seconds > 0:
        parts.append(f"{tokens / seconds:.1f} tokens/s")
    if firsts:
        parts.append(f"the first after {sum(first for *_, first in firsts) / len(firsts):.2f} s")
    return ", ".join(parts)


def report(answers: Sequence[Answer]) -> None:
    """Print the time that answers took, on the standard error."""
    from graftc.cli.output import error_console

    if answers:
        error_console().print(speed(answers), style="dim", soft_wrap=True, markup=False)


def stdin_text() -> TextIO:
    """Return the standard input, in which bytes that are not UTF-8 are replaced."""
    reconfigure = getattr(sys.stdin, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")
    return sys.stdin
