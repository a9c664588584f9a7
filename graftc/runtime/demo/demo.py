"""The whole path on a real model and real data: compile, train, fold, certify, save, export, check."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

from graftc.compiler.missing_weights import require_weights
from graftc.runtime.demo.baseline import embed, logistic_regression
from graftc.runtime.demo.data import Dataset, DataSplit, Encoded, encode, find_model, load_r8, training_batches
from graftc.runtime.demo.result import DemoResult, PredictionAgreement
from graftc.runtime.demo.training import Scores, predict, score, train_classifier
from graftc.runtime.files import check_apart
from graftc.runtime.models import from_checkpoint, quiet_transformers
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.io import parse_spec

if TYPE_CHECKING:
    from graftc.runtime.compiled import Compiled
    from graftc.runtime.deploy.merged import Merged

__all__ = ["SPEC", "run_demo"]

SPEC = """\
version: 1
adapt:
  - name: reuters
    method: lora
    target: {role: [attn.q, attn.k, attn.v, attn.o, ffn.up, ffn.down], expect: 36}
    rank: 8
    alpha: 16
train: [bert.pooler, classifier]
"""
"""The spec that the demo compiles."""

_SEED = 0
_TOLERANCE = 1e-4
_RESULT = "demo.json"
_FILES = {
    "spec": "spec.yaml",
    "graph diff": "diff.txt",
    "transformers folder": "model",
    "onnx": "model.onnx",
    "result": _RESULT,
}


@dataclass(frozen=True)
class _Plan:
    steps: int
    batch: int
    lr: float
    train: int | None = None
    test: int | None = None
    baseline: bool = True


_FULL = _Plan(steps=200, batch=24, lr=2e-3)
_QUICK = _Plan(steps=40, batch=16, lr=2e-3, train=640, test=200, baseline=False)


def run_demo(out: Path, quick: bool = False, console: Console | None = None) -> DemoResult:
    """Compile LoRA on a pretrained encoder, train it on Reuters R8, fold, certify, save and export it.

    Args:
        out: a folder that does not exist, is empty, or was written by an earlier demo.
        quick: a subset of the data and no baseline, for a result within two minutes.
        console: where to print; by default the standard output.

    Raises:
        GraftError: GC062, the model or the data is missing; GC061, scikit-learn or ONNX Runtime is; GC063,
            ``out`` holds something else.
    """
    plan = _QUICK if quick else _FULL
    console = Console() if console is None else console
    folder, data = find_model(), load_r8()
    _require("onnxruntime", *(["sklearn"] if plan.baseline else []))
    check_apart(out, folder)
    _claim(out)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        return _Demo(plan, quick, console, out, folder, data).run()


class _Demo:
    """One run: what its stages share."""

    def __init__(self, plan: _Plan, quick: bool, console: Console, out: Path, model: Path, data: Dataset) -> None:
        from transformers import AutoTokenizer

        self.plan, self.quick, self.console, self.out, self.folder = plan, quick, console, out, model
        self.names = data.names
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.train, self.test = (self._encode(data.train, plan.train), self._encode(data.test, plan.test))
        self.seconds: dict[str, float] = {}

    def _encode(self, split: DataSplit, size: int | None) -> Encoded:
        return encode(self.tokenizer, split if size is None else split.subset(size, _SEED))

    def run(self) -> DemoResult:
        start = time.perf_counter()
        self.console.print(
            f"Reuters R8: {len(self.train):,} training and {len(self.test):,} test texts in "
            f"{len(self.names)} classes; pretrained MiniLM encoder, 6 layers, 384 wide"
        )
        with self._stage("compile"):
            compiled = self._compile()
        with self._stage("test the untrained model"):
            before = self._scores(self._logits(compiled))
        with self._stage("train"):
            self._train(compiled)
        with self._stage("test the trained model"):
            logits = self._logits(compiled)
            after = self._scores(logits)
        baseline = None
        if self.plan.baseline:
            with self._stage("baseline: logistic regression on frozen embeddings"):
                baseline = self._baseline()
        self._print_scores(before, after, baseline)
        with self._stage("fold and certify"):
            merged = compiled.merge()
            self._print_certificate(merged)
        with self._stage("save a transformers folder, reload it with plain transformers"):
            reloaded = self._reload(merged, logits)
        with self._stage("export ONNX, run it in ONNX Runtime"):
            onnx = self._onnx(merged, logits)
        self.seconds["total"] = time.perf_counter() - start
        result = DemoResult(
            quick=self.quick,
            examples=(len(self.train), len(self.test)),
            before=before,
            after=after,
            baseline=baseline,
            report=compiled.report.to_json(),
            certificate=merged.certificate.to_json(),
            transformers=reloaded,
            onnx=onnx,
            seconds=self.seconds,
            files=dict(_FILES),
        )
        (self.out / _RESULT).write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
        self._print_end(result)
        return result

    def _compile(self) -> Compiled:
        from transformers import AutoModelForSequenceClassification

        import graftc

        torch.manual_seed(_SEED)
        model = from_checkpoint(
            AutoModelForSequenceClassification,
            self.folder,
            str(self.folder),
            num_labels=len(self.names),
            id2label=dict(enumerate(self.names)),
            label2id={name: i for i, name in enumerate(self.names)},
        )
        self.console.print(Text(SPEC.rstrip(), style="cyan"), soft_wrap=True)
        (self.out / _FILES["spec"]).write_text(SPEC, encoding="utf-8")
        example = next(training_batches(self.train, 2, _SEED))
        del example["labels"]
        compiled = graftc.compile(parse_spec(SPEC), model, example)
        diff = compiled.diff()
        (self.out / _FILES["graph diff"]).write_text(diff, encoding="utf-8")
        self.console.print("the graph before (-) and after (+):")
        for line in diff.splitlines():
            style = {"+": "green", "-": "red", "@": "bold"}.get(line[:1], "dim")
            self.console.print(Text(line, style=style), soft_wrap=True)
        self._print_report(compiled.report.to_json())
        return compiled

    def _print_report(self, report: dict[str, Any]) -> None:
        table = Table(title="what is added", title_justify="left")
        for name in ("adaptation", "method", "sites", "trainable", "KiB", "FLOPs per token"):
            table.add_column(name, justify="left" if name in ("adaptation", "method") else "right")
        for entry in report["adaptations"]:
            table.add_row(
                entry["name"],
                entry["method"],
                f"{entry['sites']:,}",
                f"{entry['trainable_parameters']:,}",
                f"{entry['bytes'] / 1024:,.0f}",
                f"{entry['flops_per_token']:,.0f}",
            )
        self.console.print(table)
        self.console.print(
            f"{report['trainable_parameters']:,} adapter parameters beside {report['base_parameters']:,} "
            f"of the model: {report['percent']:.2f} % of both"
        )

    def _train(self, compiled: Compiled) -> None:
        plan = self.plan
        torch.manual_seed(_SEED)
        with self._progress("loss    -", plan.steps) as advance:
            average = 0.0

            def on_step(step: int, loss: float) -> None:
                nonlocal average
                average = loss if step == 1 else 0.95 * average + 0.05 * loss
                advance(1, f"loss {average:.3f}")
                if not self.console.is_terminal and step % max(1, plan.steps // 5) == 0:
                    self.console.print(f"step {step} of {plan.steps}: loss {average:.3f}")

            batches = training_batches(self.train, plan.batch, _SEED)
            train_classifier(compiled, batches, plan.steps, plan.lr, on_step=on_step)

    def _logits(self, model: torch.nn.Module) -> torch.Tensor:
        model.eval()
        with self._progress("test split", len(self.test)) as advance:
            return predict(lambda batch: model(**batch).logits, self.test, on_batch=advance)

    def _scores(self, logits: torch.Tensor) -> Scores:
        return score(logits.argmax(1).tolist(), self.test.labels, len(self.names))

    def _baseline(self) -> Scores:
        from transformers import AutoModel

        encoder = from_checkpoint(AutoModel, self.folder, str(self.folder))
        require_weights(encoder)
        with self._progress("embedding", len(self.train) + len(self.test)) as advance:
            train, test = embed(encoder, self.train, advance), embed(encoder, self.test, advance)
        return logistic_regression(train, self.train.labels, test, self.test.labels, len(self.names))

    def _print_scores(self, before: Scores, after: Scores, baseline: Scores | None) -> None:
        table = Table(title=f"on the {len(self.test):,} test texts", title_justify="left")
        table.add_column("model")
        table.add_column("accuracy", justify="right")
        table.add_column("macro-F1", justify="right")
        rows = [("LoRA, before training", before), ("LoRA, after training", after)]
        if baseline is not None:
            rows.append(("logistic regression on frozen embeddings", baseline))
        for name, scores in rows:
            table.add_row(name, f"{100 * scores.accuracy:.1f} %", f"{100 * scores.macro_f1:.1f} %")
        self.console.print(table)

    def _print_certificate(self, merged: Merged) -> None:
        certificate = merged.certificate
        worst = max(site.algebra for site in certificate.sites)
        self.console.print(
            f"certified: {len(certificate.sites)} sites, unfolded and folded at most {worst:.1e} apart in float64; "
            f"outputs at most {certificate.largest_difference:.1e} (budget {certificate.budget:.1e}); "
            f"the folded graph is the base's graph"
        )

    def _reload(self, merged: Merged, logits: torch.Tensor) -> PredictionAgreement:
        from transformers import AutoModelForSequenceClassification

        folder = self.out / _FILES["transformers folder"]
        merged.to_transformers().save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        plain = AutoModelForSequenceClassification.from_pretrained(folder)
        return self._agreement("plain transformers", self._logits(plain), logits)

    def _onnx(self, merged: Merged, logits: torch.Tensor) -> PredictionAgreement:
        import onnxruntime

        path = self.out / _FILES["onnx"]
        merged.export(path, format="onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

        def forward(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            inputs = {name: value.numpy() for name, value in batch.items()}
            return torch.from_numpy(session.run(["logits"], inputs)[0])

        with self._progress("ONNX Runtime", len(self.test)) as advance:
            found = predict(forward, self.test, on_batch=advance)
        return self._agreement("ONNX Runtime", found, logits)

    def _agreement(self, what: str, found: torch.Tensor, logits: torch.Tensor) -> PredictionAgreement:
        same = (found.argmax(1) == logits.argmax(1)).double().mean().item()
        difference = (found.double() - logits.double()).abs().max().item()
        agreement = PredictionAgreement(same, difference, _TOLERANCE)
        self.console.print(
            f"{what}: {100 * same:.2f} % of the predictions are the same, "
            f"logits differ by at most {difference:.1e} (allowed {agreement.tolerance:.1e})"
        )
        return agreement

    def _print_end(self, result: DemoResult) -> None:
        self.console.rule("done" if result.passed else "not as promised", align="left")
        for purpose, name in result.files.items():
            self.console.print(f"{purpose:>20}: {self.out / name}", soft_wrap=True, highlight=False)
        for failure in result.failures:
            self.console.print(Text(f"FAILED: {failure}", style="bold red"))
        self.console.print(f"{self.seconds['total']:.0f} s in all")

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self.console.rule(name, align="left")
        start = time.perf_counter()
        yield
        self.seconds[name.partition(":")[0].partition(",")[0]] = time.perf_counter() - start

    @contextmanager
    def _progress(self, label: str, total: int) -> Iterator[Callable[..., None]]:
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


def _require(*modules: str) -> None:
    """Say what is missing before minutes of training, not after."""
    names = {"sklearn": "scikit-learn"}
    missing = [names.get(module, module) for module in modules if find_spec(module) is None]
    if missing:
        raise GraftError("GC061", f"the demo needs {' and '.join(missing)}", hint="pip install 'graftc[demo]'")


def _claim(out: Path) -> None:
    """Make the folder; one that holds anything but an earlier demo is left alone."""
    if out.exists() and not (out.is_dir() and ((out / _RESULT).is_file() or not any(out.iterdir()))):
        hint = "choose another folder with --out, or remove this one"
        raise GraftError("GC063", f"'{out}' exists and was not written by the demo", hint=hint)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in _FILES.values():
            path = out / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        (out / f"{_FILES['onnx']}.data").unlink(missing_ok=True)
        # Marks the folder as the demo's from the start, so that one that was interrupted can be run again.
        (out / _RESULT).write_text("{}\n", encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise GraftError("GC063", f"'{out}' cannot be written ({reason})") from None
