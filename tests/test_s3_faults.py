"""Between client and a real S3 server everything goes wrong now and then: what arrives is exact, and what was tried again is counted."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest
from faulty_s3 import KINDS, FaultyS3, faulty_s3

from ssacl.data.storage import EmbeddedS3, embedded_s3, open_storage
from ssacl.errors import StorageError


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedS3]:
    with embedded_s3(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same limits, smaller; pauses between tries left out."""
    monkeypatch.setattr("ssacl.data.s3_storage.READ_TIMEOUT_S", 0.4)
    monkeypatch.setattr("ssacl.data.s3_storage.time.sleep", lambda _: None)


def use(proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in proxy.environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_fault_is_overcome_and_counted(kind: str, server: EmbeddedS3, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_s3(server, seed=3, share=0.5, kinds=(kind,), in_a_row=2) as proxy:
        use(proxy, monkeypatch)
        storage = open_storage(f"s3://ssacl/{kind}")
        contents = {f"{number}.bin": random.Random(number).randbytes(5000) for number in range(3)}
        for key, content in contents.items():
            storage.write(key, content)
        assert {key: storage.read(key) for key in contents} == contents
        assert {item.key: item.size for item in storage.list()} == dict.fromkeys(contents, 5000)
        assert storage.retries.total() == proxy.injected[kind] > 0
        assert len(storage.retries) <= 2, storage.retries
    for key, content in contents.items():
        assert (server.folder / "ssacl" / kind / key).read_bytes() == content


def test_a_store_that_trickles_for_ever_is_named(server: EmbeddedS3, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_s3(server, share=1.0, kinds=("slow",), in_a_row=99) as proxy:
        use(proxy, monkeypatch)
        open_storage("s3://ssacl/slow").list()
        (server.folder / "ssacl" / "slow.bin").write_bytes(bytes(20_000))
        started = time.monotonic()
        with pytest.raises(StorageError, match="does not answer or breaks off"):
            open_storage("s3://ssacl").read("slow.bin")
        # The pauses between the tries alone take 12 to 24 s.
        assert time.monotonic() - started < 45
