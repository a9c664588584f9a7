"""The parts of the package whose tests are examined, and where their tests are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Area:
    """Files of the package that do one thing.

    Attributes:
        name: what ``--only`` calls it.
        sources: patterns of its files, relative to the root.
        tests: files and folders of the tests that may cover it, relative to the root. Tests that compare digests or the
            text of sources are not among them, as they would notice any change.
    """

    name: str
    sources: tuple[str, ...]
    tests: tuple[str, ...]

    def files(self, root: Path) -> list[str]:
        """Return the paths of its files, relative to the root, sorted; packages' ``__init__`` are left out."""
        paths = {path.relative_to(root).as_posix() for pattern in self.sources for path in root.glob(pattern)}
        return sorted(path for path in paths if not path.endswith("__init__.py"))


AREAS = (
    Area(
        "folds",
        (
            "graftc/compiler/folding/*.py",
            "graftc/passes/core/weights/folds.py",
            "graftc/passes/core/method/folding.py",
            "graftc/passes/graph/remove_folded.py",
            "graftc/runtime/streaming/site_fold.py",
            "graftc/runtime/deploy/fold*.py",
        ),
        (
            "tests/passes/core",
            "tests/compiler",
            "tests/runtime/streaming",
            "tests/runtime/deploy",
            "tests/passes/methods",
        ),
    ),
    Area(
        "roles",
        ("graftc/compiler/roles/*.py", "graftc/specs/roles.py"),
        ("tests/specs/test_roles.py", "tests/compiler"),
    ),
    Area(
        "masks",
        (
            "graftc/passes/core/build/attention.py",
            "graftc/passes/core/build/*masks.py",
            "graftc/passes/core/method/entry_selection.py",
            "graftc/passes/core/ops/magnitude.py",
            "graftc/passes/core/ops/masked_products.py",
            "graftc/passes/core/ops/pruned.py",
            "graftc/passes/methods/bases/sparse.py",
            "graftc/passes/methods/mask.py",
        ),
        ("tests/passes/core", "tests/passes/methods"),
    ),
    Area(
        "lowering",
        ("graftc/passes/lowering/*.py",),
        ("tests/passes/lowering", "tests/passes/core", "tests/compiler", "tests/runtime/activations"),
    ),
    Area(
        "readers",
        (
            "graftc/files/held_folder.py",
            "graftc/files/tensors/*.py",
            "graftc/passes/core/ir/stored/*.py",
            "graftc/runtime/artifact/*.py",
            "graftc/runtime/interop/peft/*.py",
            "graftc/runtime/loading/*.py",
            "graftc/runtime/sources/quantised/**/*.py",
            "graftc/specs/io.py",
            "graftc/specs/strict_json.py",
        ),
        (
            "tests/files",
            "tests/specs/test_io.py",
            "tests/passes/core",
            "tests/runtime/artifact",
            "tests/runtime/interop",
            "tests/runtime/sources",
        ),
    ),
)


def file_of(test: str) -> str:
    """Return the file of a test, given its id."""
    return test.partition("::")[0]


def files_of_tests(root: Path, places: Iterable[str]) -> list[str]:
    """Return the test files at these places, relative to the root, sorted."""
    files: set[Path] = set()
    for place in places:
        path = root / place
        files |= set(path.rglob("test_*.py")) if path.is_dir() else {path}
    return sorted(path.relative_to(root).as_posix() for path in files if path.is_file())
