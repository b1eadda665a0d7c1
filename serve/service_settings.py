"""Settings of who may use the endpoint, what is recorded of it, and how long answers are kept."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ssacl.errors import ConfigError

Scope = Literal["reports:write", "reports:read", "models:read", "metrics:read", "studies:write"]
"""The last one is asked for by the gateway's STOW-RS receiver, the others by the endpoint."""
Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA"]
"""Signatures of a private key. None of a shared secret: whoever could check a token could then make one."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class JwtSettings(_Part):
    """Bearer tokens of an identity provider (RFC 7519, RFC 9068); scopes stand in the claim `scope`."""

    issuer: str = Field(min_length=1, description="The claim `iss`.")
    audience: str = Field(min_length=1, description="The claim `aud`.")
    jwks: str = Field(
        # What a token itself names as its key's place is never looked at.
        pattern=r"^(https://[^@]+|http://(127\.0\.0\.1|localhost)[:/][^@]*|[^:]+)$",
        description="File with the provider's public keys (RFC 7517), or their https address.",
    )
    algorithms: tuple[Algorithm, ...] = Field(("RS256", "ES256"), min_length=1)
    leeway_s: float = Field(30.0, ge=0, le=300, description="Clocks may differ by this much.")
    refresh_s: float = Field(300.0, gt=0, description="How long the provider's keys are trusted before they are read again.")


class AccessSettings(_Part):
    """Off where neither keys nor tokens are set; then only this machine is served."""

    keys_file: Path | None = Field(None, description="File of `ssacl access add`: names, hashes and scopes of API keys.")
    jwt: JwtSettings | None = None
    requests_per_minute: int = Field(240, ge=1, description="Of one client, at each ingress replica; beyond it 429.")
    failures_per_minute: int = Field(30, ge=1, description="Refused credentials of one address; beyond it 429.")
    insecure: bool = Field(False, description="Serve other machines though nobody is asked who they are.")

    @property
    def is_on(self) -> bool:
        return self.keys_file is not None or self.jwt is not None


class KeptSettings(_Part):
    """Answers to `Prefer: respond-async`; without `url` every answer is given at once."""

    url: str | None = Field(None, description="Folder or s3:// prefix, for nothing else; it holds reports, so protect it like an archive.")
    retention_s: float = Field(3600.0, gt=0, le=30 * 86400.0, description="An answer is deleted this long after its request was accepted.")
    max_pending: int = Field(32, ge=1, description="Requests accepted and not answered yet, at each ingress replica; beyond it 503.")


class ServiceSettings(_Part):
    access: AccessSettings = AccessSettings()
    kept: KeptSettings = KeptSettings()
    audit_file: Path | None = Field(None, description="FHIR AuditEvents are appended here, one JSON object a line.")

    def check_exposure(self, host: str) -> None:
        """
        Raises
        ------
        ConfigError
            Other machines would be served without being asked who they are.
        """
        if self.access.is_on or self.access.insecure or is_loopback(host):
            return
        raise ConfigError(
            f"{host} can be reached by other machines and no access is set up. Give API keys (`ssacl access add`, then --keys FILE) or "
            "service.access.jwt; or --insecure where something else asks who they are."
        )


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
