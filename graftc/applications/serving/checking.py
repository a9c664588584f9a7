"""Check whether an engine serves a folder as it is meant, and compare it with what the engine computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from graftc.applications.serving.adapters import Replay, replayed
from graftc.applications.serving.bases import ServedBase
from graftc.applications.serving.comparing import compared, failure
from graftc.applications.serving.folders import (
    GENAI,
    added_token_problems,
    field_problems,
    folder_problems,
    genai_problems,
    require_folder,
)
from graftc.applications.serving.gguf_files import GgufContent, replayed_gguf
from graftc.files.tensors.weights import INDEX, SINGLE
from graftc.records.serving.certificates import ServingCertificate, ServingProblem
from graftc.runtime.interop.peft.folder import WEIGHTS, adapter_tensors
from graftc.runtime.onnx_generation.io_names import DECODER, PAIR
from graftc.runtime.serving.engines import FORMS, Engine, Form, engine_of
from graftc.runtime.serving.limits import gguf_problems, largest_rank
from graftc.runtime.sources.models import local_config
from graftc.specs.errors.arguments import as_path
from graftc.specs.errors.calls import public
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.foreign.config import CONFIG, MOST, config_bytes, lora_fields, parsed_config
from graftc.specs.strict_json import read_json


@public("graftc.serve_check")
def serve_check(
    folder: str | Path,
    engine: str,
    *,
    base: str | Path | None = None,
    run: bool = False,
    python: str | Path | None = None,
    step: Callable[[str], None] = lambda _: None,
) -> ServingCertificate:
    """State whether an engine computes what a folder means: every tensor, its scale, and every problem.

    How the engine maps names and works out scales is replayed from the table in `graftc.runtime.serving.engines`; the
    engine itself is needed only with ``run``.

    Args:
        folder: a PEFT folder, a LoRA adapter in GGUF, a model folder, a model in GGUF, or a folder of
            ``onnx-generate``.
        engine: the engine's name.
        base: the folder of the base, for adapters; by default the one that ``adapter_config.json`` names.
        run: whether to run the installed engine, and compare the tokens that it generates with graftc's.
        python: with ``run``, the interpreter of an environment in which the engine is installed.
        step: a function to call with the name of each step.

    Raises:
        GraftError: GC068 for an unknown engine; GC069 without an adapter's base; GC110 to GC113 for files that cannot
            be read; with ``run``, GC061 if the engine is not installed, GC073 if graftc cannot run it, and as in
            `graftc.import_peft` for an adapter that graftc cannot compute.
    """
    path, row = as_path(folder), engine_of(engine)
    step("reading")
    require_folder(path)
    content = GgufContent.of(path) if path.is_file() else None
    form, own, needs, max_rank = _form_of(path, content), None, None, None
    if form not in row.forms:
        replay = Replay(problems=[_other_form(row, form)])
    elif form == "peft":
        config = _adapter_config(path)
        own = _base(base if base is not None else config.get("base_model_name_or_path") or None, path)
        replay = replayed(row, config, adapter_tensors(path / WEIGHTS), own)
        replay.problems += [*added_token_problems(row, path, own), *field_problems(row, own.config, own.folder)]
        max_rank = row.rank_for(largest_rank(config))
        needs = row.option_for(max_rank)
    elif content is not None and content.is_adapter:
        own = _base(base, path)
        replay = replayed_gguf(row, content, own)
    elif content is not None:
        replay = Replay(problems=list(gguf_problems(row, content.architecture, content.matrices, content.shapes)))
    else:
        replay = Replay(problems=list((folder_problems if form == "model" else genai_problems)(row, path)))
    result = None
    if run and form in row.forms:
        step("running the engine")
        try:
            result = compared(
                row, form, path, own, max_rank=max_rank, python=None if python is None else as_path(python)
            )
        except GraftError as error:
            if error.code != "GC079":
                raise
            replay.problems.append(ServingProblem("refused", row.name, failure(error), ""))
    return ServingCertificate(
        engine=row.name,
        read=row.read,
        read_on=row.read_on,
        form=form,
        base=None if own is None else str(own.folder),
        tensors=tuple(replay.tensors),
        sites=tuple(replay.sites),
        problems=tuple(replay.problems),
        needs=needs,
        run=result,
    )


def _form_of(path: Path, content: GgufContent | None) -> Form:
    """Return what a folder is, or a file with this content.

    Raises:
        GraftError: GC110 if it is nothing that an engine loads.
    """
    if content is not None:
        return "gguf-adapter" if content.is_adapter else "gguf-model"
    whole = any((path / name).is_file() for name in (SINGLE, INDEX))
    graphs = () if whole else (DECODER, *PAIR)
    names: tuple[tuple[str, Form], ...] = (
        *((GENAI, "onnx-generate"), (CONFIG, "peft")),
        *((name, "onnx-generate") for name in graphs),
        ("config.json", "model"),
    )
    form = next((form for name, form in names if (path / name).is_file()), None)
    form = "model" if form == "peft" and whole and (path / "config.json").is_file() else form
    if form is None:
        raise GraftError("GC110", f"{path} is neither {' nor '.join(FORMS.values())}", place=Place(str(path)))
    return form


def _other_form(engine: Engine, form: Form) -> ServingProblem:
    reason = f"{engine.title} does not load {FORMS[form]}, but {' or '.join(FORMS[own] for own in engine.forms)}"
    remedy = {"llama.cpp": "graftc convert --to gguf --model BASE writes an adapter"} if form == "peft" else {}
    return ServingProblem("refused", form, reason, remedy.get(engine.name, "merge it and export that: graftc export"))


def _adapter_config(folder: Path) -> dict[str, Any]:
    raw = config_bytes(folder / CONFIG)
    kind = parsed_config(raw, str(folder / CONFIG)).peft_type
    config: dict[str, Any] = dict(read_json(raw, MOST))
    if kind == "LORA":
        lora_fields(config, str(folder / CONFIG))
    return config


def _base(given: Any, adapter: Path) -> ServedBase:
    folder = as_path(given) if given is not None else None
    if folder is not None and not (folder / "config.json").is_file():
        folder = local_config(str(given))
    if folder is None:
        names_none = "a GGUF file names none" if adapter.is_file() else "its base_model_name_or_path names none"
        lack = names_none if given is None else f"{given} is not on this machine"
        message = f"the base of {adapter} is needed, and {lack}"
        raise GraftError("GC069", message, place=Place(str(adapter)), hint="name its folder: --base DIR")
    return ServedBase.of(folder)
