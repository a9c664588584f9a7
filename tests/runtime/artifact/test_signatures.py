"""Signatures of artifacts and merged folders: what they cover, whom they name, and what they refuse."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as ecdsa_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key as rsa_key
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

import graftc
from graftc.runtime.artifact import signatures
from graftc.runtime.artifact.origin import code_digest
from graftc.runtime.artifact.signatures import sign, signature_problem
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb, tiny

FORMATS = {"openssh": PrivateFormat.OpenSSH, "pem": PrivateFormat.PKCS8}


def write_key(folder: Path, name: str, key: object = None, form: str = "openssh", secret: str = "") -> Path:
    """Write a pair of keys as ``ssh-keygen`` does, and return the private one's path."""
    private = Ed25519PrivateKey.generate() if key is None else key
    encryption = BestAvailableEncryption(secret.encode()) if secret else NoEncryption()
    path = folder / name
    path.write_bytes(private.private_bytes(Encoding.PEM, FORMATS[form], encryption))  # type: ignore[attr-defined]
    public = private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)  # type: ignore[attr-defined]
    path.with_suffix(".pub").write_bytes(public + b" somebody@example.org\n")
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact and a merged model."""
    folder = tmp_path_factory.mktemp("signed")
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": ["attn.q"]}}]}
    compiled = graftc.compile(spec, tiny("llama")).eval()
    perturb(compiled)
    compiled.save(folder / "artifact", certify=False)
    compiled.merge().save(folder / "merged")
    return folder


@pytest.fixture
def here(folders: Path, tmp_path: Path) -> Path:
    shutil.copytree(folders, tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["artifact", "merged"])
def test_a_signature_holds_until_anything_changes(here: Path, kind: str) -> None:
    key, other = write_key(here, "key"), write_key(here, "other")
    signed = sign(here / kind, key)
    assert signed.path == here / f"{kind}.dsse.json"
    assert signature_problem(here / kind, key.with_suffix(".pub")) == ("", signed.signer)
    problem, signer = signature_problem(here / kind, other.with_suffix(".pub"))
    assert signed.signer in problem and not signer
    sealing = here / kind / signed.file
    content = sealing.read_bytes()
    for place in range(0, len(content), len(content) // 40):
        sealing.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert signature_problem(here / kind, key.with_suffix(".pub"))[0], place
    sealing.write_bytes(content)
    assert not signature_problem(here / kind, key.with_suffix(".pub"))[0]


def decoded(text: str) -> object:
    """Return what an envelope contains; the last character of base64 has bits that mean nothing."""
    try:
        data = json.loads(text)
        signed = [(each["keyid"], base64.b64decode(each["sig"])) for each in data["signatures"]]
        return data["payloadType"], base64.b64decode(data["payload"]), signed
    except (ValueError, KeyError):
        return None


def test_any_changed_signature_is_refused(here: Path) -> None:
    key = write_key(here, "key")
    path = sign(here / "artifact", key).path
    text, public = path.read_text(), key.with_suffix(".pub")
    for place in range(len(text)):
        if text[place].isspace():
            continue
        changed = text[:place] + chr(ord(text[place]) ^ 2) + text[place + 1 :]
        path.write_text(changed)
        problem, signer = signature_problem(here / "artifact", public)
        assert (problem and not signer) or decoded(changed) == decoded(text), (place, text[place])
    for content in (
        "",
        "[]",
        "{}",
        "null",
        "{" * 10_000,
        '{"payload": 1}',
        json.dumps({"payload": "", "signatures": 5}),
    ):
        path.write_text(content)
        assert signature_problem(here / "artifact", public)[0], content
    path.unlink()
    assert signature_problem(here / "artifact", public)[0]


def test_a_signature_of_something_else_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right key signed another folder, or a statement of another kind."""
    key = write_key(here, "key")
    public = key.with_suffix(".pub")
    other = sign(here / "merged", key).path
    assert "another manifest.json" in signature_problem(here / "artifact", public, other)[0]
    for name, value in (("PAYLOAD_TYPE", "text/plain"), ("_PREDICATE", "urn:other")):
        with monkeypatch.context() as patched:
            patched.setattr(signatures, name, value)
            sign(here / "artifact", key, force=True)
        assert signature_problem(here / "artifact", public)[0], name


def test_the_envelope_is_what_other_tools_read(here: Path) -> None:
    """The signature holds by the definition of DSSE, and the statement by that of in-toto, without our code."""
    private = Ed25519PrivateKey.generate()
    signed = sign(here / "artifact", write_key(here, "key", private))
    envelope = json.loads(signed.path.read_text())
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"]
    encoded = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
    private.public_key().verify(base64.b64decode(envelope["signatures"][0]["sig"]), encoded)
    statement = json.loads(payload)
    digest = hashlib.sha256((here / "artifact" / "manifest.json").read_bytes()).hexdigest()
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"] == [{"name": "manifest.json", "digest": {"sha256": digest}}]
    blob = private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[1]
    fingerprint = base64.b64encode(hashlib.sha256(base64.b64decode(blob)).digest()).decode().rstrip("=")
    assert envelope["signatures"][0]["keyid"] == signed.signer == f"SHA256:{fingerprint}"


def test_keys_in_all_forms(here: Path) -> None:
    """OpenSSH and PEM, plain and encrypted; several public keys in a file, of which one signed."""
    keys = [
        write_key(here, "a"),
        write_key(here, "b", form="pem"),
        write_key(here, "c", ecdsa_key(SECP256R1())),
        write_key(here, "d", form="pem", secret="secret"),
    ]
    everyone = here / "keys"
    everyone.write_text("# people\n\n" + "".join(key.with_suffix(".pub").read_text() for key in keys))
    for key in keys:
        signed = sign(here / "artifact", key, here / f"{key.name}.json", passphrase=lambda: "secret")
        assert signature_problem(here / "artifact", everyone, signed.path) == ("", signed.signer)
    for wrong in (None, lambda: "wrong"):
        with pytest.raises(GraftError) as caught:
            sign(here / "artifact", keys[3], here / "e.json", passphrase=wrong)
        assert caught.value.code == "GC094" and "secret" not in str(caught.value)
    assert not (here / "e.json").exists()


@pytest.mark.parametrize("what", ["rsa", "public", "text", "nothing", "folder", "certificate"])
def test_unusable_keys(here: Path, what: str) -> None:
    path = write_key(here, "key", rsa_key(65537, 2048) if what == "rsa" else None)
    keys = path.with_suffix(".pub")
    if what == "public":
        path, keys = keys, path  # the wrong way round
    elif what == "text":
        path.write_text("hello")
        keys.write_text("hello")
    elif what == "nothing":
        path = keys = here / "missing"
    elif what == "folder":
        path = keys = here / "artifact"
    elif what == "certificate":
        path.write_text("-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n")
        keys.write_text("-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n")
    for call in (lambda: sign(here / "artifact", path), lambda: signature_problem(here / "artifact", keys)):
        with pytest.raises(GraftError) as caught:
            call()
        assert caught.value.code == "GC094" and "\n" not in caught.value.message
    assert not (here / "artifact.dsse.json").exists()


def test_only_whole_folders_are_signed(here: Path) -> None:
    key = write_key(here, "key")
    with (here / "artifact" / "adapters.safetensors").open("ab") as file:
        file.write(b"x")
    (here / "merged" / "more.txt").write_text("more")
    codes = []
    for folder in ("artifact", "merged", "missing"):
        with pytest.raises(GraftError) as caught:
            sign(here / folder, key)
        codes.append(caught.value.code)
        assert not (here / f"{folder}.dsse.json").exists()
    assert codes == ["GC082", "GC085", "GC080"]


def test_folders_state_the_code_that_wrote_them(here: Path) -> None:
    for name in ("artifact/manifest.json", "merged/graftc.json"):
        assert json.loads((here / name).read_text(encoding="utf-8"))["versions"]["code"] == code_digest()
