"""The vocabulary of roles."""

from __future__ import annotations

import pytest

from graftc.specs.claims import SiteKind
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.roles import PREFIXES, ROLES, parse_role, widen


@pytest.mark.parametrize("name", ROLES)
@pytest.mark.parametrize("prefix", ["", "encoder.", "decoder.", "cross.", "decoder.cross."])
def test_every_role_parses_under_every_prefix(prefix: str, name: str) -> None:
    role = parse_role(prefix + name)
    assert role.name == name and str(role) == prefix + name
    assert role.info is ROLES[name] and set(role.prefixes) <= set(PREFIXES)


@pytest.mark.parametrize(
    ("text", "best"),
    [
        ("attn.qq", "attn.q"),
        ("attn.query", "attn.q"),
        ("ffn.dwon", "ffn.down"),
        ("Attn.Q", "attn.q"),
        ("decoder.cros.attn.k", "decoder.cross.attn.k"),
        ("cross.decoder.attn.k", "decoder.cross.attn.k"),
        ("embedd", "embed"),
    ],
)
def test_an_unknown_role_names_the_nearest(text: str, best: str) -> None:
    with pytest.raises(GraftError) as caught:
        parse_role(text)
    assert caught.value.code == "GC012"
    assert caught.value.fix == (text, best)
    assert caught.value.hint is not None and caught.value.hint.startswith(f"did you mean '{best}'")


@pytest.mark.parametrize("text", ["", ".", "encoder", "encoder.", "zzzzzz"])
def test_what_resembles_no_role_is_still_a_coded_error(text: str) -> None:
    with pytest.raises(GraftError) as caught:
        parse_role(text)
    assert caught.value.code == "GC012"


def test_wildcards_are_told_apart_from_typing_errors() -> None:
    with pytest.raises(GraftError) as caught:
        parse_role("attn.*")
    assert caught.value.hint == "roles have no wildcards; list them, for example attn.{q,k,v,o}"


def test_widen_gives_every_spelling_a_site_answers_to() -> None:
    assert widen("attn.q") == {"attn.q"}
    assert widen("decoder.cross.attn.k") == {"attn.k", "cross.attn.k", "decoder.attn.k", "decoder.cross.attn.k"}
    for role in widen("decoder.cross.attn.k"):
        parse_role(role)


def test_kinds_follow_the_design() -> None:
    assert ROLES["attn"].kind is SiteKind.ATTENTION
    assert ROLES["attn.q"].kind is ROLES["ffn.down"].kind is ROLES["head"].kind is SiteKind.LINEAR
    assert ROLES["attn.sublayer"].kind is SiteKind.SUBLAYER
    assert ROLES["layer.out"].kind is SiteKind.VALUE
    assert ROLES["experts"].kind is SiteKind.EXPERTS
