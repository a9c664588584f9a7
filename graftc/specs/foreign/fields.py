"""Conversion of a peft config to the fields of a spec: values, patterns of ranks, lists of modules, trained rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from graftc.specs.base import MethodSpec
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.errors.text import shown
from graftc.specs.foreign.config import CONFIG, AdapterConfig, beside, matching


def fields_of(config: AdapterConfig) -> dict[str, Any]:
    """Return the fields of our spec, without target and name.

    Raises:
        GraftError: GC112 for a value that has no equivalent.
    """
    spec_class, table = config.format
    fields: dict[str, Any] = {"method": spec_class.tag(), **table.constant, **table.absent}
    for theirs, ours in table.fields.items():
        value = config.value(theirs)
        if value is None:
            continue
        meanings = table.values.get(theirs)
        if meanings is not None:
            if not isinstance(value, str | bool) or value not in meanings:
                known = ", ".join(shown(word) for word in meanings)
                message = f"{theirs}: {shown(value)} has no equivalent here"
                hint = f"the values that work are {known}; convert the adapter to a plain one in PEFT"
                raise GraftError("GC112", message, place=Place(CONFIG, path=theirs), hint=hint)
            value = meanings[value]
        fields[ours] = value
    final, first = fields.get("target_rank"), fields.get("rank")
    if isinstance(final, int) and isinstance(first, int):
        fields["target_rank"] = min(final, first)
    if "rows" in fields:
        fields["rows"] = sorted(fields["rows"]) if isinstance(fields["rows"], list) else []
    return fields


def method_at(config: AdapterConfig, module: str) -> MethodSpec:
    """Return the spec that applies to a module, or to a parameter of one.

    Raises:
        GraftError: GC112 for a value that has no equivalent, or that our method does not accept.
    """
    spec_class, table = config.format
    fields = {**fields_of(config), "target": {"modules": "**"}}
    for theirs, ours in table.patterns.items():
        given = config.value(theirs) or {}
        if not isinstance(given, Mapping):
            raise GraftError(
                "GC111", f"{theirs} is {shown(given)}, it must be a mapping", place=Place(CONFIG, path=theirs)
            )
        key = matching(list(given), module, config.matcher)
        if key is not None:
            fields[ours] = given[key]
    for theirs, own in table.lists.items():
        fields[own.field] = own.listed if is_listed(config, theirs, module) else own.otherwise
    try:
        return spec_class.model_validate(fields)
    except GraftError as error:
        raise GraftError("GC112", error.message, place=Place(CONFIG), hint=error.hint) from None


def is_listed(config: AdapterConfig, field: str, module: str) -> bool:
    """Return whether a list in the config names a module: by the end of its path, or by a regular expression."""
    given = config.value(field)
    if isinstance(given, str):
        return bool(config.matcher.matching(given, [module]))
    return any(isinstance(word, str) and module.endswith(word) for word in given or ())


def takes_bias(config: AdapterConfig, adapted: Collection[str], module: str) -> bool:
    """Return whether the bias of a module trains along with the method."""
    policy = config.value("bias", "none")
    return policy == "all" or (policy == "lora_only" and module in adapted)


def rows_of(config: AdapterConfig, module: str) -> tuple[list[int], tuple[int, ...] | None]:
    """Return the rows of an embedding table that train, ascending, and the position of each in the file.

    The positions are None if the file has the same order.

    Raises:
        GraftError: GC112 for rows that are named twice or counted from the end, or if no list names any.
    """
    given = config.value("token_indices") if "token_indices" in config.own else config.trainable_token_indices
    if isinstance(given, Mapping):
        named = [rows for word, rows in given.items() if module == word or module.endswith(f".{word}")]
        given = named[0] if named else None
    if not isinstance(given, list) or not given or any(type(row) is not int or row < 0 for row in given):
        message = f"the config says no rows of {module} that train: {shown(given)}"
        raise GraftError("GC112", message, place=Place(CONFIG), hint="token indices are whole numbers from 0")
    if len(set(given)) != len(given):
        message = f"the rows of {module} that train are named more than once"
        raise GraftError("GC112", message, place=Place(CONFIG), hint="name each token once")
    order = sorted(range(len(given)), key=given.__getitem__)
    return sorted(given), None if order == list(range(len(given))) else tuple(order)


def table_rows(rows: list[int], module: str) -> MethodSpec:
    """Return the spec of rows of a table that train along with another method."""
    return beside()[0].model_validate({"rows": rows, "target": {"modules": module}})
