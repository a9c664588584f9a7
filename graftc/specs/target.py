"""Targets: the places in a model that an adaptation applies to, and the pattern languages that select them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field

from graftc.specs.base_model import SpecModel
from graftc.specs.claims import SiteKind
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import shown
from graftc.specs.patterns import (
    as_items,
    expand_braces,
    measure_braces,
    parse_layer,
    smallest_fix,
)
from graftc.specs.regexes import check_regex
from graftc.specs.roles import parse_role
from graftc.specs.schema import Glob, Layer, Regex, RoleName
from graftc.specs.spec_errors import problems_of, refuse, reject


def _each(check: Callable[[Any], object], what: str) -> Callable[[Any], Any]:
    """Return a validator for one item or a list of items, whose errors name the invalid item."""

    def validate(value: Any) -> Any:
        many = isinstance(value, (list, tuple))
        if value is None:
            return None
        if many and not value:
            refuse((), f"an empty list selects nothing; remove it or name {what}")
        problems = problems_of(as_items(value), check)
        reject(problems if many else [((), error) for _, error in problems])
        return list(value) if many else value

    return validate


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise GraftError("GC002", f"expected {what}, not {shown(value)}")
    if not value.strip():
        raise GraftError("GC002", f"expected {what}, not an empty string")
    return value


def _check_role(value: Any) -> None:
    text = _text(value, "a role")
    for branch in expand_braces(text):
        try:
            parse_role(branch)
        except GraftError as error:
            raise _narrowed(error, text, branch) from None


def _narrowed(error: GraftError, text: str, branch: str) -> GraftError:
    """Return the error with its fix adapted to the wording in ``text`` if the branch results from expanding braces."""
    if error.fix is None or branch == text:
        return error
    return error.changed(fix=smallest_fix(text, *error.fix))


def _check_glob(value: Any) -> None:
    measure_braces(_text(value, "a pattern of module paths"))


def _check_regex(value: Any) -> None:
    check_regex(_text(value, "a regular expression"))


def _check_layer(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise GraftError("GC002", f"expected a layer or a slice of layers, not {shown(value)}")
    parse_layer(value)


# For the schema; the validators that run before it have better messages.
_SOME = Field(min_length=1)

Roles: TypeAlias = Annotated[
    RoleName | Annotated[Sequence[RoleName], _SOME],
    BeforeValidator(_each(_check_role, "a role")),
    AfterValidator(_frozen),
]
"""A role or several; braces are allowed: ``attn.{q,v}``."""
Patterns: TypeAlias = Annotated[
    Glob | Annotated[Sequence[Glob], _SOME], BeforeValidator(_each(_check_glob, "a pattern")), AfterValidator(_frozen)
]
"""A glob of module paths or several."""
Regexes: TypeAlias = Annotated[
    Regex | Annotated[Sequence[Regex], _SOME], BeforeValidator(_each(_check_regex, "a regex")), AfterValidator(_frozen)
]
"""A regular expression or several, matched against the whole module path."""
Layers: TypeAlias = Annotated[
    Layer | Annotated[Sequence[Layer], _SOME], BeforeValidator(_each(_check_layer, "a layer")), AfterValidator(_frozen)
]
"""A layer, a slice ``"0:6"``, or a list of them."""


def _each_or_none(value: Any) -> Any:
    return list(as_items(_each(_check_glob, "a pattern")(value))) if as_items(value) else []


PatternList: TypeAlias = Annotated[
    Sequence[Glob],
    BeforeValidator(_each_or_none, json_schema_input_type=Glob | Sequence[Glob] | None),
    AfterValidator(_frozen),
]
"""Globs of module paths, possibly none; a single one need not be in a list."""


class Target(SpecModel):
    """The sites of the model that an adaptation applies to.

    A site is selected if it matches each of ``role``, ``modules`` and ``regex`` that is given; ``layers`` and
    ``exclude`` then narrow the selection. Every list item and every brace branch must select a site.
    """

    role: Roles | None = None
    """A role such as `attn.q`, or a list of them; `graftc roles MODEL` prints those of a model."""

    modules: Patterns | None = None
    """Globs of module paths: `*` matches within one segment, `**` any number of segments, `{a,b}` either
    alternative. Of experts, whose weights are parameters of one module, also of the paths of parameters."""

    regex: Regexes | None = None
    """Regular expressions that match whole module paths."""

    layers: Layers | None = None
    """Layers of each stack: an index, a slice `"0:6"` or a list of them; negative values count from the end."""

    exclude: Patterns | None = None
    """Globs of module paths to leave out."""

    expect: int | None = Field(default=None, ge=1)
    """How many sites must be left after all narrowing."""

    @property
    def size(self) -> int:
        """The number of characters in its patterns, with braces and counts expanded."""
        globs = (measure_braces(p)[1] for f in (self.role, self.modules, self.exclude) for p in as_items(f))
        return sum(globs) + sum(check_regex(pattern) for pattern in as_items(self.regex))

    @property
    def has_selector(self) -> bool:
        """Whether any of role, modules and regex is given."""
        return not (self.role is None and self.modules is None and self.regex is None)


class AsTarget(ABC):
    """An object that can be passed as a target in Python and is converted to one: a `graftc.select` selection."""

    @abstractmethod
    def to_target(self, method: str | None = None) -> Target:
        """Return the target.

        Args:
            method: the method that the target is for; by default, any method that can adapt such sites.

        Raises:
            GraftError: if no target is equivalent.
        """


def written_fields(target: Any) -> Any:
    """Return the fields that a target sets, by name, before it is validated; return anything but a target unchanged."""
    return {f: getattr(target, f) for f in target.model_fields_set} if isinstance(target, Target) else target


@dataclass(frozen=True)
class Candidate:
    """One place that a target may select.

    Attributes:
        key: the caller's key for the place.
        module: dotted path of its module.
        roles: every role that it matches, including prefixed forms (``graftc.specs.roles.widen``).
        kind: its kind of site.
        layer: its layer from 0 within its stack; None outside layers.
        stack: the stack of layers that it belongs to.
        label: its name in messages; the module path by default.
        part: whether it consists of some output rows of a fused weight. A target without ``role`` selects modules as a
            whole, and then skips parts whose whole is a candidate as well.
        parameter: name of its parameter if the module has several of its kind, as with experts; empty otherwise.
    """

    key: Hashable
    module: str
    roles: frozenset[str]
    kind: SiteKind
    layer: int | None = None
    stack: str = ""
    label: str = ""
    part: bool = False
    parameter: str = ""

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths that a pattern may match: its module's and its parameter's."""
        return (self.module, f"{self.module}.{self.parameter}") if self.parameter else (self.module,)

    @property
    def name(self) -> str:
        """The label, or the module path."""
        return self.label or self.module


def depths(candidates: Iterable[Candidate]) -> dict[str, int]:
    """Return the number of layers of each stack."""
    out: dict[str, int] = {}
    for c in candidates:
        if c.layer is not None:
            out[c.stack] = max(out.get(c.stack, 0), c.layer + 1)
    return out
