"""Importing `graftc.specs` is fast and never imports torch, however much of the package is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import graftc.specs


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


def test_the_import_is_quick() -> None:
    code = "import time; t = time.perf_counter(); import graftc.specs; print(time.perf_counter() - t)"
    best = min(float(run(code)) for _ in range(3))
    assert best < 0.3


@pytest.mark.slow
def test_nothing_in_specs_imports_torch() -> None:
    code = (
        "import pkgutil, importlib, sys, graftc.specs as s\n"
        "for m in pkgutil.iter_modules(s.__path__): importlib.import_module('graftc.specs.' + m.name)\n"
        "s.parse_spec('adapt: [{method: lora, target: {role: attn.q}}]')\n"
        "s.Spec.model_json_schema(), [getattr(s, n) for n in s.__all__]\n"
        "import graftc.compiler.resolve.select\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'networkx'} & set(sys.modules)))"
    )
    assert run(code) == "[]"


@pytest.mark.slow
def test_names_load_when_first_used() -> None:
    assert run("import sys, graftc.specs; print('pydantic' in sys.modules)") == "False"
    assert run("from graftc.specs import LoRA, LoRAOverride; print(LoRA.__name__, LoRAOverride.__name__)") == (
        "LoRA LoRAOverride"
    )


def test_every_public_name_exists() -> None:
    assert len(set(graftc.specs.__all__)) == len(graftc.specs.__all__)
    for name in graftc.specs.__all__:
        assert getattr(graftc.specs, name) is not None
        assert name in dir(graftc.specs)


@pytest.mark.parametrize("name", ["Nothing", "nothing", "_nothing"])
def test_other_names_do_not(name: str) -> None:
    with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
        getattr(graftc.specs, name)
