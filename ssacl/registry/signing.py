"""Ed25519 signatures of model records. Keys are PEM files; the private one stays where models are registered."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ssacl.errors import RegistryError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

SIGNING_KEY, PUBLIC_KEY = "SSACL_MODEL_SIGNING_KEY", "SSACL_MODEL_PUBLIC_KEY"
"""Variables that name the files. Where a public key is named, nothing without its signature is accepted."""


def new_keys(private: Path, public: Path) -> None:
    """Write a new pair of keys; the private file can be read by its owner alone.

    Raises
    ------
    RegistryError
        A file is there already or cannot be written.
    """
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    contents = {
        private: key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()),
        public: key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo),
    }
    for path, content in contents.items():
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if path == private else 0o644), "wb") as file:
                file.write(content)
        except OSError as error:
            raise RegistryError(f"Cannot write the key {path} ({error.strerror}); keys are never replaced. Choose another name.") from error


def sign(record: bytes) -> bytes | None:
    """The signature of a record by the key that `SSACL_MODEL_SIGNING_KEY` names; none without one."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    path = os.environ.get(SIGNING_KEY)
    if not path:
        return None
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(Path(path).read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(SIGNING_KEY, path) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _unreadable(SIGNING_KEY, path)
    return key.sign(record)


def check_signature(record: bytes, signature: bytes | None, name: str) -> str:
    """What is known of the signature of `name`: "signed", "signed, not checked" or "not signed".

    Raises
    ------
    RegistryError
        `SSACL_MODEL_PUBLIC_KEY` names a key, and the signature is missing or is not that key's.
    """
    path = os.environ.get(PUBLIC_KEY)
    if not path:
        return "not signed" if signature is None else f"signed, not checked (no {PUBLIC_KEY})"
    if signature is None:
        raise RegistryError(f"{name} is not signed, and {PUBLIC_KEY} asks for signatures. Register it again with {SIGNING_KEY} set.")
    from cryptography.exceptions import InvalidSignature

    try:
        _public_key(path).verify(signature, record)
    except InvalidSignature as error:
        raise RegistryError(
            f"The signature of {name} is not by the key in {PUBLIC_KEY}: the record was changed, or another key signed it. Do not use it; "
            "look who can write to the registry."
        ) from error
    return "signed"


def _public_key(path: str) -> Ed25519PublicKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise _unreadable(PUBLIC_KEY, path) from error
    if not isinstance(key, Ed25519PublicKey):
        raise _unreadable(PUBLIC_KEY, path)
    return key


def _unreadable(variable: str, path: str) -> RegistryError:
    return RegistryError(f"{variable} names {path}, which is no Ed25519 key in PEM form. ssacl model keys makes a pair.")
