"""Bearer tokens (JWT, RFC 7519) checked against the keys of one identity provider."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import httpx
import jwt

from serve.service_settings import JwtSettings
from ssacl.errors import ConfigError

_MAX_JWKS_BYTES = 256 << 10
_MAX_TOKEN_CHARS = 8192
_RETRY_S = 30.0
"""Between two readings that unknown key ids ask for: nobody makes us call the provider at will."""


class TokenChecker:
    """Keys are read when the first token comes, and again when they are old or a token names a new one."""

    def __init__(self, settings: JwtSettings) -> None:
        self._settings = settings
        self._guard = threading.Lock()
        self._keys: list[jwt.PyJWK] = []
        self._read_at = self._tried_at = float("-inf")

    def claims(self, token: str) -> dict[str, Any]:
        """The claims of a valid token.

        Raises
        ------
        jwt.InvalidTokenError
            Damaged, of another issuer or audience, expired, or not signed by a key of the provider.
        ConfigError
            The provider's keys cannot be read.
        """
        if len(token) > _MAX_TOKEN_CHARS:
            raise jwt.InvalidTokenError
        key_id = jwt.get_unverified_header(token).get("kid")
        key = self._key(key_id if isinstance(key_id, str) else None)
        claims: dict[str, Any] = jwt.decode(
            token,
            key.key,
            # Fixed by the settings, never by the token.
            algorithms=list(self._settings.algorithms),
            audience=self._settings.audience,
            issuer=self._settings.issuer,
            leeway=self._settings.leeway_s,
            options={"require": ["exp", "iss", "aud", "sub"]},
        )
        return claims

    def _key(self, key_id: str | None) -> jwt.PyJWK:
        with self._guard:
            now = time.monotonic()
            found = self._named(key_id)
            if now - self._read_at > self._settings.refresh_s or (found is None and now - self._tried_at > _RETRY_S):
                self._tried_at = now
                self._keys, self._read_at = self._read(), now
                found = self._named(key_id)
        if found is None:
            raise jwt.InvalidTokenError
        return found

    def _named(self, key_id: str | None) -> jwt.PyJWK | None:
        if key_id is None:
            return self._keys[0] if len(self._keys) == 1 else None
        return next((key for key in self._keys if key.key_id == key_id), None)

    def _read(self) -> list[jwt.PyJWK]:
        place = self._settings.jwks
        try:
            content = _fetch(place) if place.startswith(("https://", "http://")) else _load(Path(place))
            keys = jwt.PyJWKSet.from_json(content.decode()).keys
        except (OSError, ValueError, httpx.HTTPError, jwt.PyJWTError) as error:
            raise ConfigError("The identity provider's keys (service.access.jwt.jwks) cannot be read.") from error
        return [key for key in keys if key.public_key_use in (None, "sig")]


def _load(path: Path) -> bytes:
    with path.open("rb") as file:
        return _bounded(file.read(_MAX_JWKS_BYTES + 1))


def _fetch(url: str) -> bytes:
    # A redirect would lead to an address that the settings do not name.
    with httpx.Client(timeout=5.0, follow_redirects=False, trust_env=False) as client, client.stream("GET", url) as answer:
        answer.raise_for_status()
        content = b""
        for chunk in answer.iter_bytes():
            content = _bounded(content + chunk)
        return content


def _bounded(content: bytes) -> bytes:
    if len(content) > _MAX_JWKS_BYTES:
        raise ValueError("too long")
    return content
