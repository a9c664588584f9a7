"""From TRL's settings to a compiled model with PEFT's initial values, and back to a folder that PEFT loads."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from graftc.applications.trl.settings import TrlSettings, package
from graftc.runtime.api import compile, import_peft
from graftc.runtime.compiled import Compiled
from graftc.runtime.export.exporting import Exporting, ready_export
from graftc.runtime.export.registry import exporter_of
from graftc.runtime.model.runner import runner_of
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.foreign import is_foreign
from graftc.specs.io import load_spec


def load_as_trl(settings: TrlSettings) -> tuple[Any, Any]:
    """Return the base and its tokenizer or processor, loaded as TRL's trainer would load them.

    The random numbers of the process are seeded first, as by every trainer of TRL: a new head gets the same values.
    """
    from transformers import AutoModelForSequenceClassification, AutoProcessor, AutoTokenizer, set_seed

    create: Any = import_module("trl.trainer.utils").create_model_from_path
    training, name = settings.training, settings.model.model_name_or_path
    options: dict[str, Any] = {"device_map": None, **(training.model_init_kwargs or {})}
    options |= {"trust_remote_code": False, "use_safetensors": True}  # never code from a folder, and never pickles
    words: dict[str, Any] = {"revision": options.get("revision"), "trust_remote_code": False}
    scores = settings.trainer == "reward"
    if settings.trainer in ("grpo", "rloo"):
        words |= {"truncation_side": "left", "padding_side": "left"}
    set_seed(training.seed)
    if scores:
        model = create(name, AutoModelForSequenceClassification, num_labels=1, **options)
    else:
        model = create(name, **options)
    tokenizer = (AutoTokenizer if scores else AutoProcessor).from_pretrained(name, **words)
    if scores:
        _set_padding(model, tokenizer, training)
    return model, tokenizer


def _set_padding(model: Any, tokenizer: Any, training: Any) -> None:
    """Tell a scoring model the padding token that TRL will tell it: its graphs look for the last token of a text."""
    token = getattr(training, "pad_token", None) or tokenizer.pad_token or tokenizer.eos_token
    if token in tokenizer.get_vocab():
        model.config.get_text_config().pad_token_id = tokenizer.convert_tokens_to_ids(token)


def compiled_for(settings: TrlSettings, model: Any) -> Compiled:
    """Return the compiled model: of the spec, or with what PEFT's settings mean.

    PEFT itself draws the initial values of its adapters, at the point and from the seed of TRL's trainers, so that
    training begins where TRL with PEFT begins.

    Raises:
        GraftError: as for `graftc.compile` and `graftc.import_peft`.
    """
    if settings.spec is not None:
        return compile(settings.spec, model, seed=settings.training.seed)
    return adopted(package("peft").get_peft_model(model, package("trl").get_peft_config(settings.model)))


def adopted(adapted: Any) -> Compiled:
    """Return a compiled model that continues from a model of PEFT, whose base it takes over without its adapters.

    Raises:
        GraftError: as for `graftc.import_peft`.
    """
    with tempfile.TemporaryDirectory(prefix="graftc-peft-") as folder:
        adapted.save_pretrained(folder, save_embedding_layers=False)
        return import_peft(folder, adapted.unload())


def require_for_peft(compiled: Compiled) -> None:
    """Check that the adapter can be written for PEFT, before it is trained.

    Raises:
        GraftError: GC115 if it cannot.
    """
    ready_export(Exporting(runner_of(compiled)), exporter_of("peft"), {}, None)


def write_adapter(compiled: Compiled, folder: Path) -> None:
    """Write the adapter for PEFT into a folder that may contain other files, one complete file after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".graftc-", dir=folder) as beside:
        for file in sorted(compiled.export(Path(beside) / "adapter", format="peft").iterdir()):
            os.replace(file, folder / file.name)


def parsed_spec(given: str | Mapping[str, Any]) -> Any:
    """Return a spec that has been read and checked, before a model is loaded.

    Raises:
        GraftError: as for `graftc.specs.io.load_spec`.
    """
    if is_foreign(given):
        raise GraftError("GC200", "the spec is a config of PEFT", hint="use TRL's keys: use_peft: true, lora_r: 8, ...")
    return load_spec(given)
