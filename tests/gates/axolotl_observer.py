"""A plugin of axolotl that seeds the adapter's initial values, which axolotl does not, and writes down the losses.

Only axolotl's interpreter imports it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin


class Plugin(BasePlugin):  # type: ignore[misc]
    """The plugin."""

    trainer: Any = None

    def pre_lora_load(self, cfg: Any, model: Any) -> None:
        torch.manual_seed(0)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        self.trainer = trainer

    def post_train(self, cfg: Any, model: Any) -> None:
        losses = [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]
        (Path(cfg.output_dir) / "losses.json").write_text(json.dumps(losses), encoding="utf-8")
