"""Keys of graphs: one for each Program of a Compilation, and for the code that runs it."""

from __future__ import annotations

import pytest
import torch

import graftc
from graftc.passes.core.ir.program_key import ProgramKey, Signature
from graftc.testing.families import tiny

SPEC = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.q"}}]}


@pytest.mark.full
def test_keys_say_which_graph_is_meant() -> None:
    compiled = graftc.compile(SPEC, tiny("bert"))
    compilation = compiled.compilation
    compiled(input_ids=torch.ones(2, 5, dtype=torch.long), output_hidden_states=True)
    first, second = compilation.signatures
    assert "output_hidden_states=True" in second.inputs and "output_hidden_states=True" not in first.inputs
    for key, program in compilation.programs.items():
        assert key.mode == program.mode and key.entry == "forward" and key.signature in (first, second)
    # The base of this method is the source model's own graph.
    assert compilation.program("train", "source") is compilation.program("train", "base")
    assert compilation.program("train") is compilation.programs[ProgramKey("forward", "train", first)]
    assert set(compiled._graftc.shown.executables) <= set(compilation.programs)


@pytest.mark.slow
def test_a_place_has_one_key_in_every_signature() -> None:
    compiled = graftc.compile(SPEC, tiny("bert"))
    compiled(input_ids=torch.ones(2, 5, dtype=torch.long), output_hidden_states=True)
    first, second = (
        [site.key for resolved in signature.resolved for site, _ in resolved.sites]
        for signature in compiled.compilation.signatures.values()
    )
    assert first == second and first


@pytest.mark.full
def test_captures_with_token_embeddings_have_an_entry_of_their_own() -> None:
    compiled = graftc.compile({"adapt": [{"method": "prompt", "length": 2}]}, tiny("gpt2"))
    compilation = compiled.compilation
    key = compilation.key("train", "source", entry="embeds")
    assert "inputs_embeds" in compilation.programs[key].signature
    assert compilation.program("train", "base") is not compilation.program("train", "source")
    assert set(compilation.graphs(key.signature)) == {
        *("base.train", "base.eval", "train", "eval", "tokens.train", "embeds.train"),
    }


@pytest.mark.parametrize(
    ("mode", "text"), [("train", "train"), (frozenset({"b", "a"}), "train but for a b")], ids=["train", "mixed"]
)
def test_text(mode: str, text: str) -> None:
    key = ProgramKey("forward", mode, Signature(("x:float32[2]",), ("x.0=1",)))  # type: ignore[arg-type]
    assert str(key) == f"adapted forward {text} x:float32[2],x.0=1"


@pytest.mark.full
def test_disabled_runs_the_source_models_own_graph() -> None:
    compiled = graftc.compile(SPEC, tiny("bert"))
    with compiled.disabled():
        compiled(input_ids=torch.ones(2, 5, dtype=torch.long))
    stages = {key.stage for key in compiled._graftc.shown.executables}
    assert stages == {"adapted", "source"}
