"""Who may use the endpoint: keys, tokens, scopes, rates; and what is recorded of it."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from api_calls import audited, call, made_api
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from report_endpoint import InProcess
from tiny_model import encoded_film, tiny_model_folder

from serve.access_keys import add_key, read_keys, revoke_key
from serve.app import run_server
from serve.service_settings import ServiceSettings
from serve.settings import ServeSettings
from ssacl.cli import main
from ssacl.errors import ConfigError, StorageError

ISSUER, AUDIENCE = "https://idp.example.org", "ssacl-endpoint"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> InProcess:
    return InProcess(tiny_model_folder(tmp_path_factory.mktemp("model") / "model"))


def refused(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    tree: dict[str, Any] = answer.json()
    return tree


def test_keys_scopes_and_the_audit_log(gateway: InProcess, tmp_path: Path) -> None:
    keys, log = tmp_path / "keys.json", tmp_path / "audit.jsonl"
    reader, writer = add_key(keys, "dashboard", ["models:read"]), add_key(keys, "pacs", ["reports:write"])
    expired = add_key(keys, "former", ["models:read"], datetime.now(UTC) - timedelta(seconds=1))
    assert keys.stat().st_mode & 0o077 == 0
    assert not any(key in keys.read_text() for key in (reader, writer, expired))
    api = made_api(gateway, access={"keys_file": str(keys)}, audit_file=str(log))
    film = {"content": encoded_film("DICOM"), "headers": {"content-type": "application/dicom"}}

    for wrong in (None, "", "ssacl_guess", expired, reader + "x", "a.b.c"):
        answer = call(api, "GET", "/v1/models", wrong)
        refused(answer, 401)
        assert answer.headers["www-authenticate"].startswith('Bearer realm="ssacl"')
    assert call(api, "GET", "/v1/models", reader).status_code == 200
    assert call(api, "GET", "/v1/models", headers={"x-api-key": reader}).status_code == 200
    before = gateway.num_reports
    answer = call(api, "POST", "/v1/reports", reader, **film)
    refused(answer, 403)
    assert 'scope="reports:write"' in answer.headers["www-authenticate"]
    assert gateway.num_reports == before
    assert call(api, "POST", "/v1/reports", writer, **film).status_code == 200
    # Nothing is told of what is there before it is known who asks.
    refused(call(api, "GET", "/nothing"), 401)
    refused(call(api, "GET", "/nothing", reader), 404)
    refused(call(api, "GET", "/metrics", reader), 403)
    for public in ("/healthz", "/readyz", "/openapi.json"):
        assert call(api, "GET", public).status_code == 200

    revoke_key(keys, "dashboard")
    refused(call(api, "GET", "/v1/models", reader), 401)
    assert [key.name for key in read_keys(keys)] == ["pacs", "former"]

    events = audited(log)
    told = [(event.subtype[0].code, event.agent[0].who.identifier.value, event.outcomeDesc) for event in events]
    assert told == [
        *[("models.read", "unknown", "401")] * 6,
        *[("models.read", "key:dashboard", "200")] * 2,
        ("report.create", "key:dashboard", "403"),
        ("report.create", "key:pacs", "200"),
        ("unknown", "unknown", "401"),
        ("unknown", "key:dashboard", "404"),
        ("metrics.read", "key:dashboard", "403"),
        ("models.read", "unknown", "401"),
    ]
    assert [event.outcome for event in events][:10] == ["4"] * 6 + ["0", "0", "4", "0"]
    assert all(event.agent[0].network.address for event in events)
    assert len(events[9].entity) == 2
    assert len(events[8].entity) == 1
    assert not any(hidden in log.read_text() for hidden in ("PLANTED", reader, writer, "/nothing"))


def test_no_record_no_answer(gateway: InProcess, tmp_path: Path) -> None:
    log = Path("/dev/full")
    if not log.exists():
        pytest.skip("this system has no /dev/full")
    refused(call(made_api(gateway, audit_file=str(log)), "GET", "/v1/models"), 503)


@pytest.mark.parametrize("kind", ["RS256", "ES256"])
def test_bearer_tokens(gateway: InProcess, tmp_path: Path, kind: str) -> None:
    make = {"RS256": lambda: rsa.generate_private_key(65537, 2048), "ES256": lambda: ec.generate_private_key(ec.SECP256R1())}[kind]
    own, foreign = make(), make()
    algorithm = jwt.get_algorithm_by_name(kind)
    jwks, log = tmp_path / "jwks.json", tmp_path / "audit.jsonl"
    public = json.loads(algorithm.to_jwk(own.public_key())) | {"kid": "one", "use": "sig"}
    jwks.write_text(json.dumps({"keys": [public]}))
    api = made_api(
        gateway,
        access={"jwt": {"issuer": ISSUER, "audience": AUDIENCE, "jwks": str(jwks), "leeway_s": 0}},
        audit_file=str(log),
    )

    def token(key: Any = own, algorithm: str = kind, kid: str = "one", **changes: Any) -> str:
        claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "DOE-JOHN", "exp": time.time() + 60, "scope": "models:read reports:read"}
        claims |= changes
        return jwt.encode({name: value for name, value in claims.items() if value is not None}, key, algorithm, headers={"kid": kid})

    assert call(api, "GET", "/v1/models", token()).status_code == 200
    bad = {
        "expired": token(exp=time.time() - 5),
        "no expiry": token(exp=None),
        "not yet valid": token(nbf=time.time() + 60),
        "another issuer": token(iss="https://elsewhere.example.org"),
        "another audience": token(aud="something-else"),
        "no subject": token(sub=None),
        "another key": token(foreign),
        "unknown key id": token(kid="two"),
        "unsigned": token(None, "none"),
        "signed with the public key as a secret": token(public["n" if kind == "RS256" else "x"], "HS256"),
        "cut": token()[:-8],
        "huge": token(padding="x" * 9000),
        "no token": "eyJ" * 20,
    }
    for name, given in bad.items():
        answer = call(api, "GET", "/v1/models", given)
        assert answer.status_code == 401, name
        assert 'error="invalid_token"' in answer.headers["www-authenticate"]
    refused(call(api, "POST", "/v1/reports", token()), 403)
    refused(call(api, "GET", "/v1/models", token(scope=None)), 403)
    # A key that the provider no longer publishes counts until the keys are read again; an address in a token is never read.
    assert call(api, "GET", "/v1/models", token(jku="http://127.0.0.1:1/keys")).status_code == 200
    assert "DOE-JOHN" not in log.read_text()
    told = [(event.agent[0].who.identifier.value.partition(":")[0], event.outcome, event.outcomeDesc) for event in audited(log)]
    refusals = [("unknown", "4", "401")] * len(bad) + [("token", "4", "403")] * 2
    assert told == [("token", "0", "200"), *refusals, ("token", "0", "200")]


def test_tokens_cannot_be_checked_without_the_providers_keys(gateway: InProcess, tmp_path: Path) -> None:
    api = made_api(gateway, access={"jwt": {"issuer": ISSUER, "audience": AUDIENCE, "jwks": str(tmp_path / "missing.json")}})
    key = ec.generate_private_key(ec.SECP256R1())
    answer = call(api, "GET", "/v1/models", jwt.encode({"sub": "a"}, key, "ES256"))
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0


def test_rates(gateway: InProcess, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    one, two = (add_key(keys, name, ["models:read"]) for name in ("one", "two"))
    api = made_api(gateway, access={"keys_file": str(keys), "requests_per_minute": 5, "failures_per_minute": 3})
    # Windows begin at whole minutes: twice the limit meets one of them at least.
    answers = [call(api, "GET", "/v1/models", one) for _ in range(11)]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert answers[0].status_code == 200
    over = next(answer for answer in answers if answer.status_code == 429)
    refused(over, 429)
    assert 1 <= int(over.headers["retry-after"]) <= 60
    assert call(api, "GET", "/v1/models", two).status_code == 200
    guesses = [call(api, "GET", "/v1/models", "ssacl_guess").status_code for _ in range(8)]
    assert set(guesses) == {401, 429}
    # Guessing does not shut out who has a key, even from the same address.
    assert call(api, "GET", "/v1/models", two).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3", "hospital.example.org", "::"])
def test_no_other_machine_is_served_without_access(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--insecure"):
        run_server(ServeSettings(checkpoint_url="unused", host=host), blocking=False)
    for allowed in ({"insecure": True}, {"keys_file": "keys.json"}):
        ServiceSettings.model_validate({"access": allowed}).check_exposure(host)
    for own in ("127.0.0.1", "::1", "localhost"):
        ServiceSettings().check_exposure(own)


def test_settings_and_key_files_that_cannot_be_used(tmp_path: Path) -> None:
    for jwks in ("http://idp.example.org/keys", "ftp://idp/keys", "https://user:secret@idp/keys"):
        with pytest.raises(ConfigError, match="jwks"):
            ServeSettings.parse({"checkpoint_url": "m", "service": {"access": {"jwt": {"issuer": "i", "audience": "a", "jwks": jwks}}}})
    jwt_settings = {"issuer": "i", "audience": "a", "jwks": "keys.json", "algorithms": ["HS256"]}
    with pytest.raises(ConfigError, match="algorithms"):
        ServeSettings.parse({"checkpoint_url": "m", "service": {"access": {"jwt": jwt_settings}}})
    damaged = tmp_path / "damaged.json"
    damaged.write_text('[{"name": "x", "sha256": "SECRET"}]')
    with pytest.raises(ConfigError, match="damaged") as error:
        read_keys(damaged)
    assert "SECRET" not in str(error.value)


def test_keys_that_become_unreadable_while_serving_are_the_operators_business(gateway: InProcess, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    key = add_key(keys, "pacs", ["models:read"])
    api = made_api(gateway, access={"keys_file": str(keys)})
    assert call(api, "GET", "/v1/models", key).status_code == 200
    keys.write_text("[")
    answer = call(api, "GET", "/v1/models", key)
    assert str(tmp_path) not in json.dumps(refused(answer, 503))
    keys.unlink()
    refused(call(api, "GET", "/v1/models", key), 503)


def test_a_file_of_keys_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written"):
        add_key(tmp_path / "missing" / "keys.json", "pacs", ["models:read"])
    assert list(tmp_path.iterdir()) == []


def test_the_command_makes_and_withdraws_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = str(tmp_path / "keys.json")
    assert main(["access", "add", "--keys", keys, "--name", "pacs", "--scope", "reports:write", "--days", "30"]) == 0
    key = capsys.readouterr().out.strip()
    assert key.startswith("ssacl_")
    assert len(key) > 40
    assert main(["access", "add", "--keys", keys, "--name", "pacs", "--scope", "reports:write"]) != 0
    assert main(["access", "add", "--keys", keys, "--name", "other", "--scope", "everything"]) != 0
    for days in ("-3", "0", "1e12", "nan"):
        assert main(["access", "add", "--keys", keys, "--name", "short", "--scope", "reports:write", "--days", days]) == 1
        assert "--days must be above 0" in capsys.readouterr().err
    assert main(["access", "revoke", "--keys", keys, "--name", "pacs"]) == 0
    assert read_keys(Path(keys)) == []
