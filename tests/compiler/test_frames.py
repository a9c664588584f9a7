"""Graphs at every step of their history, compared with the graphs as they were after each step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import fx

import graftc
from graftc.compiler.inspect.frames import STAYS, Frames, frames
from graftc.passes.core.ir.history import HistoryEntry, Recorder, names_read
from graftc.passes.core.ir.program import provenance
from graftc.passes.core.ir.program_key import Mode
from graftc.passes.core.ir.stored.serialise import SerialisationError, program_from_json, program_to_json
from graftc.runtime.artifact import open_artifact
from graftc.testing.families import tiny

Graph = tuple[set[str], set[tuple[str, str, str]]]

SPECS: dict[str, list[dict[str, Any]]] = {
    "lora and prefix": [
        {"method": "lora", "rank": 2, "dropout": 0.1, "target": {"role": ["attn.q", "ffn.down"]}},
        {"method": "prefix", "length": 3},
    ],
    "adapters on adapters": [
        {"method": "houlsby", "reduction": 4},
        {"method": "ia3"},
        {"method": "prompt", "length": 2},
    ],
    "sparse": [{"method": "spiel", "density": 0.05}, {"method": "prefix", "length": 2}],
}


def graph_of(graph: fx.Graph) -> Graph:
    edges = {(source, node.name, at) for node in graph.nodes for at, source in names_read(node.args, node.kwargs)}
    return {node.name for node in graph.nodes}, edges


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, Graph]]:
    """The full graph after each step, by the id of the step's history entry."""
    graphs: dict[int, Graph] = {}
    kept: list[HistoryEntry] = []  # so that ids stay unique
    make = Recorder.entry

    def entry(self: Recorder, step: str, graph: fx.Graph, seconds: float) -> HistoryEntry:
        record = make(self, step, graph, seconds)
        kept.append(record)
        graphs[id(record)] = graph_of(graph)
        return record

    monkeypatch.setattr(Recorder, "entry", entry)
    yield graphs


def named(frames: Frames, step: int, final: list[str]) -> Graph:
    """Return a frame by names in the fx graph: ``final`` for nodes of the last graph, bare names for others."""
    names = [*final, *(node.name[1:] for node in frames.nodes[len(final) :])]
    nodes, edges = frames.at(step)
    return {names[n] for n in nodes}, {(names[a], names[b], position) for a, b, position in edges}


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "llama", "t5", "gpt2"])
@pytest.mark.parametrize("spec", SPECS)
def test_every_step_is_the_graph_as_it_was(
    spec: str, family: str, seen: dict[int, Graph], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GRAFTC_CACHE", str(tmp_path))  # the recorder has not seen graphs from the cache
    compiled = graftc.compile({"adapt": SPECS[spec]}, tiny(family))
    modes: tuple[Mode, ...] = ("eval", "train")
    for mode in modes:
        program = compiled.program(mode)
        recorded = frames(compiled.snapshot, mode)
        final = [node.name for node in program.graph.nodes]
        entries = [entry for entry in program.history if entry.step != "verify"]
        assert recorded.exact
        assert [row.step for row in recorded.rows] == ["capture", *(entry.step for entry in entries)]
        assert sum(id(entry) in seen for entry in entries) >= 3
        for step, entry in enumerate(entries, start=1):
            if id(entry) in seen:
                assert named(recorded, step, final) == seen[id(entry)], entry.step
        assert recorded.at(len(entries))[0] == set(range(len(final)))


@pytest.mark.slow
@pytest.mark.sample("bert")
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_before_is_the_graph_of_the_base(family: str) -> None:
    compiled = graftc.compile({"adapt": SPECS["lora and prefix"]}, tiny(family))
    for mode in ("eval", "train"):
        recorded = frames(compiled.snapshot, mode)
        base = compiled.program(mode, base=True).graph
        nodes = [node for node in recorded.nodes if node.base]
        assert len(nodes) == len(base.nodes)
        assert all(node.origin is None for node in nodes)
        reads = sum(len(names_read(node.args, node.kwargs)) for node in base.nodes)
        assert sum(edge.base for edge in recorded.edges) == reads
        assert all(recorded.nodes[e.source].base and recorded.nodes[e.target].base for e in recorded.edges if e.base)


@pytest.mark.full
def test_files_keep_it_and_older_ones_say_so(tmp_path: Path) -> None:
    compiled = graftc.compile({"adapt": SPECS["lora and prefix"]}, tiny("bert"))
    names = ["lora", "prefix"]
    opened = open_artifact(compiled.save(tmp_path / "artifact", certify=False)).snapshot
    for mode in ("eval", "train"):
        live, stored = (frames(s, mode).to_json(names) for s in (compiled.snapshot, opened))
        for graph in (live, stored):
            for row in graph["frames"]:
                row.pop("seconds")
        assert live == stored
    data = json.loads(json.dumps(program_to_json(compiled.program("eval"))))
    del data["changes"]
    old = program_from_json(data, compiled.device)
    assert all(entry.changes is None for entry in old.history)
    snapshot = opened.__class__(**{**vars(opened), "read": lambda mode, base: compiled.program(mode, base=base)})
    object.__setattr__(snapshot, "read", lambda mode, base: compiled.program(mode, base=True) if base else old)
    recorded = frames(snapshot, "eval")
    steps = [row.step for row in recorded.rows]
    assert not recorded.exact
    inserted = [node for node in recorded.nodes if node.origin is not None]
    assert inserted and all(node.born == steps.index(f"insert({node.origin[0]})") for node in inserted if node.origin)
    assert all(node.gone == STAYS for node in recorded.nodes)


@pytest.mark.full
@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["changes"].pop(),
        lambda data: data["changes"].append(None),
        lambda data: data.update(changes={}),
        lambda data: data["changes"][0].update(inserted=[10**6]),
        lambda data: data["changes"][0].update(inserted=[-1]),
        lambda data: data["changes"][0].update(inserted=[True]),
        lambda data: data["changes"][0].update(erased=[["x", 1, "", []]]),
        lambda data: data["changes"][0].update(rewired=[["x", [["0"]]]]),
        lambda data: data["changes"][0].update(rewired=[[{}, []]]),
    ],
)
def test_damaged_records_are_refused(change: Any) -> None:
    compiled = graftc.compile({"adapt": SPECS["lora and prefix"]}, tiny("bert"))
    data = json.loads(json.dumps(program_to_json(compiled.program("eval"))))
    change(data)
    with pytest.raises(SerialisationError):
        program_from_json(data, compiled.device)


@pytest.mark.slow
def test_records_of_names_that_never_were_are_harmless() -> None:
    compiled = graftc.compile({"adapt": SPECS["lora and prefix"]}, tiny("bert"))
    data = json.loads(json.dumps(program_to_json(compiled.program("eval"))))
    for changes in data["changes"]:
        if changes is not None:
            changes["inserted"] = ["nobody", *changes.get("inserted", [])]
            changes["rewired"] = [["nobody", [["0", "nothing"]]], *changes.get("rewired", [])]
            changes["erased"] = [["ghost", "aten.relu", "a.b", [["0", "nothing"], ["1", 0]]]]
    program = program_from_json(data, compiled.device)
    snapshot = compiled.snapshot
    object.__setattr__(snapshot, "read", lambda mode, base: compiled.program(mode, base=True) if base else program)
    recorded = frames(snapshot, "eval")
    assert recorded.at(len(recorded.rows) - 1)[0] == set(range(len(program.graph.nodes)))
    assert {str(provenance(node)) for node in program.graph.nodes} > {"None"}
