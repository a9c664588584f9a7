"""The whole workflow on a chat model: supervised fine-tuning, compared with PEFT, and deployment."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graftc.applications.demo.chat import topics_of
from graftc.applications.demo.data import Dataset, load_r8
from graftc.applications.demo.decoder import find_decoder
from graftc.applications.demo.generation import BATCH, greedy, onnx_generator
from graftc.applications.demo.stages import RESULT, SEED, Stages, claim, require, size_of
from graftc.applications.demo.training import TrainingRun, score
from graftc.compiler.missing_weights import require_weights
from graftc.files.writing import check_apart
from graftc.records.applications.demo import (
    AllTopicScores,
    DemoTraining,
    ExampleCounts,
    LLMResult,
    TokenAgreement,
    TopicAnswer,
    TopicScores,
)
from graftc.runtime.sources.models import from_checkpoint, quiet_transformers
from graftc.specs.io import parse_spec

if TYPE_CHECKING:
    from graftc.runtime.compiled import Compiled
    from graftc.runtime.deploy.merged import Merged


SPEC = """\
version: 1
adapt:
  - name: topics
    method: lora
    target: {role: [attn.q, attn.k, attn.v, attn.o, ffn.gate, ffn.up, ffn.down]}
    rank: 8
    alpha: 16
"""
"""The spec that the demo compiles."""

_NEW_TOKENS = 12
_EXAMPLE_ANSWERS = 6
_FILES = {
    "spec": "spec.yaml",
    "graph diff": "diff.txt",
    "PEFT adapter": "adapter",
    "artifact": "artifact",
    "transformers folder": "model",
    "onnx": "onnx",
    "page": "demo.md",
    "result": RESULT,
}
_WRITTEN_LAST = (_FILES["page"], _FILES["result"])


@dataclass(frozen=True)
class _Plan:
    steps: int
    batch: int
    lr: float
    test: int
    peft: bool
    checked: int = 8
    tokens: int = 16


_FULL = _Plan(steps=60, batch=8, lr=2e-3, test=200, peft=True)
_QUICK = _Plan(steps=24, batch=8, lr=2e-3, test=64, peft=False)


def run_llm_demo(out: Path, quick: bool = False, console: Console | None = None) -> LLMResult:
    """Tune SmolLM2-135M-Instruct to name the topics of Reuters R8, then fold, certify, save and export it.

    Training uses the model's chat template, and a loss over the answers only. It is repeated with PEFT, with the same
    initial factors and the same batches.

    Args:
        out: a folder that does not exist, is empty, or was written by an earlier demo.
        quick: if true, use fewer steps and test texts, and do not train with PEFT, for a result within four minutes.
        console: the console to print to; by default stdout.

    Raises:
        GraftError: GC062 if the model or the data is missing; GC061 if peft or ONNX Runtime is missing; GC063 if
            ``out`` contains something else.
    """
    plan = _QUICK if quick else _FULL
    console = Console() if console is None else console
    data = load_r8()
    require("onnxruntime", "peft")
    with torch.random.fork_rng(devices=[]), quiet_transformers(), TemporaryDirectory() as start:
        console.print("reading SmolLM2-135M-Instruct, which takes half a minute the first time")
        folder = find_decoder()
        check_apart(out, folder)
        claim(out, _FILES)
        return _LLMDemo(plan, quick, console, out, folder, data).run(Path(start) / "start")


class _LLMDemo(Stages):
    """A run of the demo, with the state shared by its stages."""

    def __init__(self, plan: _Plan, quick: bool, console: Console, out: Path, folder: Path, data: Dataset) -> None:
        from transformers import AutoTokenizer

        super().__init__(console, out)
        self.plan, self.quick, self.folder = plan, quick, folder
        self.topics = topics_of(data, AutoTokenizer.from_pretrained(folder))
        self.training = self.topics.chats(data.train.balanced(plan.steps * plan.batch, SEED))
        self.test = self.topics.chats(data.test.subset(plan.test, SEED))

    def run(self, start: Path) -> LLMResult:
        """Run the demo; ``start`` is the folder for the initial factors, which PEFT reads."""
        plan = self.plan
        self.console.print(
            f"Reuters R8 as conversations: {len(self.training):,} to train on, {len(self.test):,} to test with, "
            f"{len(self.topics.names)} topics; SmolLM2-135M-Instruct"
        )
        self._show_conversation()
        with self.stage("test the untuned model"):
            model = self._model()
            untuned, before = self._scores(model, model)
        with self.stage("compile"):
            compiled = self._compile(model)
            compiled.export(start, format="peft")
        with self.stage(f"train: {plan.steps} steps of {plan.batch}"):
            ours = self._train(compiled)
        with self.stage("fold and certify"):
            merged = compiled.merge()
            self.show_certificate(merged.certificate)
        with self.stage("test the tuned model"):
            tuned, after = self._scores(compiled, compiled)
        peft, apart = self._beside_peft(start, ours) if plan.peft else (None, None)
        self._show_scores(untuned, tuned, peft)
        answers = self._answers(before, after)
        with self.stage("save: PEFT adapter, artifact, transformers folder"):
            compiled.export(self.out / _FILES["PEFT adapter"], format="peft")
            compiled.save(self.out / _FILES["artifact"])
            merged.save(self.out / _FILES["transformers folder"])
        with self.stage("generate the same tokens from every form"):
            same = self._same_tokens(compiled, merged)
        self.stop_the_clock()
        files = {purpose: name for purpose, name in _FILES.items() if name in (*_WRITTEN_LAST, *os.listdir(self.out))}
        result = LLMResult(
            quick=self.quick,
            examples=ExampleCounts(len(self.training), len(self.test)),
            training=DemoTraining(plan.steps, plan.batch, apart),
            scores=AllTopicScores(untuned, tuned, peft),
            answers=answers,
            report=compiled.report,
            certificate=merged.certificate,
            same_tokens=same,
            seconds=self.rounded_seconds,
            files=files,
            bytes={what: size_of(self.out / name) for what, name in files.items() if name not in _WRITTEN_LAST},
            out=str(self.out),
        )
        (self.out / _FILES["page"]).write_text(result.page(), encoding="utf-8")
        self.finish(result)
        self.console.print(f"talk to it: graftc chat {self.out / _FILES['transformers folder']}", markup=False)
        return result

    def _show_conversation(self) -> None:
        """Print one conversation as the model reads it, with the answer highlighted."""
        decode = self.topics.tokenizer.decode
        text = Text(decode(self.training.prompts[0]), style="cyan")
        text.append(decode(self.training.answers[0]), style="bold green")
        self.console.print(text, soft_wrap=True)
        self.console.print("the loss is that of the answer alone, its last line")

    def _model(self) -> Any:
        from transformers import AutoModelForCausalLM

        model = from_checkpoint(AutoModelForCausalLM, self.folder, str(self.folder), dtype=torch.float32)
        require_weights(model)
        return model

    def _scores(self, model: torch.nn.Module, generator: Any) -> tuple[TopicScores, list[str]]:
        """Return a model's scores, by likelihood and by generation, and the generated answers."""
        model.eval()
        topics, tokens = self.topics, torch.tensor(self.topics.tokens)
        likelihoods = self.predict(
            lambda batch: model(**batch).logits[:, -1].log_softmax(-1)[:, tokens],
            self.test,
            label="likelihood",
            size=BATCH,
        )
        with self.progress("answers", len(self.test)) as advance:
            said = greedy(generator, self.test, _NEW_TOKENS, on_batch=advance)
        answers: list[str] = topics.tokenizer.batch_decode(said)
        right = [topics.named_in(a) == label for a, label in zip(answers, self.test.labels, strict=True)]
        likelihood = score(likelihoods.argmax(1).tolist(), self.test.labels, len(topics.names))
        scores = TopicScores(likelihood, sum(right) / len(right))
        self.console.print(
            f"accuracy {100 * likelihood.accuracy:.1f} % by likelihood, {100 * scores.generation:.1f} % by generation"
        )
        return scores, answers

    def _compile(self, model: Any) -> Compiled:
        import graftc

        torch.manual_seed(SEED)
        self.show_spec(SPEC, _FILES["spec"])
        compiled = graftc.compile(parse_spec(SPEC), model, self.training.collate(range(2), labels=False), seed=0)
        (self.out / _FILES["graph diff"]).write_text(compiled.diff(), encoding="utf-8")
        self.show_report(compiled.report)
        return compiled

    def _train(self, model: torch.nn.Module) -> TrainingRun:
        return self.train(model, self.training, steps=self.plan.steps, batch=self.plan.batch, lr=self.plan.lr)

    def _beside_peft(self, start: Path, ours: TrainingRun) -> tuple[TopicScores, float]:
        """Train with PEFT, using the same initial factors and batches; return its scores and the loss difference.

        The loss difference is the largest difference from graftc at any step, relative to the largest loss.
        """
        with self.stage("train with PEFT: same start, same batches"):
            peer = self._in_peft(start, trains=True)
            theirs = self._train(peer)
        with self.stage("test the model tuned with PEFT"):
            scores, _ = self._scores(peer, peer)
        differences = [abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True)]
        apart = max(differences) / max(theirs.losses)
        self.console.print(
            f"losses of the {len(differences)} steps differ by at most {apart:.1e} of the largest; "
            f"training took {ours.seconds:.0f} s, with PEFT {theirs.seconds:.0f} s"
        )
        return scores, apart

    def _in_peft(self, adapter: Path, trains: bool = False) -> Any:
        from peft import PeftModel

        with warnings.catch_warnings():
            # PEFT reads model attributes that transformers is about to remove.
            warnings.simplefilter("ignore", FutureWarning)
            return PeftModel.from_pretrained(self._model(), adapter, is_trainable=trains)

    def _show_scores(self, untuned: TopicScores, tuned: TopicScores, peft: TopicScores | None) -> None:
        rows = {"untuned": untuned, "tuned with graftc": tuned}
        if peft is not None:
            rows["tuned with PEFT"] = peft
        self.show_scores(
            f"accuracy on the {len(self.test):,} test texts",
            ("by likelihood", "by generation", "macro-F1, by likelihood"),
            {name: (*scores.accuracies, scores.likelihood.macro_f1) for name, scores in rows.items()},
        )

    def _answers(self, before: list[str], after: list[str]) -> tuple[TopicAnswer, ...]:
        """Print and return the answers to the first test text of each topic, for at most six topics."""
        names, labels = self.topics.names, self.test.labels
        rows = sorted(labels.index(label) for label in set(labels))[:_EXAMPLE_ANSWERS]
        answers = tuple(TopicAnswer(self.test.texts[i], names[labels[i]], before[i], after[i]) for i in rows)
        table = Table(title="answers", title_justify="left", show_lines=True)
        for column in ("text", "topic", "before", "after"):
            table.add_column(column)
        for answer in answers:
            table.add_row(*map(Text, (answer.text, answer.topic, answer.before, answer.after)))
        self.console.print(table)
        return answers

    def _same_tokens(self, compiled: Compiled, merged: Merged) -> dict[str, TokenAgreement]:
        """Compare the tokens that the compiled model generates with those from each of its other forms."""
        chats = self.test.first(self.plan.checked)
        tokens = self.plan.tokens
        wanted = greedy(compiled.eval(), chats, tokens, least=tokens)
        agreements = {}
        for name, form in self._forms(compiled, merged):
            said = greedy(form, chats, tokens, least=tokens)
            same = sum(a == b for a, b in zip(said, wanted, strict=True))
            agreements[name] = TokenAgreement(len(chats), same, sum(map(len, wanted)))
            self.console.print(f"{name}: the same tokens for {same} of {len(chats)} prompts")
        return agreements

    def _forms(self, compiled: Compiled, merged: Merged) -> Iterator[tuple[str, Any]]:
        from transformers import AutoModelForCausalLM

        import graftc

        yield "merged", merged
        yield (
            "transformers folder, in plain transformers",
            AutoModelForCausalLM.from_pretrained(self.out / _FILES["transformers folder"]),
        )
        yield "artifact, reloaded", graftc.load(self.out / _FILES["artifact"]).eval()
        yield "PEFT adapter, in PEFT", self._in_peft(self.out / _FILES["PEFT adapter"])
        yield "ONNX, in ONNX Runtime", onnx_generator(merged, self.out / _FILES["onnx"])
