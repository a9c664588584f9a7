"""The comparison of routers' scores in two runs."""

from __future__ import annotations

import torch

from graftc.compiler.folding.route_evidence import RouteChoice, moved


def test_only_scores_of_both_runs_are_compared() -> None:
    """A router that one run lacks, or whose scores have another shape in it, has no difference."""

    def choice(scores: torch.Tensor) -> RouteChoice:
        return RouteChoice(scores, scores.topk(1).indices)

    scores = torch.arange(6.0).view(2, 3)
    before = {name: choice(scores) for name in ("same", "moved", "other shape", "first only")}
    after = {"same": choice(scores), "moved": choice(scores + torch.tensor([0.0, 0.25, -0.5]))}
    after |= {"other shape": choice(scores[:1]), "second only": choice(scores)}
    assert moved(before, after) == {"same": 0.0, "moved": 0.5}
