"""``graftc chat``: hold a conversation with a model that has a chat template."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graftc.cli.command import CommandRun, command
from graftc.cli.options import BaseOption
from graftc.cli.speaking import (
    AdapterOption,
    BaseAlone,
    DeviceOption,
    MaxNewTokens,
    NoCache,
    NumBeams,
    SampleOption,
    SeedOption,
    SpokenResult,
    SystemOption,
    Temperature,
    TextArgument,
    TokenizerOption,
    TopK,
    TopP,
)
from graftc.records.applications.answers import Answer, Turn

if TYPE_CHECKING:
    from graftc.applications.chat.conversation import Conversation


_HELP = "/reset clears the conversation, /exit quits; an interrupt (Ctrl-C) stops an answer"
_PROMPT = ">>> "


@dataclass(frozen=True, kw_only=True)
class ChatResult(SpokenResult):
    """`graftc chat DIR --json`."""

    system: str | None
    """The `--system` option."""

    turns: tuple[Turn, ...]
    """All turns in their order, those before `/reset` too."""


@command(live=True)
def chat(
    run: CommandRun,
    directory: TextArgument,
    system: SystemOption = None,
    max_new_tokens: MaxNewTokens = 512,
    sample: SampleOption = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    num_beams: NumBeams = None,
    seed: SeedOption = None,
    adapter: AdapterOption = None,
    base: BaseAlone = False,
    no_cache: NoCache = False,
    model: BaseOption = None,
    tokenizer: TokenizerOption = None,
    device: DeviceOption = None,
) -> ChatResult:
    """Talk to a model. Each line of input is a message, even from a pipe; /reset clears the conversation, /exit quits,
    and an interrupt stops an answer.
    """
    from contextlib import ExitStack

    from graftc.cli.speaking import Drawing, Speaker, opened, settings

    drawing = Drawing(sample, temperature, top_k, top_p, seed)
    given = settings(max_new_tokens, drawing, num_beams, no_cache)
    with ExitStack() as stack:
        with run.working():
            speaker = Speaker(directory, model, tokenizer, device, adapter, base)
            ready, how = stack.enter_context(opened(speaker, given, run.step))
            from graftc.applications.chat.conversation import Conversation

            conversation = Conversation(ready, how, system)
        turns = _talk(conversation, run.as_json)
    return ChatResult(
        path=str(directory), kind=ready.kind, adapter=adapter, base=base, system=system, **given, turns=turns
    )


@chat.shows
def _show(result: ChatResult, to: object) -> None:
    """Show nothing more: answers were printed as they were generated."""


def _talk(conversation: Conversation, json: bool) -> tuple[Turn, ...]:
    """Hold the conversation until the user leaves, and return its turns."""
    from graftc.cli.output import print_coded
    from graftc.cli.speaking import report, writer
    from graftc.specs.errors.diagnostics import GraftError

    write = writer(sys.stdout)
    live = sys.stdin.isatty() and not json
    tell = _teller() if live else (lambda _: None)
    tell(_HELP)
    turns: list[Turn] = []
    answers = []
    for said in _lines(live, tell):
        if said == "/exit":
            break
        if said in ("/reset", "/help"):
            if said == "/reset":
                conversation.reset()
            tell("conversation cleared" if said == "/reset" else _HELP)
            continue
        try:
            answer = _turn(conversation, said, (lambda _: None) if json else write)
        except GraftError as error:
            if not live:
                raise
            print_coded(error, "red")
            continue
        answers.append(answer)
        turns.append(Turn(**vars(answer), said=said))
        if not json:
            write("\n")
        if live:
            report([answer])
    if not live and not json:
        report(answers)
    return tuple(turns)


def _turn(conversation: Conversation, said: str, write: Callable[[str], None]) -> Answer:
    """Return the model's answer; an interrupt cuts it short."""
    from graftc.cli.interrupts import Stop, interrupts
    from graftc.cli.output import working

    stop = Stop()
    with working(False), interrupts(stop):
        return conversation.say(said, write, lambda: stop.asked)


def _lines(live: bool, tell: Callable[[str], None]) -> Iterator[str]:
    """Yield the lines that the user enters, except empty ones."""
    from graftc.cli.speaking import stdin_text

    if not live:
        yield from (line.strip() for line in stdin_text() if line.strip())
        return
    while True:
        said = _asked(tell)
        if said is None:
            return
        if said:
            yield said


def _asked(tell: Callable[[str], None]) -> str | None:
    """Read a line from the terminal; return None at the end of the input. An interrupt clears the line."""
    import contextlib

    from graftc.cli.interrupts import interrupts

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (makes lines editable)

    def clear() -> None:
        raise KeyboardInterrupt

    try:
        with interrupts(clear):
            return input(_PROMPT).strip()
    except EOFError:
        tell("")
        return None
    except KeyboardInterrupt:
        tell("\n/exit quits")
        return ""


def _teller() -> Callable[[str], None]:
    """Return a function that prints remarks outside the conversation to stderr."""
    from graftc.cli.output import error_console

    to = error_console()
    return lambda text: to.print(text, style="dim", soft_wrap=True, markup=False)
