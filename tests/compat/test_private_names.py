"""Private names of libraries are used in `graftc.compat` only; ruff looks at members of other objects (SLF001)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compat.private_names import ROOT, files, inherited_by, library_names, uses
from tests.compat.probes import PROBES

COVERED = {part for name in PROBES for part in re.findall(r"\b_\w+", name) if not name.startswith("torch.ops.")}
"""The private names that `graftc.compat` uses. Operators are left out: graphs and files name them."""
LIBRARY = library_names() | COVERED


@pytest.mark.slow
def test_no_other_file_uses_a_private_name() -> None:
    paths = [path for file in files("graftc") if (path := file.relative_to(ROOT)).parts[1] != "compat"]
    assert len(paths) > 600
    odd = {
        f"{path}:{use.line}: {use.name}"
        for path in paths
        for use in uses((ROOT / path).read_text(encoding="utf-8"), LIBRARY, inherited=inherited_by(module_of(path)))
    }
    assert odd == set()


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from torch.utils._pytree import tree_map", "_pytree"),
        ("import torch.utils._pytree as pytree", "_pytree"),
        ("from torch.overrides import _push_mode", "_push_mode"),
        ("def f():\n    from torch._dynamo import config", "_dynamo"),
        ("from torch._ops import HigherOrderOperator", "_ops"),
        ("isinstance(x, torch._ops.HigherOrderOperator)", "_ops"),
        ("getattr(config, '_anything', None)", "_anything"),
        ("hasattr(module, f'_{name}_hooks')", "_x_hooks"),
        ("mock.patch.object(torch, '_anything', f)", "_anything"),
        ("attrgetter('a._part')", "_part"),
        ("vars(module)['_parameters']", "_parameters"),
        ("TABLES = ('_buffers', '_modules')", "_buffers"),
        ("config.__dict__.pop('_is_quantized')", "_is_quantized"),
        ("class A(nn.Module):\n    def _apply(self, fn): ...", "_apply"),
        ("class A:\n    def _get_stopping_criteria(self): ...", "_get_stopping_criteria"),
        ("class A(nn.Module):\n    def f(self):\n        return self._modules", "_modules"),
    ],
)
def test_a_planted_use_is_seen(source: str, name: str) -> None:
    assert name in [use.name for use in uses(source, LIBRARY)]


@pytest.mark.parametrize(
    "source",
    [
        "from torch._ops import OpOverload\nisinstance(x, torch._ops.OpOverload)",
        "getattr(tensor, '_graftc_wanted', False)",
        "class A:\n    '''_parameters'''\n    _own = 1\n    '''_modules'''\n    def _f(self):\n        self._own",
        "name.removesuffix('_delta')",
        "getattr(cls, '_fields', ())",
        "sys._getframe(1)",
        "from __future__ import annotations",
        "__slots__ = ('_own',)",
    ],
)
def test_names_of_our_own_are_allowed(source: str) -> None:
    assert list(uses(source, LIBRARY)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "source", "codes"),
    [
        ("graftc/passes/planted.py", "def f(module: object) -> object:\n    return module._parameters\n", ["SLF001"]),
        ("graftc/compat/planted.py", "def f(module: object) -> object:\n    return module._parameters\n", []),
    ],
)
def test_ruff_sees_members_of_other_objects(file: str, source: str, codes: list[str]) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--output-format", "json", "--stdin-filename", file, "-"]
    answer = subprocess.run(command, input=source, capture_output=True, text=True, cwd=ROOT, check=False)
    assert [each["code"] for each in json.loads(answer.stdout)] == codes
