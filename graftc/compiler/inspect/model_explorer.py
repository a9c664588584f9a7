"""Write graphs for Google's Model Explorer: a JSON collection of the rewritten graph and the base's own.

The format is that of the package ``ai-edge-model-explorer`` (``graph_builder.GraphCollection``), whose web page can
open the file. Modules are namespaces; nodes that an adaptation inserted in a module form a separate namespace below it,
in the adaptation's colour.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx

from graftc.compiler.inspect.snapshot import Snapshot
from graftc.passes.core.ir.graph_formats import PALETTE
from graftc.passes.core.ir.history import positions
from graftc.passes.core.ir.printer import Printer, target_name
from graftc.passes.core.ir.program import Program, provenance
from graftc.passes.core.ir.program_key import Mode
from graftc.passes.core.weights.names import module_of, parsed
from graftc.records.places import AdaptedPlace
from graftc.specs.errors.text import abridged, encodable, printable

NAME = 200
TEXT = 2000
"""Maximum number of characters written for names and for attributes."""

_BASE_TENSOR = "#eeeeee"
# Characters at which Model Explorer splits namespaces, or that break lines, with harmless replacements.
_SEPARATORS = str.maketrans({"/": "\N{DIVISION SLASH}", ";": "\N{FULLWIDTH SEMICOLON}", "\n": " ", "\t": " "})


def model_explorer(snapshot: Snapshot, mode: Mode = "eval") -> dict[str, Any]:
    """Return the rewritten graph and the base's own graph as a collection for Model Explorer.

    Args:
        snapshot: a snapshot of a live model or of an artifact.
        mode: the mode of the two graphs.

    Returns:
        JSON data with ``label``, ``graphs`` (``adapted (eval)``, then ``base (eval)``) and ``graphSorting``. Nodes are
        named as in the printed graph, so that the two graphs' nodes can be matched.

    Raises:
        GraftError: GC091 for an artifact without graphs.
    """
    colours = {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(_adaptations(snapshot))}
    adapted = _graph(snapshot.program(mode), f"adapted ({mode})", colours)
    adapted["groupNodeAttributes"] = {
        "": {"model": _short(snapshot.model), "mode": mode, "adaptations": _short(", ".join(colours), TEXT)},
        **_sites(snapshot.sites),
    }
    base = _graph(snapshot.program(mode, base=True), f"base ({mode})", {})
    base["groupNodeAttributes"] = {"": {"model": _short(snapshot.model), "mode": mode}}
    collection: dict[str, Any] = encodable(
        {"label": f"{_short(snapshot.model)} by graftc", "graphs": [adapted, base], "graphSorting": "name_asc"}
    )
    return collection


def model_explorer_text(snapshot: Snapshot, mode: Mode = "eval") -> str:
    """Return the result of `model_explorer` as the text of a file."""
    return json.dumps(model_explorer(snapshot, mode), indent=1, allow_nan=False) + "\n"


def _adaptations(snapshot: Snapshot) -> list[str]:
    """Return the owners of inserted nodes, in spec order, including full training and new tokens."""
    names = [*snapshot.spec.owners, *(record.owner for record in snapshot.trained)]
    inserted = (origin["adaptation"] for n in snapshot.program().graph.nodes if (origin := provenance(n)) is not None)
    return list(dict.fromkeys([*names, *inserted]))


def _graph(program: Program, name: str, colours: Mapping[str, str]) -> dict[str, Any]:
    printer = Printer(program)
    ids = _unique(printer.names)
    nodes = [_node(node, printer, ids, colours) for node in program.graph.nodes]
    groups = [_group(adaptation, colour) for adaptation, colour in colours.items()]
    return {"id": name, "nodes": nodes, **({"groupNodeConfigs": groups} if groups else {})}


def _unique(names: Mapping[fx.Node, str]) -> dict[fx.Node, str]:
    """Return displayable names, each still unique to one node."""
    unique: dict[fx.Node, str] = {}
    taken: set[str] = set()
    for node, name in names.items():
        own = _short(name)
        if own in taken:
            own = f"{own} #{len(unique)}"
        taken.add(own)
        unique[node] = own
    return unique


def _node(node: fx.Node, printer: Printer, ids: Mapping[fx.Node, str], colours: Mapping[str, str]) -> dict[str, Any]:
    owner = _owner(node)
    sources = list(positions(node.args, node.kwargs))
    entry: dict[str, Any] = {
        "id": ids[node],
        "label": _label(node),
        "namespace": _namespace(node, owner if owner in colours else None),
        "attrs": [_pair(key, value, TEXT) for key, value in _attributes(node, printer).items() if value],
        "incomingEdges": [
            {"sourceNodeId": ids[s], "sourceNodeOutputId": _output_id(node, s), "targetNodeInputId": str(index)}
            for index, (_, s) in enumerate(sources)
        ],
        "inputsMetadata": [
            {"id": str(index), "attrs": [_pair("__tensor_tag", f"argument {position}")]}
            for index, (position, _) in enumerate(sources)
        ],
        "outputsMetadata": [
            {"id": str(index), "attrs": [_pair("tensor_shape", kind)]}
            for index, kind in enumerate(_types(node, printer))
        ],
    }
    colour = colours.get(owner or "", _BASE_TENSOR if node.op == "get_attr" else None)
    if colour is not None:
        entry["style"] = {"backgroundColor": colour}
    return entry


def _owner(node: fx.Node) -> str | None:
    """Return the adaptation that inserted a node, or whose tensor the node reads; None for base nodes."""
    origin = provenance(node)
    if origin is not None:
        return str(origin["adaptation"])
    tensor = parsed(str(node.target)) if node.op == "get_attr" else None
    return None if tensor is None else tensor.adaptation


def _label(node: fx.Node) -> str:
    origin = provenance(node)
    if node.op == "get_attr":
        tensor = parsed(str(node.target))
        return _short(str(node.target).rpartition(".")[2] if tensor is None else tensor.part)
    if node.op == "placeholder":
        return _short(f"input {node.target}")
    if node.op == "output":
        return "output"
    called = target_name(node.target)
    return _short(called if origin is None else f"{called} ({origin['part']})")


def _namespace(node: fx.Node, adaptation: str | None) -> str:
    """Return the path of modules from the outermost inwards, followed by ``+ NAME`` for an adaptation's nodes."""
    if node.op == "get_attr":
        tensor = parsed(str(node.target))
        module = module_of(str(node.target)) if tensor is None else tensor.module
    else:
        module = str(node.meta.get("module") or "") if node.op == "call_function" else ""
    path = [_segment(word) for word in module.split(".") if word]
    return "/".join([*path, *([_added(adaptation)] if adaptation is not None else [])])


def _segment(word: str) -> str:
    return _short(word).translate(_SEPARATORS)


def _added(adaptation: str) -> str:
    return f"+ {_segment(adaptation)}"


def _group(adaptation: str, colour: str) -> dict[str, Any]:
    """Return the appearance of groups that contain an adaptation's nodes."""
    return {"namespaceRegex": f"(^|/){_escaped(_added(adaptation))}$", "backgroundColor": colour}


def _escaped(text: str) -> str:
    """Return a text escaped for a JavaScript regular expression, where escapes differ from Python's."""
    return re.sub(r"[\\^$.*+?()\[\]{}|/]", lambda match: "\\" + match.group(), text)


def _attributes(node: fx.Node, printer: Printer) -> dict[str, str]:
    origin: Mapping[str, Any] = provenance(node) or {}
    tensor = parsed(str(node.target)) if node.op == "get_attr" else None
    return {
        "name": printer.names[node],
        "kind": {"placeholder": "input", "get_attr": "tensor", "output": "output"}.get(node.op, "operator"),
        "operator": target_name(node.target) if node.op == "call_function" else "",
        "tensor": str(node.target) if node.op == "get_attr" else "",
        "type": "" if node.op == "output" else printer.symbols.type(node.meta.get("val")),
        "module": str(node.meta.get("module") or ""),
        "adaptation": str(origin.get("adaptation", "" if tensor is None else tensor.adaptation)),
        **{key: str(origin.get(key) or "") for key in ("method", "site", "part")},
        "text": "" if node.op == "get_attr" else printer.line(node),
    }


def _types(node: fx.Node, printer: Printer) -> Iterator[str]:
    value = node.meta.get("val")
    if node.op == "output" or value is None:
        return
    for each in value if isinstance(value, list | tuple) else [value]:
        yield printer.symbols.type(each)


def _output_id(reader: fx.Node, source: fx.Node) -> str:
    """Return the id of the source's output that a reader uses."""
    several = isinstance(source.meta.get("val"), list | tuple)
    taken = several and target_name(reader.target) == "getitem" and len(reader.args) > 1
    return str(reader.args[1]) if taken else "0"


def _sites(sites: tuple[AdaptedPlace, ...]) -> dict[str, dict[str, str]]:
    """Return the attributes that module groups show for the adapted places in them."""
    groups: dict[str, dict[str, str]] = {}
    for site in sites:
        path = "/".join(_segment(word) for word in site.module.split(".") if word)
        what = ", ".join([site.method, *site.roles[:1], *([f"layer {site.layer}"] if site.layer is not None else [])])
        own = groups.setdefault(path, {})
        key = _short(f"{site.adaptation}: {'.'.join(word for word in (site.key.name, site.key.part) if word)}")
        own[key] = _short(what, TEXT)
    groups.pop("", None)
    return groups


def _pair(key: str, value: str, most: int = NAME) -> dict[str, str]:
    return {"key": key, "value": _short(value, most)}


def _short(text: str, most: int = NAME) -> str:
    return abridged(printable(text), most)
