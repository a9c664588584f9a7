"""A process that runs a recipe in forks of itself, which tests kill.

``python -m tests.applications.recipes.recipe_worker FOLDER`` serves jobs (`tests.kit.forks`): ``whole`` runs the recipe
in a folder of its own, ``killed`` in another one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import graftc
from graftc.applications.recipes.tune import Stage
from graftc.runtime.compiled import Compiled
from graftc.testing.families import tiny
from tests.kit.training import adamw
from tests.runtime.training.test_selecting import batches

SPEC: dict[str, Any] = {
    "adapt": [
        {"method": "mask", "entries": 300, "name": "fish", "target": {"role": "ffn.down"}},
        {"method": "lt_sft", "entries": 400, "target": {"role": ["attn.q", "attn.v"]}},
    ],
    "train": ["classifier"],
}
"""A selection by examples, and two trainings."""


def train(compiled: Compiled, stage: Stage) -> None:
    """Do some steps of AdamW with random numbers, and write a file into the stage's folder."""
    assert stage.folder is not None
    optimiser = adamw(compiled, lr=1e-2, weight_decay=0.5)
    for number, batch in enumerate(batches(compiled.compilation.model, 5)):
        optimiser.zero_grad()
        (compiled(**batch).loss * (1 + torch.rand(()))).backward()
        optimiser.step()
        (stage.folder / "steps").write_text(str(number))


def main(folder: Path) -> None:
    """Serve the jobs."""
    from tests.kit.forks import serve

    torch.set_num_threads(1)
    model = tiny("bert")
    examples = batches(model)

    def run(name: str) -> None:
        graftc.tune(SPEC, model, train, examples=examples, folder=folder / name)

    serve({"whole": lambda: run("whole"), "killed": lambda: run("killed")})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
