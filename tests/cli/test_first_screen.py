"""The first output of a process is graftc's own, without messages of unused libraries that transformers imports."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from graftc.compiler import quiet
from graftc.compiler.quiet import quiet_quantisers, tell
from tests.kit.folders import SPEC, saved_artifact
from tests.kit.places import ROOT

_UNUSED = "{'peft', 'bitsandbytes', 'kernels'} & set(sys.modules)"
_COMMANDS = f"""
import sys
from graftc.cli import main
print([main(command.split()) for command in sys.argv[1:]], {_UNUSED})
"""
_SNIPPET = f"""
import sys, graftc, graftc.testing
graftc.compile(sys.argv[1], graftc.testing.tiny("llama"))
print([0], {_UNUSED})
"""
_LORA = {"version": 1, "adapt": [{"name": "a", "method": "lora", "target": {"role": "attn.q"}, "rank": 2}]}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two specs, a base and an artifact of it."""
    folder = tmp_path_factory.mktemp("screen")
    (folder / "spec.yaml").write_text(yaml.safe_dump(SPEC), encoding="utf-8")
    (folder / "lora.yaml").write_text(yaml.safe_dump(_LORA), encoding="utf-8")
    saved_artifact(folder)
    return folder


@pytest.mark.full
@pytest.mark.parametrize(
    ("code", "arguments", "statuses"),
    [
        pytest.param(
            _COMMANDS,
            ["check spec.yaml -m base", "compile spec.yaml -m base -o made", "roles base"],
            "[0, 0, 0]",
            id="commands",
        ),
        pytest.param(_COMMANDS, ["check lora.yaml -m graftc.testing.families:bert"], "[0]", id="callable"),
        pytest.param(_COMMANDS, ["card artifact"], "[0]", id="card"),
        pytest.param(_SNIPPET, ["lora.yaml"], "[0]", id="python"),
    ],
)
def test_standard_error_is_empty(here: Path, code: str, arguments: list[str], statuses: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, env=env, timeout=120)
    assert (done.stderr, done.stdout.splitlines()[-1]) == ("", f"{statuses} set()")


class TestWhatIsHeard:
    """Log messages while transformers imports its quantisers, and at other times."""

    @pytest.fixture(autouse=True)
    def _nothing_held(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(quiet, "_withheld", [])
        yield

    @pytest.mark.parametrize("name", ["torchao", "torchao.kernel", "torch.utils._pytree", "bitsandbytes.cextension"])
    def test_what_libraries_say_at_their_import_is_held_back(self, name: str, caplog: pytest.LogCaptureFixture) -> None:
        with quiet_quantisers(), quiet_quantisers():
            _imported("transformers.quantizers", name, "warning")
        assert caplog.messages == []
        for _ in range(2):
            tell(name.partition(".")[0])
        assert caplog.messages == ["said"]

    @pytest.mark.parametrize(
        ("importing", "name", "level"),
        [
            ("transformers.quantizers", "torchao", "error"),
            ("transformers.quantizers", "transformers.utils", "warning"),
            ("users.module", "torchao", "warning"),
            ("users.module", "users.module", "warning"),
        ],
    )
    def test_the_rest_is_heard(
        self, importing: str, name: str, level: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        with quiet_quantisers():
            _imported(importing, name, level)
        assert set(caplog.messages) == {"said"}

    def test_other_threads_and_what_comes_later_are_heard(self, caplog: pytest.LogCaptureFixture) -> None:
        with quiet_quantisers():
            other = threading.Thread(target=logging.getLogger("torchao").warning, args=("other",))
            exec(
                compile("other.start(); other.join()", "quantizers", "exec"),
                {"__name__": "transformers.quantizers", "other": other},
            )
        _imported("transformers.quantizers", "torchao", "warning")
        assert caplog.messages == ["other", "said"]


def _imported(module: str, logger: str, level: str) -> None:
    """Run code as a module of this name that logs a message."""
    code = f"import logging; logging.getLogger({logger!r}).{level}('said')"
    exec(compile(code, module, "exec"), {"__name__": module})
