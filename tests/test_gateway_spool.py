"""The spool after every kind of end, and the gateway's configuration."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from serve.gateway.config import Limits, Retention, load_gateway_config, parse_gateway_config
from serve.gateway.config import Retry as RetryConfig
from serve.gateway.courier import Backoff
from serve.gateway.outcomes import SpoolFullError
from serve.gateway.spool import Spool, key_of, read_status
from ssacl.errors import ConfigError, ServeError

LIMITS = Limits(min_free_bytes=0)


def opened(folder: Path, **retention: float) -> Spool:
    return Spool(folder, LIMITS, Retention(**retention))


def test_what_was_accepted_is_there_after_a_crash(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    key = spool.accept(b"film", "1.2.3", "CALLER", ["archive"], "0" * 32)
    assert key == key_of("1.2.3")
    spool.keep_results(key, [b"report", b"overlay"])
    # As kill -9 leaves it: half-written things, and a second instance settled but not yet removed.
    second = spool.accept(b"other", "1.2.4", "CALLER", ["archive"], "0" * 32)
    (tmp_path / "incoming" / "half").mkdir()
    (tmp_path / "incoming" / "half" / "film.dcm").write_bytes(b"fi")
    (tmp_path / "done" / f"{second}.json").write_text('{"outcome": "reported"}')
    spool.close()
    spool = opened(tmp_path)
    assert spool.waiting() == [key]
    assert spool.film(key) == b"film"
    assert [path.read_bytes() for path in spool.results(key)] == [b"report", b"overlay"]
    assert spool.entry(key).pending == ("archive",)
    assert list((tmp_path / "incoming").iterdir()) == []
    assert spool.accept(b"film", "1.2.3", "CALLER", ["archive"], "0" * 32) is None
    assert spool.accept(b"other", "1.2.4", "CALLER", ["archive"], "0" * 32) is None
    spool.settle(key, "reported")
    assert spool.waiting() == []
    assert spool.accept(b"film", "1.2.3", "CALLER", ["archive"], "0" * 32) is None


def test_a_damaged_entry_is_set_aside_and_stops_nothing(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    key, other = (spool.accept(b"film", uid, "CALLER", [], "0" * 32) for uid in ("1.2.3", "1.2.4"))
    spool.close()
    (tmp_path / "waiting" / str(key) / "entry.json").write_text("{")
    assert opened(tmp_path).waiting() == [other]
    assert read_status(tmp_path)["quarantine"] == {"damaged_spool_entry": 1}


def test_one_gateway_at_a_time(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    with pytest.raises(ServeError, match="Another gateway"):
        opened(tmp_path)
    spool.close()
    opened(tmp_path).close()


def test_what_is_settled_goes_after_its_time(tmp_path: Path) -> None:
    spool = opened(tmp_path, done_s=100, quarantine_s=100)
    for uid in ("1.1", "1.2"):
        spool.settle_unread(uid, "passed", "lateral")
        key = spool.accept(b"film", f"{uid}.9", "CALLER", [], "0" * 32)
        assert key
        spool.quarantine(spool.entry(key), "blank")
    for old in (tmp_path / "done" / f"{key_of('1.1')}.json", tmp_path / "quarantine" / key_of("1.1.9")):
        os.utime(old, (time.time() - 200, time.time() - 200))
    spool.sweep()
    status = read_status(tmp_path)
    assert (status["done"], status["quarantine"]) == ({"passed lateral": 1}, {"blank": 1})
    assert spool.accept(b"film", "1.1", "CALLER", [], "0" * 32)


def test_bytes_are_bounded_by_what_waits(tmp_path: Path) -> None:
    spool = Spool(tmp_path, Limits(min_free_bytes=0, max_spool_bytes=1 << 20), Retention())
    key = spool.accept(bytes(600 << 10), "1.1", "CALLER", [], "0" * 32)
    with pytest.raises(SpoolFullError):
        spool.accept(bytes(600 << 10), "1.2", "CALLER", [], "0" * 32)
    spool.settle(str(key), "reported")
    assert spool.accept(bytes(600 << 10), "1.2", "CALLER", [], "0" * 32)


def test_success_is_never_told_for_what_another_is_still_writing(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    write = spool._write_instance

    def meanwhile(*arguments: Any) -> None:
        with pytest.raises(SpoolFullError):
            spool.accept(b"film", "1.2.3", "OTHER", [], "0" * 32)
        write(*arguments)

    spool._write_instance = meanwhile  # type: ignore[method-assign]
    assert spool.accept(b"film", "1.2.3", "CALLER", [], "0" * 32)
    assert spool.accept(b"film", "1.2.3", "OTHER", [], "0" * 32) is None


def test_waiting_doubles_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    backoff, waits = Backoff(RetryConfig(first_s=1, longest_s=8)), []
    for _ in range(6):
        waits.append(backoff.failed(None))
        assert backoff.failed(None) == waits[-1], "a failure while it is left alone adds nothing"
        now[0] += waits[-1]
    for wait, expected in zip(waits, (1, 2, 4, 8, 8, 8), strict=True):
        assert 0.9 * expected <= wait <= expected + 1e-6
    assert backoff.failed(7.0) >= 7
    backoff.succeeded()
    assert backoff.wait_s() == 0


GOOD: dict[str, Any] = {
    "calling_ae": ["A"],
    "spool": "s",
    "destinations": {"x": {"kind": "c-store", "host": "h", "port": 104, "ae_title": "X"}},
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"colour": 1}, "colour"),
        ({"calling_ae": []}, "calling_ae"),
        ({"calling_ae": ["A TITLE THAT IS TOO LONG"]}, "calling_ae"),
        ({"destinations": {}}, "destinations"),
        ({"destinations": {"x": {"kind": "stow-rs", "url": "http://user:pw@h/"}}}, "url"),
        ({"rules": [{"action": "report", "destinations": ["y"]}]}, "destinations that are not there: y"),
        ({"rules": [{"action": "report", "subject": ["sideways"]}]}, "subject"),
        ({"limits": {"max_instances": 0}}, "max_instances"),
    ],
)
def test_a_wrong_configuration_is_named(change: dict[str, Any], said: str) -> None:
    parse_gateway_config(json.dumps(GOOD))
    with pytest.raises(ConfigError, match=said) as caught:
        parse_gateway_config(json.dumps({**GOOD, **change}))
    assert "pw" not in str(caught.value)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_gateway_config(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_gateway_config(tmp_path / "broken.yaml")
