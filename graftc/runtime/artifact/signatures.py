"""Sign the folders that graftc wrote, and check signatures.

One file of a folder lists all others with their digests: ``manifest.json`` of an artifact, ``graftc.json`` of a merged
model. A signature is a DSSE envelope next to the folder, with an in-toto statement that names this file and its
SHA-256. It covers the whole folder, and with it what the file states: base, certificate, versions and code, and the
adapter that was merged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftc.files.writing import write_text
from graftc.runtime.artifact.fields import MANIFEST_BYTES
from graftc.runtime.artifact.manifest import MANIFEST
from graftc.runtime.artifact.places import RECORD
from graftc.runtime.artifact.read import open_artifact, open_merged
from graftc.specs.errors.arguments import absolute_path
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.regular_files import read_regular
from graftc.specs.strict_json import read_json

if TYPE_CHECKING:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import SSlibKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT, _PREDICATE = "https://in-toto.io/Statement/v1", "urn:graftc:sealed-folder:1"
_MOST = 2**16
"""Bytes of a file of keys or of a signature, at most."""


@dataclass(frozen=True)
class FolderSignature:
    """A signature that was written.

    Attributes:
        path: its file.
        signer: the fingerprint of the key, as ``ssh-keygen -lf`` prints it.
        file: the file of the folder that lists all others.
        sha256: the digest of that file, which the signature covers.
    """

    path: Path
    signer: str
    file: str
    sha256: str


def signature_path(folder: str | Path, file: str | Path | None = None) -> Path:
    """Return the absolute path of a folder's signature: ``FOLDER.dsse.json`` beside the folder if no file is named."""
    if file is not None:
        return absolute_path(file)
    place = absolute_path(folder)
    return place.with_name(f"{place.name}.dsse.json")


def sign(
    folder: str | Path,
    key: str | Path,
    out: str | Path | None = None,
    *,
    passphrase: Callable[[], str] | None = None,
    force: bool = False,
) -> FolderSignature:
    """Check the files of an artifact or of a merged model's folder, and sign it.

    Args:
        folder: the folder.
        key: an Ed25519 or ECDSA private key in OpenSSH's or in PEM format, such as ``ssh-keygen -t ed25519`` writes.
        out: the file of the signature; by default as in `signature_path`.
        passphrase: called for the passphrase of an encrypted key.
        force: whether to replace an existing file.

    Raises:
        GraftError: GC061 without securesystemslib; GC063 or GC064 for a file that cannot be written; GC080 to GC085 if
            the folder is not one, or is not as it was written; GC094 for a key that cannot be used.
    """
    _require_library()
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner

    place, path = absolute_path(folder), signature_path(folder, out)
    private = _private_key(Path(key), passphrase)
    public = _named(private.public_key(), Path(key))
    name, sha256 = _sealing(place, str(folder))
    statement = {
        "_type": _STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": sha256}}],
        "predicateType": _PREDICATE,
        "predicate": {},
    }
    envelope = Envelope(json.dumps(statement, sort_keys=True).encode(), PAYLOAD_TYPE, {})
    envelope.sign(CryptoSigner(private, public))
    write_text(path, json.dumps(envelope.to_dict(), indent=1) + "\n", force=force)
    return FolderSignature(path, public.keyid, name, sha256)


def signature_problem(folder: str | Path, keys: str | Path, signature: str | Path | None = None) -> tuple[str, str]:
    """Check that one of the keys signed a folder as it is now.

    Args:
        folder: an artifact or a merged model's folder.
        keys: a file of public keys: lines as in ``.pub`` files of OpenSSH, or one key in PEM format.
        signature: the file of the signature; by default as in `signature_path`.

    Returns:
        The problem and the signer, one of which is empty.

    Raises:
        GraftError: GC061 without securesystemslib; GC080 if the folder is neither; GC094 for keys that cannot be used.
    """
    _require_library()
    trusted = list(_public_keys(Path(keys)))
    place, path = absolute_path(folder), signature_path(folder, signature)
    name = _sealing_file(place, str(folder))
    try:
        envelope = _envelope(path)
        signers = _signers(envelope, trusted)
        stated = _subject(envelope.payload)
    except (OSError, ValueError) as error:
        return f"{path}: {error}", ""
    if envelope.payload_type != PAYLOAD_TYPE:
        return f"{path} is a signature of {envelope.payload_type!r}", ""
    if not signers:
        others = ", ".join(sorted(envelope.signatures)) or "nobody"
        if not any(key.keyid in envelope.signatures for key in trusted):
            return f"signed by {others}, which {keys} does not contain", ""
        return f"the signature by {others} is not valid for these contents", ""
    if stated != {name: _digest(place / name)}:
        return f"the signature is of another {name}", ""
    return "", ", ".join(signers)


def _require_library() -> None:
    """Refuse to go on without the library that signs.

    Raises:
        GraftError: GC061.
    """
    try:
        import cryptography  # noqa: F401
        import securesystemslib  # noqa: F401
    except ImportError:
        raise GraftError(
            "GC061", "signatures need the package securesystemslib", hint="pip install 'graftc[sign]'"
        ) from None


def _sealing_file(folder: Path, where: str) -> str:
    """Return the name of the file that lists all others of a folder."""
    name = next((name for name in (MANIFEST, RECORD) if (folder / name).is_file()), None)
    if name is None:
        message = f"{where} is neither an artifact nor a merged model with its {RECORD}"
        raise GraftError("GC080", message, hint="pass a folder that compiled.save or merged.save wrote")
    return name


def _sealing(folder: Path, where: str) -> tuple[str, str]:
    """Return the name and the digest of the file that lists all others, once all are as it says."""
    name = _sealing_file(folder, where)
    before = _digest(folder / name)
    if name == MANIFEST:
        open_artifact(folder)
    else:
        open_merged(folder, where)
    if _digest(folder / name) != before:
        raise GraftError("GC082", f"{where} changes while it is signed: {name}", hint="sign it again")
    return name, before


def _digest(path: Path) -> str:
    return hashlib.sha256(read_regular(path, MANIFEST_BYTES)).hexdigest()


def _envelope(path: Path) -> Envelope:
    """Return the envelope in a file; raise `ValueError` for a file that is not one."""
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import Error

    try:
        return Envelope.from_dict(read_json(read_regular(path, _MOST), _MOST))
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError, Error) as error:
        raise ValueError(f"not a DSSE envelope ({type(error).__name__})") from error


def _signers(envelope: Envelope, trusted: list[SSlibKey]) -> list[str]:
    from securesystemslib.exceptions import Error, VerificationError

    try:
        return sorted(envelope.verify(list(trusted), 1))
    except VerificationError:
        return []
    except Error as error:
        raise ValueError(str(error)) from error


def _subject(payload: bytes) -> dict[str, str]:
    """Return the files that a statement is about, with their digests; raise `ValueError` for another statement."""
    try:
        statement = read_json(payload, _MOST)
        if (statement["_type"], statement["predicateType"]) != (_STATEMENT, _PREDICATE):
            raise ValueError("a statement about something else than a folder of graftc")
        return {str(each["name"]): str(each["digest"]["sha256"]) for each in statement["subject"]}
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("not an in-toto statement") from error


def _private_key(path: Path, passphrase: Callable[[], str] | None) -> Any:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

    raw = _read_key(path)
    if raw.lstrip().startswith((b"ssh-", b"ecdsa-", b"-----BEGIN PUBLIC")):
        raise _unusable(path, "is a public key", "name the private key that belongs to it")
    load = load_ssh_private_key if b"OPENSSH PRIVATE KEY" in raw else load_pem_private_key
    try:
        try:
            return load(raw, password=None)
        except TypeError:  # encrypted
            if passphrase is None:
                raise _unusable(path, "is encrypted", "name a passphrase") from None
            return load(raw, password=passphrase().encode())
    except GraftError:
        raise
    except Exception as error:
        raise _unusable(path, f"cannot be read as a private key: {error}", "ssh-keygen -t ed25519 makes one") from error


def _public_keys(path: Path) -> Iterator[SSlibKey]:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key, load_ssh_public_key

    raw = _read_key(path)
    lines = [line for line in raw.splitlines() if line.strip() and not line.lstrip().startswith(b"#")]
    if b"PRIVATE KEY" in raw:
        raise _unusable(path, "is a private key", "name its public key, FILE.pub")
    try:
        if raw.lstrip().startswith(b"-----BEGIN"):
            yield _named(load_pem_public_key(raw), path)
        else:
            yield from [_named(load_ssh_public_key(line), path) for line in lines]
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _unusable(path, f"cannot be read as public keys: {error}", "name a .pub file of ssh-keygen") from error
    if not lines:
        raise _unusable(path, "contains no keys", "name a .pub file of ssh-keygen")


def _read_key(path: Path) -> bytes:
    try:
        return read_regular(path, _MOST)
    except OSError as error:
        raise _unusable(path, f"cannot be read: {error.strerror or error}", "name a file") from error


def _named(public: Any, path: Path) -> SSlibKey:
    """Return a public key whose id is the fingerprint that OpenSSH shows."""
    import base64

    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    from securesystemslib.signer import SSlibKey

    if not isinstance(public, Ed25519PublicKey | EllipticCurvePublicKey):
        kind = type(public).__name__.removesuffix("PublicKey").removeprefix("_")
        raise _unusable(path, f"is a key for {kind}", "use Ed25519: ssh-keygen -t ed25519")
    blob = base64.b64decode(public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[1])
    fingerprint = base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
    try:
        return SSlibKey.from_crypto(public, keyid=f"SHA256:{fingerprint}")
    except ValueError as error:
        raise _unusable(path, f"cannot be used: {error}", "use Ed25519: ssh-keygen -t ed25519") from error


def _unusable(path: Path, problem: str, hint: str) -> GraftError:
    return GraftError("GC094", f"{path} {problem}", hint=hint)
