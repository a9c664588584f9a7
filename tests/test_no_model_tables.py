"""No line of the product decides by a model's type or class name: everything is derived from the graph."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import graftc

ROOT = Path(graftc.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

FIELDS = frozenset({"model_type", "architectures", "architecture"})
"""Entries of a config that name the kind of a model."""
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
NAMES = frozenset({"__name__", "__qualname__"})
LOOKING = frozenset({"get", "pop", "setdefault", "startswith", "endswith", "index", "count", "find", "match", "search"})
LOOKING_AT = frozenset({"startswith", "endswith", "casefold", "lower", "find", "count", "index"})
LIBRARIES = frozenset({"transformers", "tf"})
"""Modules whose attributes are the model classes themselves: loading a class by its name is not a table."""


def is_kind(node: ast.AST, tainted: frozenset[str] = frozenset()) -> bool:
    """Return whether an expression names the kind of a model: a config's field or the name of an object's class."""
    if isinstance(node, ast.Name):
        return node.id in tainted
    if isinstance(node, ast.Attribute):
        if node.attr in FIELDS:
            return True
        return node.attr in NAMES and is_class(node.value)
    if isinstance(node, ast.Subscript):
        return is_field(node.slice) or is_kind(node.value, tainted)
    if isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Name) and function.id in ("getattr", "str", "next", "iter", "list", "tuple", "set"):
            return any(is_field(a) or is_kind(a, tainted) for a in node.args)
        if isinstance(function, ast.Attribute):
            fetched = function.attr in ("get", "pop") and any(is_field(a) for a in node.args)
            return fetched or function.attr == "_get_name" or is_kind(function.value, tainted)
    if isinstance(node, ast.BoolOp | ast.IfExp | ast.List | ast.Tuple | ast.Set | ast.NamedExpr):
        return any(is_kind(child, tainted) for child in ast.iter_child_nodes(node))
    return False


def is_class(node: ast.AST) -> bool:
    """Return whether an expression is ``type(x)`` or ``x.__class__``, except the type of an error."""
    if isinstance(node, ast.Attribute):
        return node.attr == "__class__"
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "type"
    return called and not all(isinstance(a, ast.Name) and a.id == "error" for a in node.args)  # type: ignore[attr-defined]


def is_field(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value in FIELDS


def offences(source: str) -> list[tuple[int, str]]:
    """Return the lines that compare, look up or match the kind of a model, with the action of each."""
    lines: list[tuple[int, str]] = []
    for scope in scopes(ast.parse(source)):
        tainted = names_of_kinds(scope)
        for node in own_nodes(scope):
            lines += [(getattr(node, "lineno", 0), what) for what in offence(node, tainted)]
    return sorted(set(lines))


def scopes(tree: ast.Module) -> list[ast.AST]:
    """Return the module and its functions, each of which is one scope of names."""
    return [tree, *(n for n in ast.walk(tree) if isinstance(n, _FUNCTIONS))]


def own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """Yield every node of a scope except those of functions inside it."""
    pending = list(ast.iter_child_nodes(scope))
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, _FUNCTIONS):
            pending += ast.iter_child_nodes(node)


def names_of_kinds(scope: ast.AST) -> frozenset[str]:
    """Return the variables that store the kind of a model, whatever the order of assignment."""
    tainted: frozenset[str] = frozenset()
    while True:
        more = set(tainted)
        for node in own_nodes(scope):
            targets: list[ast.expr] = []
            value: ast.expr | None = None
            if isinstance(node, ast.Assign):
                targets, value = node.targets, node.value
            elif isinstance(node, ast.AnnAssign | ast.NamedExpr):
                targets, value = [node.target], node.value
            elif isinstance(node, ast.For | ast.comprehension):
                targets, value = [node.target], node.iter
            if value is not None and is_kind(value, tainted):
                more |= {t.id for t in targets if isinstance(t, ast.Name)}
        if more == tainted:
            return tainted
        tainted = frozenset(more)


def offence(node: ast.AST, tainted: frozenset[str]) -> list[str]:
    """Return what one node does with the kind of a model."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        if all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            return []
        return ["compares"] if any(is_kind(side, tainted) for side in sides) else []
    if isinstance(node, ast.Subscript):
        return ["looks up"] if is_kind(node.slice, tainted) else []
    if isinstance(node, ast.Match):
        return ["matches"] if is_kind(node.subject, tainted) else []
    if isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Name) and function.id in ("getattr", "hasattr") and len(node.args) > 1:
            library = isinstance(node.args[0], ast.Name) and node.args[0].id in LIBRARIES
            return ["looks up"] if is_kind(node.args[1], tainted) and not library else []
        if isinstance(function, ast.Attribute):
            looks = function.attr in LOOKING and any(is_kind(a, tainted) for a in node.args)
            looked_at = function.attr in LOOKING_AT and is_kind(function.value, tainted)
            return ["looks up"] if looks or looked_at else []
    return []


FORMATS = frozenset(
    {
        *("runtime/export/gguf/families.py", "runtime/onnx_generation/genai.py", "runtime/interop/peft/expressible.py"),
        *("applications/serving/adapters.py", "applications/serving/bases.py", "applications/serving/gguf_files.py"),
        "runtime/serving/limits.py",
    }
)
"""Files about formats that state the kind of a model (GGUF's architecture, that of onnxruntime-genai's configs, the
task in PEFT's), and about what serving engines load, which they decide by that kind."""


@pytest.mark.slow
def test_nothing_is_decided_by_the_kind_of_a_model() -> None:
    by_path = {str(path.relative_to(ROOT)): offences(path.read_text(encoding="utf-8")) for path in FILES}
    assert {path for path, lines in by_path.items() if lines} == FORMATS


def test_every_file_is_read() -> None:
    assert len(FILES) > 50
    assert ROOT / "compiler" / "roles" / "structure.py" in FILES


PLANTED = {
    'if config.model_type == "bert": pass': "compares",
    'if model.config.model_type in ("bert", "gpt2"): pass': "compares",
    'if "bert" in model.config.model_type: pass': "compares",
    'if type(model).__name__ == "BertModel": pass': "compares",
    'if module.__class__.__name__ != "Conv1D": pass': "compares",
    'if any(a == "BertModel" for a in config.architectures): pass': "compares",
    'if type(m).__qualname__.endswith("Attention"): pass': "looks up",
    'if module._get_name() == "Linear": pass': "compares",
    "names = TABLE[config.model_type]": "looks up",
    "names = TABLE.get(type(model).__name__)": "looks up",
    'names = TABLE[getattr(config, "model_type", None)]': "looks up",
    'names = TABLE[config["architectures"][0]]': "looks up",
    "kind = config.model_type\nnames = TABLE[kind]": "looks up",
    'def f(c):\n    kind = c.get("model_type")\n    again = kind\n    return again == "t5"': "compares",
    'match config.model_type:\n    case "bert": pass': "matches",
    "rule = getattr(rules, type(model).__name__)": "looks up",
}


@pytest.mark.parametrize("source", PLANTED)
def test_a_planted_table_is_found(source: str) -> None:
    assert PLANTED[source] in {what for _, what in offences(source)}


@pytest.mark.parametrize(
    "source",
    [
        'raise ValueError(f"{type(model).__name__} cannot be captured")',
        'cls = getattr(transformers, config["architectures"][0])',
        'if config.get("architectures") is None: pass',
        "if isinstance(module, nn.Linear): pass",
        'if type(error).__name__ == "Abort": pass',
        'if node.op == "call_function": pass',
        "names = TABLE[node.target]",
    ],
)
def test_messages_and_loading_are_no_tables(source: str) -> None:
    assert offences(source) == []
