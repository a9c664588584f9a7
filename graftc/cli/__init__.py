"""The command line. Commands import their dependencies when they run, so that help and listings load no torch."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        arguments: the arguments after ``graftc``; by default those of the process, whose streams and interrupts are
            then managed as well.

    Returns:
        0: done; 1: the answer is no; 2: usage or spec error; 3: the files or the model failed, or the output could not
        be written; 130: interrupted; 141: the reader of the output has closed it.
    """
    import sys

    from graftc.cli.process import INTERRUPTED, interrupted, prepare, sane_sizes, started

    if arguments is None:
        prepare()
    sane_sizes()
    given = list(sys.argv[1:] if arguments is None else arguments)
    from contextlib import redirect_stdout

    from graftc.cli.app import build_app
    from graftc.cli.failures import show_failure
    from graftc.cli.standard_output import Watched, finish

    out = Watched(sys.stdout)
    as_json = "--json" in given
    try:
        with redirect_stdout(out):
            app = build_app()
            started()
            returned = app(given or ["--help"], prog_name="graftc", standalone_mode=False)
        status = returned if isinstance(returned, int) else 0
    except KeyboardInterrupt:
        status = INTERRUPTED
    except SystemExit as exit:  # Typer raises it for a broken pipe
        status = exit.code if isinstance(exit.code, int) else 1
    except Exception as error:
        try:
            with redirect_stdout(out):
                status = INTERRUPTED if interrupted() else show_failure(error, out, as_json=as_json)
        except KeyboardInterrupt:  # while the failure was being printed
            status = INTERRUPTED
    return finish(out, status)
