"""The forms that graftc writes for the engines: one function for each, whatever the method.

The forms of a case, the tokens that they must give, and the refusals are kept in a folder, which a later run reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

import graftc
from graftc.applications.demo.decoder import find_decoder, load_decoder
from graftc.runtime.export.formats.gguf import FileType
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb
from tools.serving.methods import PROMPTS, TOKENS, Case

LARGEST_ERROR = 0.05
"""The largest error of a conversion to LoRA: a map's update, relative to its norm."""


def base_files(work: Path, layers: int | None) -> Path:
    """Return a folder with SmolLM2 in float32, cut to some layers; beside it are GGUF files of it.

    mistral.rs looks for ``rope_theta`` at the top level of config.json, where transformers 5 no longer writes it.
    """
    from transformers import AutoTokenizer

    folder = work / "base"
    if not (folder / "config.json").is_file():
        load_decoder(layers).save_pretrained(folder)
        AutoTokenizer.from_pretrained(find_decoder()).save_pretrained(folder)
        _name_theta(folder)
    files: dict[FileType, Path] = {"f32": work / "base.gguf", "f16": work / "base-f16.gguf"}
    if not all(file.is_file() for file in files.values()):
        untrained = {"adapt": [{"method": "lora", "target": {"role": "attn.q"}}]}
        merged = graftc.compile(untrained, load(folder)).merge(allow_unchanged=True)
        for dtype, file in files.items():
            merged.export(file, format="gguf", dtype=dtype, force=True)
    return folder


def _name_theta(folder: Path) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "rope_theta": config["rope_parameters"]["rope_theta"]}, indent=2))


def load(folder: Path) -> Any:
    """Return a folder's model."""
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(folder)
    return model.eval()


@cache
def prompts(base: Path) -> tuple[tuple[int, ...], ...]:
    """Return the prompts as tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    return tuple(tuple(tokenizer(text).input_ids) for text in PROMPTS)


def greedy(model: Any, given: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return what transformers' loop generates from prompts of one length."""
    ids = torch.tensor(given)
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    found: list[list[int]] = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options).tolist()
    return [row[-TOKENS:] for row in found]


@cache
def plain_tokens(base: Path) -> list[list[int]]:
    """Return what transformers generates from the base."""
    return greedy(load(base), prompts(base))


class Forms:
    """A case in every form in which it can be written.

    Each form is made when it is first asked for, as ``folder / name``; what it is, or why it is refused, is in
    ``name.json`` there, so that a later run finds it.
    """

    def __init__(self, work: Path, base: Path, case: Case, seed: int = 0) -> None:
        self.folder, self.base, self.case, self.seed = work, base, case, seed
        work.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> dict[str, Any]:
        """Return a form: its ``path`` or its ``refusal``, and what else is known of it."""
        known = self.folder / f"{name}.json"
        if not known.is_file():
            try:
                made = _MAKERS[name](self, self.folder / name)
            except GraftError as error:
                made = {"refusal": refusal(error)}
            known.write_text(json.dumps(made, indent=1))
        return dict(json.loads(known.read_text()))

    @property
    def compiled(self) -> Any:
        """The adapted model."""
        if not hasattr(self, "_compiled"):
            self._compiled = graftc.compile(self.case.spec, load(self.base), seed=0).eval()
            perturb(self._compiled, self.case.noise, self.seed)
        return self._compiled

    @property
    def merged(self) -> Any:
        """The merged model."""
        if not hasattr(self, "_merged"):
            self._merged = self.compiled.merge()
        return self._merged

    @property
    def converted(self) -> Any:
        """The model with LoRA in the place of the method."""
        if not hasattr(self, "_converted"):
            self._converted = self.compiled.convert(error=LARGEST_ERROR)
        return self._converted


def refusal(error: GraftError) -> dict[str, str]:
    """Return an error as data: its code, what it says, and the way out."""
    return {"code": error.code, "message": error.message, "way_out": str(error.hint)}


def _adapted(forms: Forms, path: Path) -> dict[str, Any]:
    """Return the tokens of the adapted model, as graftc computes them in torch."""
    del path
    return {"tokens": greedy(forms.compiled, prompts(forms.base))}


def _artifact(forms: Forms, path: Path) -> dict[str, Any]:
    forms.compiled.save(path, force=True)
    return {"path": str(path)}


def _as_lora(forms: Forms, path: Path) -> dict[str, Any]:
    """Return the tokens of the converted model, and its distance from the original."""
    del path
    ranks = [site.rank for site in forms.converted.sites]
    found = {"error": forms.converted.largest_error, "rank": max(ranks)}
    return {"tokens": greedy(forms.converted.compiled, prompts(forms.base)), **found}


def _peft(model: Callable[[Forms], Any], server: str) -> Callable[[Forms, Path], dict[str, Any]]:
    """Return what writes a PEFT folder for a server, with the tokens that PEFT itself generates from it."""

    def make(forms: Forms, path: Path) -> dict[str, Any]:
        from peft import PeftModel

        model(forms).export(path, format="peft", server=server)
        read = PeftModel.from_pretrained(load(forms.base), path).eval()
        return {"path": str(path), "rank": _largest_rank(path), "tokens": greedy(read, prompts(forms.base))}

    return make


def _lora_file(forms: Forms, path: Path) -> dict[str, Any]:
    """Return the factors alone, as a file, which OpenVINO reads."""
    del path
    folder = forms.get("peft-vllm")
    return folder if "refusal" in folder else {**folder, "path": f"{folder['path']}/adapter_model.safetensors"}


def _largest_rank(folder: Path) -> int:
    config = json.loads((folder / "adapter_config.json").read_text())
    return int(max([config["r"], *(config.get("rank_pattern") or {}).values()]))


def _exported(
    model: Callable[[Forms], Any], suffix: str, format: str, **options: Any
) -> Callable[[Forms, Path], dict[str, Any]]:
    def make(forms: Forms, path: Path) -> dict[str, Any]:
        file = path.with_suffix(suffix)
        model(forms).export(file, format=format, **options)
        return {"path": str(file)}

    return make


def _merged_folder(forms: Forms, path: Path) -> dict[str, Any]:
    forms.merged.save(path)
    _name_theta(path)
    return {"path": str(path), "tokens": greedy(load(path), prompts(forms.base))}


def _merged_half(forms: Forms, path: Path) -> dict[str, Any]:
    """Return the merged model with matrices in float16, and what transformers generates with these numbers."""
    made = _exported(_of_merged, ".gguf", "gguf", dtype="f16")(forms, path)
    model = forms.merged.to_transformers()
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() > 1:
                tensor.copy_(tensor.half().float())
    return {**made, "tokens": greedy(model.eval(), prompts(forms.base))}


def _of_adapted(forms: Forms) -> Any:
    return forms.compiled


def _of_converted(forms: Forms) -> Any:
    return forms.converted.compiled


def _of_merged(forms: Forms) -> Any:
    return forms.merged


_MAKERS: dict[str, Callable[[Forms, Path], dict[str, Any]]] = {
    "adapted": _adapted,
    "artifact": _artifact,
    "peft-vllm": _peft(_of_adapted, "vllm"),
    "peft-mistralrs": _peft(_of_adapted, "mistralrs"),
    "gguf-adapter": _exported(_of_adapted, ".gguf", "gguf"),
    "onnx": _exported(_of_adapted, "", "onnx-generate"),
    "merged-onnx": _exported(_of_merged, "", "onnx-generate"),
    "as-lora": _as_lora,
    "lora-peft-vllm": _peft(_of_converted, "vllm"),
    "lora-peft-mistralrs": _peft(_of_converted, "mistralrs"),
    "lora-gguf-adapter": _exported(_of_converted, ".gguf", "gguf"),
    "lora-file": _lora_file,
    "merged-folder": _merged_folder,
    "merged-gguf": _exported(_of_merged, ".gguf", "gguf"),
    "merged-gguf-f16": _merged_half,
}
