"""A plugin for axolotl, ``graftc.axolotl.GraftcPlugin``, with which ``adapter: graftc`` trains a compiled model.

axolotl asks its plugins for adapters that it does not have itself. With axolotl's own LoRA settings, axolotl creates
the adapter as for ``adapter: lora``, and the compiled model continues from it; with ``graftc_spec`` the spec says what
trains. Only this module imports axolotl, and nothing of graftc imports this module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.loaders.adapter import load_lora
from pydantic import BaseModel, Field

from graftc.applications.trl.adapting import adopted, parsed_spec, require_for_peft, write_adapter
from graftc.applications.trl.refusals import unsupported
from graftc.files.destinations import check_destination
from graftc.runtime.api import compile
from graftc.runtime.artifact.places import is_ours
from graftc.runtime.compiled import Compiled
from graftc.specs.errors.diagnostics import GraftError

ADAPTER = "graftc"

_INSTEAD = {
    "rl": "train with graftc trl dpo, kto, grpo or rloo",
    "reward_model": "train with graftc trl reward",
    "load_in_4bit": "load the base in full precision, or give a spec with quantize: nf4 (graftc_spec)",
    "load_in_8bit": "load the base in full precision, or give a spec with quantize: int8 (graftc_spec)",
    "gptq": "load the base in full precision",
    "lora_model_dir": "graftc import-peft reads the folder",
    "relora": "leave it out",
    "qat": "leave it out",
    "lora_mlp_kernel": "leave it out: the graphs have kernels of their own",
    "lora_qkv_kernel": "leave it out: the graphs have kernels of their own",
    "lora_o_kernel": "leave it out: the graphs have kernels of their own",
    "unfrozen_parameters": "give a spec with train: [...] (graftc_spec)",
    "deepspeed": "train in one process",
    "fsdp": "train in one process",
    "fsdp_config": "train in one process",
}
"""Keys of axolotl that a compiled model cannot honour, each with the alternative."""


class GraftcArgs(BaseModel):
    """The keys that a config of axolotl may have for graftc."""

    graftc_spec: str | dict[str, Any] | None = Field(
        default=None, description="A graftc spec in place of the lora_ keys: its file, or the spec itself."
    )
    graftc_artifact: str | None = Field(
        default=None, description="The folder to create for the artifact of the trained model."
    )


class GraftcPlugin(BasePlugin):  # type: ignore[misc]
    """The plugin; name it in ``plugins``, and set ``adapter: graftc``.

    At the end, ``output_dir`` contains an adapter that PEFT loads, unless PEFT cannot express the spec, and the folder
    that ``save_pretrained`` of the compiled model writes.
    """

    def register(self, cfg: dict[str, Any]) -> None:
        """Check the config before anything is loaded.

        Raises:
            GraftError: GC072 for a key that cannot be honoured, GC063 for an artifact that exists; as
                `graftc.specs.io.load_spec` for a spec.
        """
        if cfg.get("adapter") != ADAPTER:
            return
        for key, instead in _INSTEAD.items():
            if value := cfg.get(key):
                raise unsupported(f"axolotl's {key}: {value}", instead)
        if cfg.get("gradient_checkpointing"):
            options = cfg.get("gradient_checkpointing_kwargs") or {}
            if options.get("use_reentrant"):
                raise unsupported("use_reentrant: true", "gradient_checkpointing_kwargs: {use_reentrant: false}")
            cfg["gradient_checkpointing_kwargs"] = {**options, "use_reentrant": False}  # axolotl's default is true
        if (spec := cfg.get("graftc_spec")) is not None:
            parsed_spec(spec)
        if (artifact := cfg.get("graftc_artifact")) is not None:
            check_destination(Path(artifact), replaceable=is_ours)

    def get_input_args(self) -> str:
        """Return where axolotl finds the keys of a config."""
        return f"{GraftcArgs.__module__}.{GraftcArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Return the adapter's name."""
        return [AdapterCapabilities(name=ADAPTER)]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Compiled, None] | None:
        """Return the compiled model; None if the config asks for another adapter.

        Raises:
            GraftError: GC072 for inference; as for `graftc.compile` and `graftc.import_peft`; GC115 for a spec that
                PEFT cannot express, if no artifact is to be written.
        """
        if cfg.adapter != ADAPTER:
            return None
        if inference or config_only:
            hint = "load output_dir with adapter: lora, or with graftc"
            raise GraftError("GC072", "axolotl's inference does not load compiled models", hint=hint)
        model.disable_input_require_grads()  # axolotl has put a hook on the embeddings, for PEFT's checkpointing
        if cfg.graftc_spec is not None:
            compiled = compile(_plain(cfg.graftc_spec), model, seed=cfg.seed)
        else:
            compiled = adopted(load_lora(model, cfg)[0])
        if cfg.graftc_artifact is None:
            require_for_peft(compiled)
        return compiled, None

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """Return the callback that steers methods which change while they train."""
        return [model.callback()] if isinstance(model, Compiled) else []

    def post_train(self, cfg: Any, model: Any) -> None:
        """Write the adapter for PEFT into ``output_dir``, and the artifact."""
        if not isinstance(model, Compiled):
            return
        model.eval()
        if cfg.graftc_artifact is not None:
            # axolotl calls this more than once; anything else at this path was refused at the start.
            model.save(cfg.graftc_artifact, force=True)
            try:
                require_for_peft(model)
            except GraftError:
                return  # the artifact contains everything
        write_adapter(model, Path(cfg.output_dir))


def _plain(spec: Any) -> Any:
    """Return a spec without axolotl's own kind of mapping."""
    return spec if isinstance(spec, str) else spec.to_dict()
