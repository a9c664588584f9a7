"""``graftc generate``: generate text from prompts."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

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
    report,
)
from graftc.records.applications.answers import GeneratedAnswer
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.regular_files import JSON_BYTES


@dataclass(frozen=True, kw_only=True)
class GenerateResult(SpokenResult):
    """`graftc generate DIR --json`."""

    chat: bool
    """Whether prompts were put into the chat template."""

    answers: tuple[GeneratedAnswer, ...]
    """One for each prompt, in their order; fewer where it was interrupted."""


@command(live=True)
def generate(
    run: CommandRun,
    directory: TextArgument,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="The text to continue; may be repeated."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            metavar="FILE",
            help="A file with the prompt; - is stdin, which is also read if neither --prompt nor --file is given.",
            show_default=False,
        ),
    ] = None,
    lines: Annotated[bool, typer.Option("--lines", help="Treat every line of the file as a prompt.")] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Treat prompts as a user's messages: apply the chat template.")
    ] = False,
    system: SystemOption = None,
    max_new_tokens: MaxNewTokens = 256,
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
) -> GenerateResult:
    """Generate text, one answer after the other, printed to stdout while it is generated. The speed is printed to
    stderr.
    """
    from contextlib import ExitStack

    from graftc.cli.interrupts import Stop, interrupts
    from graftc.cli.output import steps, working
    from graftc.cli.process import INTERRUPTED
    from graftc.cli.speaking import Drawing, Speaker, opened, settings, writer

    drawing = Drawing(sample, temperature, top_k, top_p, seed)
    given = settings(max_new_tokens, drawing, num_beams, no_cache)
    if system is not None and not chat:
        raise GraftError("GC090", "--system applies only to chats, but the prompts are plain texts", hint="add --chat")
    prompts = _prompts(prompt, file, lines)
    write, stop = (lambda _: None) if run.as_json else writer(sys.stdout), Stop()
    with working(run.as_json) as run.warnings, ExitStack() as stack:
        with steps(run.as_json) as step:
            speaker = Speaker(directory, model, tokenizer, device, adapter, base)
            ready, how = stack.enter_context(opened(speaker, given, step))
            from graftc.applications.chat.answering import answer, prompt_ids

            begin = [{"role": "system", "content": system}] if system is not None else []
            asked = [[*begin, {"role": "user", "content": text}] if chat else text for text in prompts]
            ids = [prompt_ids(ready, each) for each in asked]
        answers: list[GeneratedAnswer] = []
        with interrupts(stop):
            for text, each in zip(prompts, ids, strict=True):
                if stop.asked:
                    break
                if answers:
                    write("\n")
                said = answer(ready, each, how, say=write, stopped=lambda: stop.asked)
                answers.append(GeneratedAnswer(**vars(said), prompt=text))
                write("\n")
    run.status = INTERRUPTED if stop.asked else 0
    return GenerateResult(
        path=str(directory), kind=ready.kind, adapter=adapter, base=base, chat=chat, **given, answers=tuple(answers)
    )


@generate.shows
def _show(result: GenerateResult, to: object) -> None:
    report(result.answers)


def _prompts(given: list[str] | None, file: Path | None, lines: bool) -> list[str]:
    from graftc.cli.speaking import stdin_text

    if given and (file is not None or lines):
        other = "--file" if file is not None else "--lines"
        raise GraftError("GC090", f"--prompt and {other} cannot be combined", hint=f"leave out {other}")
    if given:
        return given
    if file is None or str(file) == "-":
        if file is None and sys.stdin.isatty():
            raise GraftError("GC090", "missing option '--prompt'", hint="use --prompt TEXT, or --file FILE")
        where, text = "stdin", stdin_text().read(JSON_BYTES + 1)
    else:
        where = repr(str(file))
        try:
            with file.open(encoding="utf-8") as opened:  # this may be a pipe, such as the shell's <(...)
                text = opened.read(JSON_BYTES + 1)
        except (OSError, UnicodeDecodeError) as error:
            strerror = getattr(error, "strerror", None)
            reason = strerror.lower() if strerror else "it is not UTF-8"
            raise GraftError("GC090", f"{where} cannot be read: {reason}") from error
    if len(text) > JSON_BYTES:
        raise GraftError("GC090", f"{where} has more than {JSON_BYTES:,} characters", hint="shorten the prompt")
    prompts = [line for line in text.splitlines() if line.strip()] if lines else [text.removesuffix("\n")]
    if not any(each.strip() for each in prompts):
        raise GraftError("GC090", f"{where} contains no prompt", hint="use --prompt TEXT, or --file FILE")
    return prompts
