"""Statements of an artifact that can be derived from its spec and files, changed and sealed again, are not verified."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import graftc
from graftc.records.verification import Check
from graftc.runtime.artifact.manifest import sealed
from graftc.runtime.artifact.places import RECORD
from graftc.runtime.loading import stated
from graftc.runtime.loading.verify import Verification, verify
from graftc.runtime.streaming.verifying import verify_checkpoint
from graftc.testing import perturb
from tests.kit.folders import adapted_folder, saved_base
from tests.runtime.artifact.support import edit_json, edit_manifest

SPEC = {
    "adapt": [
        {"method": "lora", "name": "low", "rank": 2, "target": {"role": ["attn.q", "ffn.up"]}},
        {"method": "houlsby", "bottleneck": 4},
    ]
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an artifact of it, and the model merged in memory, in part and file by file."""
    folder = tmp_path_factory.mktemp("statements")
    saved_base(folder / "base")
    compiled: Any = graftc.compile(SPEC, graftc.load_base(folder / "base")).eval()
    perturb(compiled)
    compiled.save(folder / "artifact")
    compiled.merge_partially().save(folder / "partly")
    low = adapted_folder(folder / "base")
    low.save(folder / "low")
    low.merge().save(folder / "merged")
    graftc.merge_checkpoint(folder / "low", None, folder / "streamed")
    return folder


@pytest.fixture
def copies(made: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(made, tmp_path / "made"))


def failed(verification: Verification) -> list[Check]:
    return [check for check in verification.checks if check.passed is False]


def place(change: dict[str, Any], chosen: str = "low") -> Callable[[Any], Any]:
    """Return a function that changes the last place of an adaptation."""

    def changed(sites: list[dict[str, Any]]) -> list[dict[str, Any]]:
        last = max(index for index, site in enumerate(sites) if site["adaptation"] == chosen)
        return [{**site, **change} if index == last else site for index, site in enumerate(sites)]

    return changed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sites": place({"method": "dora"})}, "'dora', but in the spec it is 'lora'"),
        ({"sites": place({"adaptation": "none"})}, "it is not there"),
        ({"sites": place({"kind": "norm"})}, "norm (ffn.up), for which the graph has no role"),
        ({"sites": place({"roles": ["ffn.down"]})}, "linear (ffn.down), for which the graph has ffn.up"),
        ({"sites": place({"roles": []})}, "linear (no role), for which the graph has ffn.up"),
        ({"sites": place({"roles": ["attn.sublayer"]}, "houlsby")}, "the graph has ffn.sublayer"),
        ({"kept": [{"name": "other", "reason": "none"}]}, "'other' is not in the spec"),
    ],
)
def test_what_contradicts_spec_or_graphs(changes: dict[str, Any], words: str, copies: Path) -> None:
    """No base is needed for that."""
    edit_manifest(copies / "artifact", **changes)
    (check,) = failed(verify(copies / "artifact", files_only=True))
    assert check.name == "statements" and words in check.detail


@pytest.mark.slow
def test_roles_of_very_large_graphs_are_not_looked_for(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of unknown origin may have values of any size; methods are compared nevertheless."""
    monkeypatch.setattr(stated, "MOST", 10)
    monkeypatch.setattr(stated, "roles_of", None)
    checks = {check.name: check for check in verify(copies / "artifact", files_only=True).checks}
    assert checks["statements"].passed is True and "as in the spec" in checks["statements"].detail
    edit_manifest(copies / "artifact", sites=place({"method": "dora"}))
    (check,) = failed(verify(copies / "artifact", files_only=True))
    assert "'dora', but in the spec it is 'lora'" in check.detail


@pytest.mark.slow
def test_roles_that_cannot_be_found(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise IndexError("on purpose")

    monkeypatch.setattr(stated, "roles_of", fails)
    (check,) = failed(verify(copies / "artifact", files_only=True))
    assert check.name == "statements" and "GC082" in check.detail and "on purpose" in check.detail


@pytest.mark.full
@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"sites": place({"evidence": "none"})}, "places", "evidence of low at bert"),
        ({"sites": place({"layer": 0, "stack": "bert"})}, "places", "layer of low at bert"),
        ({"sites": place({"uses": 7})}, "places", "uses of low"),
        ({"kept": []}, "certificate", "stated not to fold: none; not folding now: houlsby"),
        (
            {"kept": [{"name": "houlsby", "reason": "none"}]},
            "certificate",
            "houlsby is stated not to fold because none",
        ),
    ],
)
def test_what_contradicts_the_model(changes: dict[str, Any], name: str, words: str, copies: Path) -> None:
    edit_manifest(copies / "artifact", **changes)
    (check,) = failed(verify(copies / "artifact", str(copies / "base")))
    assert check.name == name and words in check.detail
    versions = json.loads((copies / "artifact" / "manifest.json").read_text())["versions"]
    if "because" in words:  # other versions and other code may give other reasons, in other words
        for other in ({"torch": "1.0"}, {"code": "0" * 64}):
            edit_manifest(copies / "artifact", versions={**versions, **other})
            verification = verify(copies / "artifact", str(copies / "base"))
            assert not failed(verification) and "(stated: none)" in verification.checks[-1].detail


@pytest.mark.full
def test_unchanged(made: Path) -> None:
    """Everything that was written is verified, with and without the base."""
    for folder in ("artifact", "partly", "low", "merged", "streamed"):
        assert [check.passed for check in verify(made / folder).checks].count(False) == 0
    checks = {check.name: check for check in verify(made / "partly").checks}
    assert checks["certificate of the base"].passed and checks["files of the base"].passed
    (sources,) = (c for c in verify_checkpoint(made / "streamed", made / "low").checks if c.name == "sources")
    assert sources.passed is True
    (sources,) = (c for c in verify_checkpoint(made / "merged", made / "low").checks if c.name == "sources")
    assert sources.passed is None


@pytest.mark.slow
def test_a_figure_that_cannot_be_negative(copies: Path) -> None:
    def negative(certificate: dict[str, Any]) -> None:
        certificate["outputs"] = {name: -value for name, value in certificate["outputs"].items()}

    edit_json(copies / "artifact", "certificates/fold.json", negative)
    (check,) = failed(verify(copies / "artifact", files_only=True))
    assert check.name == "statements" and "GC082" in check.detail and "greater than or equal to 0" in check.detail


@pytest.mark.full
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"more": 1}, "more: unexpected keyword argument"),
        ({"sources": ["here"]}, "sources: unexpected keyword argument"),
        ({"base": "0" * 64}, "names a base other than the certificate's"),
        ({"spec": "version: 1\nadapt: []\n"}, "which is not in its spec"),
        ({"spec": "version: 2\nadapt: []\n"}, "GC007"),
        ({"adapter": {"kind": "artifact", "sha256": "0" * 64}}, "not from this adapter"),
        ({"adapter": {"kind": "peft", "sha256": "0" * 64}}, "contains no config of PEFT"),
        ({"adapter": {"kind": "none", "sha256": "0" * 64}}, "adapter.kind"),
        ({"spec": lambda text: text + "checkpoint: layers\n"}, "its spec is not the adapter's"),
    ],
)
def test_the_record_of_a_merged_folder(changes: dict[str, Any], words: str, copies: Path) -> None:
    file = copies / "streamed" / RECORD
    data = json.loads(file.read_text(encoding="utf-8"))
    data.pop("digest")
    data |= {name: change(data[name]) if callable(change) else change for name, change in changes.items()}
    file.write_text(sealed(data), encoding="utf-8")
    details = [check.detail for check in failed(verify_checkpoint(copies / "streamed", copies / "low"))]
    assert len(details) == 1 and words in details[0]
    if "this adapter" not in words and "the adapter's" not in words:
        assert failed(verify(copies / "streamed"))[0].detail == details[0]
