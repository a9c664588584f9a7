"""Convert a peft config to the fields of a spec: values, rank patterns, module lists, trained rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from graftc.specs.base import MethodSpec
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.errors.text import shown
from graftc.specs.foreign.config import CONFIG, AdapterConfig, beside, matching


def fields_of(config: AdapterConfig) -> dict[str, Any]:
    """Return the fields of our spec, except target and name.

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
                hint = f"the supported values are {known}; convert the adapter to a plain one in PEFT"
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
    """Return the spec that applies to a module, or to a module's parameter.

    Raises:
        GraftError: GC112 for a value that has no equivalent, or that our method does not accept.
    """
    spec_class, table = config.format
    fields = {**fields_of(config), "target": {"modules": "**"}}
    for theirs, ours in table.patterns.items():
        given = config.value(theirs) or {}
        if not isinstance(given, Mapping):
            raise GraftError(
                "GC111", f"{theirs} must be a mapping, got {shown(given)}", place=Place(CONFIG, path=theirs)
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
    """Return whether a list in the config names a module, by the end of its path or by a regular expression."""
    given = config.value(field)
    if isinstance(given, str):
        return bool(config.matcher.matching(given, [module]))
    return any(isinstance(word, str) and module.endswith(word) for word in given or ())


def takes_bias(config: AdapterConfig, adapted: Collection[str], module: str) -> bool:
    """Return whether a module's bias trains along with the method."""
    policy = config.value("bias", "none")
    return policy == "all" or (policy == "lora_only" and module in adapted)


def rows_of(config: AdapterConfig, module: str) -> tuple[list[int], tuple[int, ...] | None]:
    """Return the trained rows of an embedding table in ascending order, and the position of each in the file.

    The positions are None if the file has the same order.

    Raises:
        GraftError: GC112 for rows that are named twice or have negative indices, or if no rows are named.
    """
    given = config.value("token_indices") if "token_indices" in config.own else config.trainable_token_indices
    if isinstance(given, Mapping):
        named = [rows for word, rows in given.items() if module == word or module.endswith(f".{word}")]
        given = named[0] if named else None
    if not isinstance(given, list) or not given or any(type(row) is not int or row < 0 for row in given):
        message = f"the trained rows of {module} must be a list of token indices, got {shown(given)}"
        raise GraftError("GC112", message, place=Place(CONFIG), hint="use non-negative integers as token indices")
    if len(set(given)) != len(given):
        message = f"some trained rows of {module} are named more than once"
        raise GraftError("GC112", message, place=Place(CONFIG), hint="name each token once")
    order = sorted(range(len(given)), key=given.__getitem__)
    return sorted(given), None if order == list(range(len(given))) else tuple(order)


def table_rows(rows: list[int], module: str) -> MethodSpec:
    """Return the spec for table rows that train along with another method."""
    return beside()[0].model_validate({"rows": rows, "target": {"modules": module}})
