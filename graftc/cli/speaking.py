"""The parts that ``graftc generate`` and ``graftc chat`` share: options, loading the model, and terminal output."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TextIO, TypeAlias

import typer

from graftc.cli import completion
from graftc.cli.options import folder_argument
from graftc.records.applications.answers import Answer, Settings
from graftc.records.results import CommandResult
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import printable

if TYPE_CHECKING:
    from graftc.applications.chat.opening import TextModel


TextArgument: TypeAlias = Annotated[
    Path,
    folder_argument("An artifact, a merged model, any other transformers folder, or (with --model) a PEFT adapter."),
]
TokenizerOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="NAME",
        help="A folder or hub id with the tokenizer. Default: DIR or its base.",
        show_default=False,
        autocompletion=completion.models,
    ),
]
MaxNewTokens: TypeAlias = Annotated[
    int, typer.Option("--max-new-tokens", "-n", metavar="N", min=1, help="Maximum number of tokens in an answer.")
]
SampleOption: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--sample/--greedy",
        help="Sample tokens, or always choose the most likely one. Default: the model's setting, or --sample if a "
        "sampling option is given.",
        show_default=False,
    ),
]
Temperature: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        "-t",
        metavar="X",
        min=0,
        help="Values above 1 sample unlikely tokens more often; 0 means --greedy.",
    ),
]
TopK: TypeAlias = Annotated[
    int | None, typer.Option("--top-k", metavar="N", min=1, help="Sample from the N most likely tokens.")
]
TopP: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--top-p", metavar="X", min=0, max=1, help="Sample from the fewest tokens whose probabilities sum to X."
    ),
]
NumBeams: TypeAlias = Annotated[
    int | None,
    typer.Option("--num-beams", metavar="N", min=1, help="Number of beams; with more than one, nothing is streamed."),
]
SeedOption: TypeAlias = Annotated[
    int | None, typer.Option("--seed", metavar="N", min=0, help="Seed for sampling, set before each answer.")
]
AdapterOption: TypeAlias = Annotated[
    str | None, typer.Option("--adapter", metavar="NAME", help="The adaptation of a bank that answers.")
]
BaseAlone: TypeAlias = Annotated[bool, typer.Option("--base", help="Let the base answer, without adaptations.")]
SystemOption: TypeAlias = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="System message at the beginning of a chat.")
]
DeviceOption: TypeAlias = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="Device for the model, such as cuda. Default: the CPU.")
]
NoCache: TypeAlias = Annotated[
    bool,
    typer.Option("--no-cache", help="Recompute the whole text for every token: slow, but works with any adaptation."),
]


@dataclass(frozen=True, kw_only=True)
class SpokenResult(
    Settings, CommandResult, behind={"": ("path", "kind", "adapter", "base"), "use_cache": ("warnings",)}
):
    """Who answered, and how. What is null of drawing tokens is as the model's `generation_config` says."""

    path: str
    """The DIR argument."""

    kind: Literal["artifact", "model", "onnx", "peft"]
    """Its contents: an artifact, a whole model, ONNX graphs, or an adapter of PEFT's."""

    adapter: str | None
    """The `--adapter` option."""

    base: bool
    """Whether the base answered, without adaptations."""


class Drawing(NamedTuple):
    """The sampling options, which mean the same as these fields of `graftc.records.applications.answers.Settings`."""

    sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None


def settings(max_new_tokens: int, drawing: Drawing, num_beams: int | None, no_cache: bool) -> dict[str, Any]:
    """Return the fields of ``Settings`` that the options determine, before anything is loaded.

    Raises:
        GraftError: GC090 for options that contradict each other.
    """
    sample, temperature, top_k, top_p, seed = drawing
    options = {"--temperature": temperature or None, "--top-k": top_k, "--top-p": top_p}
    given = next((name for name, value in options.items() if value is not None), None)
    if temperature == 0:
        if sample:
            raise GraftError("GC090", "--temperature 0 is greedy, which contradicts --sample", hint="leave one out")
        sample, temperature = False, None
    if sample is False and given is not None:
        raise GraftError("GC090", f"{given} applies only to sampling, which is off", hint=f"leave out {given}")
    return {
        **{"max_new_tokens": max_new_tokens, "sample": True if given is not None else sample, "seed": seed},
        **{"temperature": temperature, "top_k": top_k, "top_p": top_p, "num_beams": num_beams},
        "use_cache": not no_cache,
    }


class Speaker(NamedTuple):
    """The options that select the model, for `graftc.applications.chat.opening`."""

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
    """Run the block with the model loaded and ready, and yield the model with its settings.

    Args:
        speaker: the options that select the model.
        given: the fields of ``Settings``.
        step: a function that is called with the name of each step.

    Raises:
        GraftError: GC090 for options that contradict each other; otherwise as for
            `graftc.applications.chat.opening.open_text_model`.
    """
    directory, model, tokenizer, device, adapter, base = speaker
    if adapter is not None and base:
        raise GraftError("GC090", "--base disables the adaptation that --adapter selects", hint="leave one out")
    step("loading")
    from graftc.applications.chat.answering import prepare
    from graftc.applications.chat.opening import adapted, open_text_model

    ready, how = open_text_model(directory, model, tokenizer, device=device), Settings(**given)
    with adapted(ready, adapter=adapter, base=base):
        step("preparing")
        prepare(ready, how)
        yield ready, how


def writer(to: TextIO) -> Callable[[str], None]:
    """Return a function that writes and flushes text, with control characters escaped."""

    def write(text: str) -> None:
        to.write(printable(text))
        to.flush()

    return write


def speed(answers: Sequence[Answer]) -> str:
    """Return a line with the time and speed of answers."""
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
    """Print the time and speed of answers to stderr."""
    from graftc.cli.output import error_console

    if answers:
        error_console().print(speed(answers), style="dim", soft_wrap=True, markup=False)


def stdin_text() -> TextIO:
    """Return stdin, set to replace bytes that are not UTF-8."""
    reconfigure = getattr(sys.stdin, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")
    return sys.stdin
