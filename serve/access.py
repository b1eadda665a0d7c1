"""Who asks, and whether they may: API keys and bearer tokens with scopes, and a rate limit for each client."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from dataclasses import dataclass

import jwt
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from serve.access_keys import PREFIX, KeyFile
from serve.problems import ProblemError
from serve.service_settings import AccessSettings
from serve.tokens import TokenChecker
from ssacl.errors import ConfigError

logger = logging.getLogger(__name__)
_CHALLENGE = 'Bearer realm="ssacl"'


@dataclass(frozen=True)
class Client:
    """Who asks. `name` may stand in the audit log: a key's name, or a hash of what a token says."""

    name: str
    scopes: frozenset[str] | None
    """None: everything, where access is off."""


ANYBODY = Client("anybody", None)


class AccessControl:
    """
    Raises
    ------
    ConfigError
        The file of keys cannot be read.
    """

    def __init__(self, settings: AccessSettings) -> None:
        self._settings = settings
        self._keys = KeyFile(settings.keys_file) if settings.keys_file else None
        self._tokens = TokenChecker(settings.jwt) if settings.jwt else None
        self._limiter = FixedWindowRateLimiter(MemoryStorage())
        self._requests = RateLimitItemPerMinute(settings.requests_per_minute)
        self._failures = RateLimitItemPerMinute(settings.failures_per_minute)

    @property
    def is_on(self) -> bool:
        """Whether anybody is asked who they are."""
        return self._settings.is_on

    def client_of(self, authorization: str, api_key: str, address: str) -> Client:
        """Who asks, by the headers Authorization (Bearer) or X-API-Key.

        Raises
        ------
        ProblemError
            401 no valid credentials, 429 too many requests or refused credentials, 503 credentials cannot be checked now.
        """
        if not self._settings.is_on:
            return ANYBODY
        try:
            client = self._identify(authorization, api_key)
        except ConfigError as error:
            # Of the endpoint's own files or provider: nothing that the client could mend, and its text names the inside.
            logger.error("%s", error)
            raise ProblemError(503, "access", "Credentials cannot be checked", "Tell the operator, then try again.", 30) from None
        except ProblemError as problem:
            if problem.status == 401 and not self._limiter.hit(self._failures, "failure", address):
                raise self._too_many(self._failures, "failure", address) from None
            raise
        if not self._limiter.hit(self._requests, "request", client.name):
            raise self._too_many(self._requests, "request", client.name)
        return client

    def check_scope(self, client: Client, scope: str) -> None:
        """
        Raises
        ------
        ProblemError
            403 the client may do other things only.
        """
        if client.scopes is None or scope in client.scopes:
            return
        challenge = f'{_CHALLENGE}, error="insufficient_scope", scope="{scope}"'
        raise ProblemError(
            403, "scope", "Not allowed", f"These credentials do not hold the scope {scope}.", headers={"www-authenticate": challenge}
        )

    def _identify(self, authorization: str, api_key: str) -> Client:
        scheme, _, credentials = authorization.strip().partition(" ")
        given = api_key.strip() or (credentials.strip() if scheme.lower() == "bearer" else "")
        if not given:
            raise _refused("Credentials are needed: Authorization: Bearer with an API key or a token.", _CHALLENGE)
        if given.startswith(PREFIX):
            key = self._keys.find(given) if self._keys else None
            if key is not None:
                return Client(f"key:{key.name}", frozenset(key.scopes))
        elif self._tokens is not None:
            return self._client_of_token(self._tokens, given)
        raise _refused("The credentials are not valid.", f'{_CHALLENGE}, error="invalid_token"')

    @staticmethod
    def _client_of_token(tokens: TokenChecker, token: str) -> Client:
        try:
            claims = tokens.claims(token)
        except jwt.ExpiredSignatureError:
            raise _refused("The token has expired.", f'{_CHALLENGE}, error="invalid_token", error_description="expired"') from None
        # Its text would quote the token.
        except (jwt.PyJWTError, ValueError, TypeError):
            raise _refused("The token is not valid.", f'{_CHALLENGE}, error="invalid_token"') from None
        scopes = claims.get("scope", "")
        named = scopes.split() if isinstance(scopes, str) else [item for item in scopes if isinstance(item, str)]
        identity = hashlib.sha256(f"{claims['iss']}\n{claims['sub']}".encode()).hexdigest()[:32]
        return Client(f"token:{identity}", frozenset(named))

    def _too_many(self, limit: RateLimitItemPerMinute, *identifiers: str) -> ProblemError:
        reset_at = self._limiter.get_window_stats(limit, *identifiers).reset_time
        wait_s = max(1, math.ceil(reset_at - time.time()))
        return ProblemError(429, "rate", "Too many requests", f"At most {limit.amount} a minute. Try again later.", wait_s)


def _refused(detail: str, challenge: str) -> ProblemError:
    return ProblemError(401, "credentials", "Who asks is not known", detail, headers={"www-authenticate": challenge})
