"""The remaining time is shown once a step takes long, on a terminal only."""

from __future__ import annotations

import pytest

from graftc.cli.output import steps, time_left


def test_it_is_shown_after_two_seconds() -> None:
    now = [0.0]
    shown: list[str] = []
    advance = time_left(shown.append, "folding", clock=lambda: now[0])
    for seconds, done in [(1.0, 0.01), (2.5, 0.1), (2.7, 0.12), (5.0, 0.5), (6.0, 1.0)]:
        now[0] = seconds
        advance(done)
    assert shown == ["folding", "folding, 22 s left", "folding, 5 s left"]
    now[0] = 100.0
    advance(0.01)
    assert shown[-1] == "folding, 165 min left"


@pytest.mark.parametrize("as_json", [True, False])
def test_nothing_is_shown_where_there_is_no_terminal(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with steps(as_json) as step:
        advance = time_left(step, "folding", clock=iter([0.0, 10.0]).__next__)
        advance(0.5)
    assert capsys.readouterr() == ("", "")
