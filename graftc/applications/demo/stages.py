"""The parts that the demos share: timed stages, progress bars, the output folder, and printed output."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from graftc.applications.demo.data import Batched, training_batches
from graftc.applications.demo.training import TrainingRun, predict, train
from graftc.records.applications.demo import DemoResult, LLMResult, Scores
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import counted

if TYPE_CHECKING:
    from graftc.records.certificate import Certificate
    from graftc.records.report import Report


RESULT = "demo.json"
"""The file with the result, which marks a folder as written by a demo."""

SEED = 0
"""The seed for all of a demo's random choices."""

_PACKAGES = {"sklearn": "scikit-learn"}


class Stages:
    """A run of a demo, which prints, writes files, and times its stages.

    Attributes:
        console: the console to print to.
        out: the folder to write to.
        seconds: the duration of each stage, by name.
    """

    def __init__(self, console: Console, out: Path) -> None:
        self.console, self.out = console, out
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Run the block as a stage: print its name, and record its duration.

        The duration is recorded under the part of the name before the first colon or comma.
        """
        self.console.rule(name, align="left")
        start = time.perf_counter()
        yield
        self.seconds[name.partition(":")[0].partition(",")[0]] = time.perf_counter() - start

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[..., None]]:
        """Show a progress bar, and yield a function that advances it by a number of steps and may change its label."""
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(label, total=total)

            def advance(steps: int, description: str | None = None) -> None:
                progress.update(task, advance=steps, description=description)

            yield advance

    def train(self, model: torch.nn.Module, data: Batched, *, steps: int, batch: int, lr: float) -> TrainingRun:
        """Train on batches determined by `SEED`, and show the average loss on the progress bar."""
        torch.manual_seed(SEED)
        with self.progress("loss    -", steps) as advance:
            average, kept = 0.0, 1 - min(0.5, 10 / steps)

            def on_step(step: int, loss: float) -> None:
                nonlocal average
                average = loss if step == 1 else kept * average + (1 - kept) * loss
                advance(1, f"loss {average:.3f}")
                if not self.console.is_terminal and step % max(1, steps // 5) == 0:
                    self.console.print(f"step {step} of {steps}: loss {average:.3f}")

            return train(model, training_batches(data, batch, SEED), steps, lr, on_step=on_step)

    def predict(
        self,
        forward: Callable[[dict[str, torch.Tensor]], torch.Tensor],
        data: Batched,
        *,
        label: str = "test split",
        size: int = 64,
    ) -> torch.Tensor:
        """Return the logits as `predict` does, and show a progress bar."""
        with self.progress(label, len(data)) as advance:
            return predict(forward, data, size=size, on_batch=advance)

    def show_spec(self, spec: str, name: str) -> None:
        """Print the spec, and write it to the file with this name."""
        self.console.print(Text(spec.rstrip(), style="cyan"), soft_wrap=True)
        (self.out / name).write_text(spec, encoding="utf-8")

    @property
    def rounded_seconds(self) -> dict[str, float]:
        """The duration of each stage, rounded to hundredths of a second for the record."""
        return {name: round(value, 2) for name, value in self.seconds.items()}

    def show_report(self, report: Report) -> None:
        """Print what each adaptation adds to the model."""
        table = Table(title="what is added", title_justify="left")
        for name in ("adaptation", "method", "sites", "trainable", "KiB", "FLOPs per token"):
            table.add_column(name, justify="left" if name in ("adaptation", "method") else "right")
        for entry in report.adaptations:
            table.add_row(
                entry.name,
                entry.method,
                f"{entry.sites:,}",
                f"{entry.trainable_parameters:,}",
                f"{entry.bytes / 1024:,.0f}",
                f"{entry.flops_per_token:,.0f}",
            )
        self.console.print(table)
        self.console.print(
            f"{report.trainable_parameters:,} adapter parameters beside {report.base_parameters:,} "
            f"of the model: {report.percent:.2f} % of both"
        )

    def show_scores(self, title: str, columns: tuple[str, ...], rows: Mapping[str, tuple[float, ...]]) -> None:
        """Print fractions as percentages in a table with a row for each model."""
        table = Table(title=title, title_justify="left")
        table.add_column("model")
        for column in columns:
            table.add_column(column, justify="right")
        for name, values in rows.items():
            table.add_row(name, *(f"{100 * value:.1f} %" for value in values))
        self.console.print(table)

    def show_certificate(self, certificate: Certificate) -> None:
        """Print a one-line summary of the evidence for the fold."""
        worst = max(site.algebra for site in certificate.sites)
        self.console.print(
            f"certified: {counted(len(certificate.sites))}, unfolded and folded at most {worst:.1e} apart in float64; "
            f"outputs at most {certificate.largest_difference:.1e} (budget {certificate.budget:.1e}); "
            f"the folded graph is the base's graph"
        )

    def stop_the_clock(self) -> None:
        """Record the duration of the whole run."""
        self.seconds["total"] = time.perf_counter() - self._start

    def finish(self, outcome: DemoResult | LLMResult) -> None:
        """Write the result, and print the files that were written and the checks that failed."""
        text = json.dumps(outcome.to_json(), indent=2, ensure_ascii=False) + "\n"
        (self.out / RESULT).write_text(text, encoding="utf-8")
        self.console.rule("not as promised" if outcome.failures else "done", align="left")
        for purpose, name in outcome.files.items():
            path = self.out / name
            self.console.print(f"{purpose:>20}: {path} ({_readable(size_of(path))})", soft_wrap=True, highlight=False)
        for failure in outcome.failures:
            self.console.print(Text(f"FAILED: {failure}", style="bold red"))
        self.console.print(f"{self.seconds['total']:.0f} s in all")


def both_scores(scores: Scores) -> tuple[float, float]:
    """Return accuracy and macro-F1 in the form that `Stages.show_scores` expects."""
    return scores.accuracy, scores.macro_f1


def size_of(path: Path) -> int:
    """Return the size of a file, or of all files in a folder, in bytes."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _readable(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def require(*modules: str) -> None:
    """Check that these modules are installed, so that a missing module is reported before minutes of training.

    Raises:
        GraftError: GC061 if a module is not installed.
    """
    missing = [_PACKAGES.get(module, module) for module in modules if find_spec(module) is None]
    if missing:
        raise GraftError("GC061", f"the demo needs {' and '.join(missing)}", hint="pip install 'graftc[demo]'")


def claim(out: Path, names: Mapping[str, str]) -> None:
    """Create the folder, and remove any files with these names that an earlier demo left in it.

    A folder that is neither empty nor marked as an earlier demo's is left unchanged.

    Raises:
        GraftError: GC063 if the folder contains something else, or cannot be written.
    """
    if out.exists() and not (out.is_dir() and ((out / RESULT).is_file() or not any(out.iterdir()))):
        hint = "choose another folder with --out, or remove this one"
        raise GraftError("GC063", f"'{out}' exists but was not written by the demo", hint=hint)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in names.values():
            path = out / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            (out / f"{name}.data").unlink(missing_ok=True)
        # Mark the folder as the demo's from the start, so that an interrupted demo can be run again.
        (out / RESULT).write_text("{}\n", encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise GraftError("GC063", f"'{out}' cannot be written ({reason})") from None
