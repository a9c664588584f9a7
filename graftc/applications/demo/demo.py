"""The whole workflow on a real model and real data: compile, train, fold, certify, save, export, check."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.text import Text

from graftc.applications.demo.baseline import embed, logistic_regression
from graftc.applications.demo.data import Dataset, DataSplit, Encoded, encode, find_model, load_r8, training_batches
from graftc.applications.demo.stages import RESULT, SEED, Stages, both_scores, claim, require
from graftc.applications.demo.training import score
from graftc.compiler.missing_weights import require_weights
from graftc.files.writing import check_apart
from graftc.records.applications.demo import DemoResult, DemoScores, ExampleCounts, PredictionAgreement, Scores
from graftc.runtime.sources.models import from_checkpoint, quiet_transformers
from graftc.specs.io import parse_spec

if TYPE_CHECKING:
    from graftc.runtime.compiled import Compiled
    from graftc.runtime.deploy.merged import Merged


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

_TOLERANCE = 1e-4
_FILES = {
    "spec": "spec.yaml",
    "graph diff": "diff.txt",
    "transformers folder": "model",
    "onnx": "model.onnx",
    "result": RESULT,
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
        quick: if true, use a subset of the data and no baseline, for a result within two minutes.
        console: the console to print to; by default stdout.

    Raises:
        GraftError: GC062 if the model or the data is missing; GC061 if scikit-learn or ONNX Runtime is missing; GC063
            if ``out`` contains something else.
    """
    plan = _QUICK if quick else _FULL
    console = Console() if console is None else console
    folder, data = find_model(), load_r8()
    require("onnxruntime", *(["sklearn"] if plan.baseline else []))
    check_apart(out, folder)
    claim(out, _FILES)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        return _Demo(plan, quick, console, out, folder, data).run()


class _Demo(Stages):
    """A run of the demo, with the state shared by its stages."""

    def __init__(self, plan: _Plan, quick: bool, console: Console, out: Path, model: Path, data: Dataset) -> None:
        from transformers import AutoTokenizer

        super().__init__(console, out)
        self.plan, self.quick, self.folder = plan, quick, model
        self.names = data.names
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.training, self.test = (self._encode(data.train, plan.train), self._encode(data.test, plan.test))

    def _encode(self, split: DataSplit, size: int | None) -> Encoded:
        return encode(self.tokenizer, split if size is None else split.subset(size, SEED))

    def run(self) -> DemoResult:
        self.console.print(
            f"Reuters R8: {len(self.training):,} training and {len(self.test):,} test texts in "
            f"{len(self.names)} classes; pretrained MiniLM encoder, 6 layers, 384 wide"
        )
        with self.stage("compile"):
            compiled = self._compile()
        with self.stage("test the untrained model"):
            before = self._scores(self._logits(compiled))
        with self.stage("train"):
            self.train(compiled, self.training, steps=self.plan.steps, batch=self.plan.batch, lr=self.plan.lr)
        with self.stage("test the trained model"):
            logits = self._logits(compiled)
            after = self._scores(logits)
        baseline = None
        if self.plan.baseline:
            with self.stage("baseline: logistic regression on frozen embeddings"):
                baseline = self._baseline()
        self._show_scores(before, after, baseline)
        with self.stage("fold and certify"):
            merged = compiled.merge()
            self.show_certificate(merged.certificate)
        with self.stage("save a transformers folder, reload it with plain transformers"):
            reloaded = self._reload(merged, logits)
        with self.stage("export ONNX, run it in ONNX Runtime"):
            onnx = self._onnx(merged, logits)
        self.stop_the_clock()
        result = DemoResult(
            quick=self.quick,
            examples=ExampleCounts(len(self.training), len(self.test)),
            scores=DemoScores(before, after, baseline),
            report=compiled.report,
            certificate=merged.certificate,
            transformers=reloaded,
            onnx=onnx,
            seconds=self.rounded_seconds,
            files=dict(_FILES),
            out=str(self.out),
        )
        self.finish(result)
        return result

    def _compile(self) -> Compiled:
        from transformers import AutoModelForSequenceClassification

        import graftc

        torch.manual_seed(SEED)
        model = from_checkpoint(
            AutoModelForSequenceClassification,
            self.folder,
            str(self.folder),
            num_labels=len(self.names),
            id2label=dict(enumerate(self.names)),
            label2id={name: i for i, name in enumerate(self.names)},
        )
        self.show_spec(SPEC, _FILES["spec"])
        example = next(training_batches(self.training, 2, SEED))
        del example["labels"]
        compiled = graftc.compile(parse_spec(SPEC), model, example, seed=0)
        diff = compiled.diff()
        (self.out / _FILES["graph diff"]).write_text(diff, encoding="utf-8")
        self.console.print("the graph before (-) and after (+):")
        for line in diff.splitlines():
            style = {"+": "green", "-": "red", "@": "bold"}.get(line[:1], "dim")
            self.console.print(Text(line, style=style), soft_wrap=True)
        self.show_report(compiled.report)
        return compiled

    def _logits(self, model: torch.nn.Module) -> torch.Tensor:
        model.eval()
        return self.predict(lambda batch: model(**batch).logits, self.test)

    def _scores(self, logits: torch.Tensor) -> Scores:
        return score(logits.argmax(1).tolist(), self.test.labels, len(self.names))

    def _baseline(self) -> Scores:
        from transformers import AutoModel

        encoder = from_checkpoint(AutoModel, self.folder, str(self.folder))
        require_weights(encoder)
        with self.progress("embedding", len(self.training) + len(self.test)) as advance:
            train, test = embed(encoder, self.training, advance), embed(encoder, self.test, advance)
        return logistic_regression(train, self.training.labels, test, self.test.labels, len(self.names))

    def _show_scores(self, before: Scores, after: Scores, baseline: Scores | None) -> None:
        rows = {"LoRA, before training": both_scores(before), "LoRA, after training": both_scores(after)}
        if baseline is not None:
            rows["logistic regression on frozen embeddings"] = both_scores(baseline)
        self.show_scores(f"on the {len(self.test):,} test texts", ("accuracy", "macro-F1"), rows)

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

        return self._agreement("ONNX Runtime", self.predict(forward, self.test, label="ONNX Runtime"), logits)

    def _agreement(self, what: str, computed: torch.Tensor, logits: torch.Tensor) -> PredictionAgreement:
        same = (computed.argmax(1) == logits.argmax(1)).double().mean().item()
        difference = (computed.double() - logits.double()).abs().max().item()
        agreement = PredictionAgreement(same, difference, _TOLERANCE)
        self.console.print(
            f"{what}: {100 * same:.2f} % of the predictions are the same, "
            f"logits differ by at most {difference:.1e} (allowed {agreement.tolerance:.1e})"
        )
        return agreement
