"""The public names: of the package, of the modules for writing methods, and of a compiled model."""

from __future__ import annotations

import subprocess
import sys
from types import FunctionType

import pytest
from torch import nn

import graftc
import graftc.extend
import graftc.testing
from graftc.runtime.compiled import Compiled
from graftc.runtime.model.runner import Published
from tests.kit.places import EXAMPLES

PACKAGE = """
    AdapterPool Certificate Compiled GraftError GraftWarning MemoryPlan Merged Report Selection ServingCertificate
    ServingPlan Spec TrainingLog __version__ check compile extend import_peft load load_base
    load_spec merge_checkpoint methods optim pet plan read_log roles select serve_check serve_plan share_base sweep
    testing tune
"""

COMPILED = """
    activate adapter_state_dict advance after_step begin callback disabled explain export extra_loss full_state_dict
    load_adapter_state_dict merge merge_partially merged_state_dict reference report save select train_only
"""
"""Names that are graftc's whatever the children of a source model are called: at most 20."""


def test_the_package_has_these_names_and_shows_no_others() -> None:
    assert sorted(graftc.__all__) == sorted(PACKAGE.split()) == dir(graftc)
    assert all(getattr(graftc, name) is not None for name in graftc.__all__)


def test_a_compiled_model_keeps_at_most_twenty_names() -> None:
    kinds = Published | property | FunctionType
    own = {n for n, v in vars(Compiled).items() if isinstance(v, kinds) and not n.startswith("_")} - set(dir(nn.Module))
    assert own == set(COMPILED.split()) and len(own) <= 20


@pytest.mark.parametrize("module", [graftc.extend, graftc.testing], ids=["extend", "testing"])
def test_every_public_name_is_there_and_documented(module: object) -> None:
    names = module.__all__  # type: ignore[attr-defined]
    assert len(names) == len(set(names))
    for name in names:
        value = getattr(module, name)
        assert value is not None
        if callable(value) and getattr(value, "__module__", "").startswith("graftc"):
            assert value.__doc__, name


@pytest.mark.slow
def test_a_module_of_specs_loads_no_torch() -> None:
    code = (
        "import sys; from graftc.extend import Claims, MethodSpec, Override, Target; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_example_imports_nothing_else() -> None:
    folder = EXAMPLES / "plugin"
    lines = [line.strip() for file in folder.rglob("*.py") for line in file.read_text(encoding="utf-8").splitlines()]
    imports = {line.split()[1] for line in lines if line.startswith(("from graftc.", "import graftc."))}
    assert imports == {"graftc.extend", "graftc.testing"}
