"""A model's checks of its input values also apply to its graphs: a call that the source refuses is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graftc
from graftc.testing import perturb
from tests.zoo.model import IMAGE
from tests.zoo.vision_language import llava

SPEC: dict[str, Any] = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "**.up"}}]}


class Counting(nn.Module):
    """A model that puts features into a text, one for each mark, and checks that the numbers agree."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(20, 8), nn.Linear(6, 8)

    def forward(self, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        marks = ids == 7
        torch._check_tensor_all(
            marks.sum().to(features.device, torch.int64) == features.shape[0] * features.shape[1],
            lambda: "marks and features differ, so",
        )
        mask = marks[..., None].expand(-1, -1, 8)
        return self.embed(ids).masked_scatter(mask, self.up(features).flatten(0, 1))


def call(rows: int, marks: int, features: int, length: int = 9) -> dict[str, torch.Tensor]:
    ids = torch.randint(8, 20, (rows, length), generator=torch.Generator().manual_seed(rows))
    ids[:, :marks] = 7
    return {"ids": ids, "features": torch.randn(rows, features, 6, generator=torch.Generator().manual_seed(1))}


def test_a_call_that_the_source_refuses_is_refused_and_others_run() -> None:
    torch.manual_seed(0)
    model = Counting().eval()
    compiled = graftc.compile(SPEC, model, call(2, 3, 3), cache=False).eval()
    for shape in [(2, 3, 3), (3, 4, 4), (1, 5, 5), (4, 2, 2)]:
        given = call(*shape)
        assert torch.equal(compiled(**given), model(**given))
    for shape in [(2, 2, 3), (3, 1, 4), (1, 4, 5)]:  # fewer marks than features would run, with wrong results
        given = call(*shape)
        with pytest.raises(Exception, match="marks and features differ"):
            model(**given)
        for training in (True, False):
            with pytest.raises(graftc.GraftError, match=r"GC145: .*marks and features differ \(test_input_checks.py"):
                compiled.train(training)(**given)


@pytest.mark.slow
def test_it_holds_after_merging_and_saving(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Counting().eval()
    compiled = graftc.compile(SPEC, model, call(2, 3, 3), cache=False).eval()
    perturb(compiled)
    good, bad = call(3, 2, 2), call(3, 1, 2)
    compiled.save(tmp_path / "saved")
    for each in (compiled.merge(), graftc.load(tmp_path / "saved", model)):
        assert torch.allclose(each(**good), compiled(**good), atol=1e-6)
        with pytest.raises(graftc.GraftError, match="GC145"):
            each(**bad)


@pytest.mark.slow
def test_image_tokens_that_do_not_match_the_images_are_refused() -> None:
    small = llava()
    unread = "**.vision_tower.encoder.layers.2.**"  # only newer releases of transformers return its values
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": small.fallback, "exclude": unread}}]}
    compiled = graftc.compile(spec, small.model, small.first, cache=False).eval()
    for batch in (small.first, small.second):
        ids = batch["input_ids"].clone()
        row, column = (ids == IMAGE).nonzero()[0].tolist()
        ids[row, column] = 9
        assert torch.equal(compiled(**batch).logits, small.model(**batch).logits)
        for model in (small.model, compiled):
            with pytest.raises(Exception, match="Image features and image tokens do not match"):
                model(**{**batch, "input_ids": ids})
