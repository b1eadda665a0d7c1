"""The gateway's configuration: one YAML file, read once; unknown keys fail."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serve.service_settings import AccessSettings
from ssacl.errors import ConfigError

AeTitle = Annotated[str, Field(min_length=1, max_length=16, pattern=r"^[ -\[\]-~]*[!-\[\]-~][ -\[\]-~]*$")]
"""PS3.5 section 6.2: up to 16 characters, no backslash, not blank."""
Subject = Literal["frontal", "lateral", "not_chest", "not_human", "not_radiography", "multi_frame", "unreadable"]
"""What the header says is on the film: "frontal", or why it is none (`ssacl.data.subject`)."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ServerTls(_Part):
    """TLS of the listening side. With it plain connections are refused."""

    certificate: Path = Field(description="PEM file with the chain.")
    private_key: Path = Field(description="PEM file.")
    client_ca: Path | None = Field(None, description="PEM file; callers must then show a certificate signed by it.")


class ClientTls(_Part):
    """TLS towards a destination."""

    ca: Path | None = Field(None, description="PEM file that the destination's certificate is checked against; none: the system's.")
    certificate: Path | None = Field(None, description="PEM file of our own certificate, where the destination asks for one.")
    private_key: Path | None = Field(None, description="PEM file of its key.")


class CStoreDestination(_Part):
    """An archive that takes results by C-STORE."""

    kind: Literal["c-store"]
    host: str
    port: int = Field(ge=1, le=65535)
    ae_title: AeTitle
    tls: ClientTls | None = None


class StowDestination(_Part):
    """An archive that takes results by STOW-RS. DICOMWEB_USER and DICOMWEB_PASSWORD, or DICOMWEB_TOKEN, are sent where they are set."""

    kind: Literal["stow-rs"]
    url: str = Field(pattern=r"^https?://[^@]+$", description="DICOMweb root, without credentials.")


Destination = Annotated[CStoreDestination | StowDestination, Field(discriminator="kind")]


class Rule(_Part):
    """What is done with an instance that meets all conditions given; the first such rule counts."""

    calling_ae: tuple[AeTitle, ...] | None = Field(None, description="Callers by C-STORE; none given: any, and those by STOW-RS too.")
    client: tuple[str, ...] | None = Field(None, description='Callers by STOW-RS: "key:NAME" for an API key; none given: any.')
    modality: tuple[str, ...] | None = Field(None, description="DICOM Modality values.")
    view: tuple[str, ...] | None = Field(None, description='View positions ("PA", "AP", ...; "" for films that name none).')
    subject: tuple[Subject, ...] | None = Field(None, description="What the header says is on the film.")
    action: Literal["report", "pass", "refuse"] = Field(
        description="report: read it and send results. pass: take it, make nothing of it. refuse: answer the C-STORE with a failure."
    )
    reason: str = Field("", max_length=64, pattern=r"^[ -\[\]-~]*$", description="Told to the caller and kept in the record.")
    destinations: tuple[str, ...] | None = Field(None, description="Names of destinations; none given: all.")


class Web(_Part):
    """The STOW-RS receiver (PS3.18 section 10.5)."""

    host: str = Field("127.0.0.1", description="Address to listen on; another machine's callers need `access`.")
    port: int = Field(8043, ge=0, le=65535, description="0 takes a free one.")
    tls: ServerTls | None = None
    access: AccessSettings = Field(AccessSettings(), description="As of the endpoint; the scope is studies:write.")
    max_requests: int = Field(4, ge=1, description="Answered at once; memory: about twice `limits.max_instance_bytes` for each.")
    max_instances: int = Field(10_000, ge=1, description="Of one request; beyond it 413.")


class Figures(_Part):
    """Where Prometheus reads. Nobody is asked who they are; figures hold nothing of patients."""

    host: str = "127.0.0.1"
    port: int = Field(9464, ge=0, le=65535, description="0 takes a free one.")


class Endpoint(_Part):
    """The HTTP endpoint that writes the reports."""

    url: str = Field("http://127.0.0.1:8000/v1/reports", pattern=r"^https?://[^@]+$")
    authorization_env: str | None = Field(None, description="Environment variable with the value of the Authorization header.")
    ca: Path | None = Field(None, description="PEM file that the endpoint's certificate is checked against.")
    timeout_s: float = Field(200.0, gt=0, description="Longest wait for one report; above the endpoint's own limit.")


class Limits(_Part):
    """Bounds. Beyond them a C-STORE is answered with 0xA700, out of resources, and the caller tries again later."""

    max_instances: int = Field(2000, ge=1, description="Instances that wait.")
    max_spool_bytes: int = Field(20 << 30, ge=1 << 20, description="Bytes of those instances and of their results.")
    min_free_bytes: int = Field(2 << 30, ge=0, description="Disk space that stays free.")
    max_instance_bytes: int = Field(200 << 20, ge=1 << 10, le=1 << 30, description="Of one instance; a longer one ends its association.")
    max_associations: int = Field(8, ge=1, description="Callers at once.")
    network_timeout_s: float = Field(60.0, gt=0, description="Silence after which an association ends.")


class Retry(_Part):
    """Waiting doubles from `first_s` to `longest_s`."""

    first_s: float = Field(2.0, gt=0)
    longest_s: float = Field(300.0, gt=0)
    max_attempts: int = Field(10, ge=1, description="Failures that may be the instance's own fault, before it is quarantined.")
    give_up_after_s: float = Field(7 * 86400.0, gt=0, description="Age at which an instance is quarantined though the other side is away.")


class Retention(_Part):
    """How long what is settled stays."""

    done_s: float = Field(
        30 * 86400.0, gt=0, description="Record of a settled instance (no pixels, no names): so long duplicates are known."
    )
    quarantine_s: float = Field(30 * 86400.0, gt=0, description="Quarantined instance, with its pixels.")


class GatewayConfig(_Part):
    """Everything that shapes the gateway."""

    ae_title: AeTitle = "SSACL"
    host: str = "0.0.0.0"  # noqa: S104  A DICOM node is called by others; the AE list and TLS say by whom.
    port: int = Field(11112, ge=0, le=65535, description="0 takes a free one.")
    calling_ae: tuple[AeTitle, ...] = Field(min_length=1, description="AE titles that may call; all others are rejected.")
    tls: ServerTls | None = None
    secondary_capture: bool = Field(False, description="Take Secondary Capture images too, as scanners of old films send them.")
    web: Web | None = Field(None, description="Without it no STOW-RS is received.")
    metrics: Figures | None = Field(None, description="Without it no figures are given.")
    audit_file: Path | None = Field(None, description="FHIR AuditEvents are appended here, one JSON object a line.")
    spool: Path = Field(description="Folder of the spool, on a disk of this machine.")
    endpoint: Endpoint = Endpoint()
    destinations: dict[str, Destination] = Field(min_length=1)
    rules: tuple[Rule, ...] = (Rule(subject=("frontal",), action="report"),)
    otherwise: Literal["pass", "refuse"] = Field("pass", description="Done with what no rule meets.")
    num_couriers: int = Field(2, ge=1, le=64, description="Instances worked on at once.")
    limits: Limits = Limits()
    retry: Retry = Retry()
    retention: Retention = Retention()

    @model_validator(mode="after")
    def _destinations_exist(self) -> GatewayConfig:
        for number, rule in enumerate(self.rules):
            unknown = set(rule.destinations or ()) - set(self.destinations)
            if unknown:
                raise ValueError(f"rule {number} names destinations that are not there: {', '.join(sorted(unknown))}")
        return self


def load_gateway_config(path: str | Path) -> GatewayConfig:
    """
    Raises
    ------
    ConfigError
        The file cannot be read, is no YAML, or holds a key or value that is not allowed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The gateway's configuration {path} cannot be read. `ssacl gateway --help` shows a short one.") from error
    return parse_gateway_config(text, str(path))


def parse_gateway_config(text: str, name: str = "configuration") -> GatewayConfig:
    """See `load_gateway_config`; `name` stands in messages."""
    try:
        return GatewayConfig.model_validate(yaml.safe_load(text) or {})
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not YAML: {getattr(error, 'problem', None) or 'damaged'}.") from error
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'top level'}: {item['msg']}" for item in error.errors())
        raise ConfigError(f"{name}: {faults}. docs/GATEWAY.md lists the keys.") from error
