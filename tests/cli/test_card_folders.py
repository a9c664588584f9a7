"""``graftc card`` for merged models and PEFT adapters: what it says is in the files, its code runs, and files stay."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file

from graftc.runtime.card.base_license import license_of
from graftc.runtime.card.metadata import is_transformers_class
from graftc.runtime.card.peft import _TASKS, base_of
from graftc.runtime.sources.reference import Reference
from graftc.specs.foreign.config import parsed_config
from tests.cli.support import run_here, run_valid
from tests.kit.folders import adapted_folder, saved_base, tree_bytes
from tests.kit.markdown import tokens_of

pytestmark = pytest.mark.slow

SPEC = {"adapt": [{"method": "lora", "target": {"role": ["attn.q", "ffn.down"]}, "rank": 3}], "train": ["lm_head"]}
KINDS = ["merged", "streamed", "adapter"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an adapter in PEFT's format, and two merged models: from memory, and from the adapter."""
    from graftc.runtime.streaming.merging import merge_checkpoint

    path = tmp_path_factory.mktemp("cards")
    compiled = adapted_folder(saved_base(path / "base", "llama"), SPEC)
    compiled.merge().save(path / "merged")
    compiled.export(path / "adapter", format="peft")
    merge_checkpoint(path / "adapter", path / "base", path / "streamed")
    return path


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working folder."""
    for file, content in tree_bytes(made).items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def metadata_of(path: Path) -> Any:
    """Return a card's metadata as the hub's own library reads it."""
    return ModelCard.load(path).data.to_dict()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"r": 8}, "the config's rank is 8"), ({"use_dora": True}, "lora_magnitude_vector: required by the config")],
)
def test_a_config_that_the_tensors_contradict(
    fields: Any, named: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A card repeats the config, so what it says must be true of the file."""
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields, "rank_pattern": {}}))
    error = run_valid(capsys, "card", "adapter", status=3)["error"]
    assert error["code"] == "GC113" and named in error["message"]


def test_the_hub_reads_the_metadata(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--base-model", "owner/base", "--license", "mit", "--dataset", "owner/data", "--language", "en"]
    common = {"base_model": "owner/base", "license": "mit", "datasets": ["owner/data"], "language": ["en"],
              "pipeline_tag": "text-generation"}  # fmt: skip
    wanted = {
        "merged": {"library_name": "transformers", "base_model_relation": "finetune", "tags": ["graftc", "lora"]},
        "streamed": {"library_name": "transformers", "base_model_relation": "finetune", "tags": ["graftc"]},
        "adapter": {"library_name": "peft", "base_model_relation": "adapter", "tags": ["lora"]},
    }
    for kind, more in wanted.items():
        data = run_valid(capsys, "card", kind, "--out", f"{kind}/README.md", *own)
        assert metadata_of(folder / kind / "README.md") == {**common, **more}
        assert data["card"] == (folder / kind / "README.md").read_text(encoding="utf-8")
        assert "information needed" not in data["card"] and str(folder) not in data["card"]


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_those_of_the_files(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run_here(capsys, "card", kind).out
    (file,) = (folder / kind).glob("*.safetensors")
    tensors = load_file(file)
    rows = [line for line in text.split("## Figures")[1].split("##")[0].splitlines() if "`F32`" in line]
    numbers = [[int(cell.strip().replace(",", "")) for cell in row.split("|")[2:5]] for row in rows]
    sizes = [sum(t.numel() for t in tensors.values()), sum(t.nbytes for t in tensors.values())]
    assert [sum(column) for column in zip(*numbers, strict=True)] == [len(tensors), *sizes]
    if kind == "adapter":
        assert "| `model.layers.*.mlp.down_proj` | `lora` | 3 | 0-1 | 2 |" in text
        (config,) = (t.content for t in tokens_of(text) if t.type == "fence" and t.info == "json")
        stored = json.loads((folder / kind / "adapter_config.json").read_text())
        assert json.loads(config).items() <= stored.items() and json.loads(config)["r"] == 3
    else:
        certificate = json.loads((folder / kind / "graftc.json").read_text())["certificate"]
        assert f"| places | {len(certificate['sites'])} |" in text and "certificate of that fold passed" in text
        assert f"{max(site['algebra'] for site in certificate['sites']):.1e} (at most 1e-09)" in text


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_its_code_and_commands_run(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here(capsys, "card", kind, "--out", f"{kind}/README.md").status == 0
    text = (folder / kind / "README.md").read_text(encoding="utf-8")
    blocks = {t.info: t.content for t in tokens_of(text) if t.type == "fence"}
    scope: dict[str, Any] = {}
    exec(compile(blocks["python"].replace('"MODEL"', '"base"'), "card", "exec"), scope)
    assert isinstance(scope["model"], PeftModel if kind == "adapter" else transformers.LlamaForCausalLM)
    names = {"MODEL": "base", "BASE": "base", "ADAPTER": "adapter"}
    commands = blocks["console"].splitlines()
    assert len(commands) == 2
    for line in commands:
        words = [names.get(word, word) for word in shlex.split(line)]
        outcome = run_here(capsys, *words[2:])
        assert outcome.status == 0, f"{line}\n{outcome.out}{outcome.err}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_with_its_card_is_as_it_was(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, out = tree_bytes(folder / kind), folder / kind / "README.md"
    assert run_here(capsys, "card", kind, "-o", str(out)).out == f"wrote {out}\n"
    assert {**before, "README.md": out.read_bytes()} == tree_bytes(folder / kind)
    out.write_text("mine")
    assert run_here(capsys, "card", kind, "-o", str(out)).err.startswith("GC063") and out.read_text() == "mine"
    for other in ("other.md", "README.md.txt", "inner/README.md"):
        assert run_here(capsys, "card", kind, "-o", f"{kind}/{other}", "--force").err.startswith("GC063")
    if kind != "adapter":
        assert run_here(capsys, "verify", kind).status == 0
        (folder / kind / "notes.md").write_text("not the card")
        assert run_here(capsys, "verify", kind).status == 1
        assert "'notes.md' is not listed" in run_here(capsys, "card", kind).err
        (folder / kind / "notes.md").unlink()
    assert run_here(capsys, "card", kind, "-o", str(out), "--force").status == 0
    assert out.read_text(encoding="utf-8").startswith("---\n") and len(tree_bytes(folder / kind)) == len(before) + 1


def test_a_link_in_place_of_the_card_is_not_followed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "target").write_text("kept")
    for kind in ("merged", "adapter"):
        (folder / kind / "README.md").symlink_to(folder / "target")
        run_here(capsys, "card", kind, "-o", f"{kind}/README.md", "--force")
        assert (folder / "target").read_text() == "kept"
    assert run_here(capsys, "verify", "merged").status == 1, "a link is not a card"


def test_files_that_changed_have_no_card(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "merged" / "config.json").write_text("{}")
    assert run_here(capsys, "card", "merged").err.startswith("GC082")
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"no tensors")
    assert "GC113" in run_here(capsys, "card", "adapter").err
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    assert "GC110" in run_here(capsys, "card", "adapter").err
    assert run_here(capsys, "card", "base").err.startswith("GC080")


def test_an_adapter_that_graftc_does_not_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A type of PEFT that graftc does not have: the card says what the files say, and shows no command of graftc."""
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": "OF_TOMORROW", "depth": [1, 2]}))
    text = run_here(capsys, "card", "adapter").out
    assert "`OF_TOMORROW`" in text and '"depth"' in text and "PeftModel.from_pretrained" in text
    assert "## Places" not in text and "$ graftc" not in text and "graftc\n" not in text.split("---")[1]
    assert "| tensors of the adapter, `F32` | 9 |" in text


@pytest.mark.parametrize(
    ("front", "license"),
    [
        ("license: apache-2.0", "apache-2.0"), ("tags: [a]\nlicense: 'mit' # as is\nlanguage: en", "mit"),
        ("license: Apache 2", None), ("license: <b>", None), ("license: mit\nlicense: gpl", None),
        ("licence: mit", None),
    ],
)  # fmt: skip
def test_the_license_is_that_of_the_base(front: str, license: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\nlicense: bsd-2-clause\n")
    assert license_of(Reference("folder", str(tmp_path))) == license
    assert license_of(Reference("folder", str(tmp_path / "absent"))) is None
    assert license_of(Reference("hub", "owner/absent")) is None


def test_a_card_names_the_license_of_its_base(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "base"}))
    assert "license: mit" in run_here(capsys, "card", "adapter").out
    assert "license: gpl-3.0" in run_here(capsys, "card", "adapter", "--license", "gpl-3.0").out


def test_paths_in_a_config_stay_private(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    for path, shown in (
        ("/home/john/secret/base", '"base"'),
        ("C:\\Users\\john\\base", '"base"'),
        ("owner/base", '"owner/base"'),
    ):
        file.write_text(json.dumps({**config, "peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": path}))
        text = run_here(capsys, "card", "adapter").out
        assert f'"tokenizer_name_or_path": {shown}' in text and "john" not in text


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("owner/base", "hub"),
        ("gpt2", "folder"),
        ("/home/me/base", "folder"),
        ("owner/base\n---", "folder"),
        (None, None),
    ],
)
def test_only_ids_of_repositories_are_bases_on_the_hub(name: str | None, kind: str | None, tmp_path: Path) -> None:
    config = parsed_config({"peft_type": "LORA", "base_model_name_or_path": name}, "config")
    assert base_of(config, tmp_path / "adapter").kind == kind
    if name == "owner/base":
        (tmp_path / name).mkdir(parents=True)
        assert base_of(config, tmp_path / "adapter").kind == "folder"


def test_the_classes_that_load_bases_are_of_transformers() -> None:
    assert all(hasattr(transformers, loader) for _, loader in _TASKS.values() if loader is not None)
    assert is_transformers_class("LlamaForCausalLM") and not is_transformers_class("OwnForCausalLM")


def test_a_merged_model_without_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The card loads the tensors alone, since no class is known."""
    from graftc.records.certificate import Certificate
    from graftc.runtime.artifact.records import write_merged_record
    from graftc.runtime.artifact.write import listed

    merged = tmp_path / "merged"
    merged.mkdir()
    save_file({"a": torch.zeros(2, 3)}, merged / "model.safetensors")
    spec = 'version: 1\nadapt: [{method: lora, target: {modules: ["a"]}}]\n'
    write_merged_record(merged, spec, Certificate((), {}, 0.0, "", ""), dict(listed(merged)))
    text = run_here(capsys, "card", str(merged)).out
    assert 'load_file("merged/model.safetensors")' in text and "library_name" not in text
    assert "**did not pass**" in text, "a certificate of nothing"
