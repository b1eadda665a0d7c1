"""One epoch from a real S3 server while everything between goes wrong now and then; and with the server gone for good."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator

import pytest
from faulty_s3 import KINDS, faulty_s3
from test_collate import VISION, sample

from ssacl.config import DataConfig
from ssacl.data.collate import Collator
from ssacl.data.loader import StreamingLoader
from ssacl.data.records import Sample
from ssacl.data.shards import ShardIndex, ShardWriter
from ssacl.data.storage import EmbeddedS3, embedded_s3, open_storage
from ssacl.data.tokenization import Tokenizers, train_tokenizers
from ssacl.errors import StorageError

pytestmark = pytest.mark.external
NUM_SAMPLES, WORLD, BATCH = 96, 2, 4
CONFIG = DataConfig(shuffle_lanes=8, shuffle_block=4, cache_mb=0, prefetch_batches=3, num_reader_threads=3)


@pytest.fixture(scope="module")
def tokenizers() -> Tokenizers:
    return train_tokenizers(["No effusion."], 300, 300)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedS3]:
    folder = tmp_path_factory.mktemp("s3")
    storage, shards = open_storage(folder / "ssacl" / "set"), []
    for number in range(4):
        writer = ShardWriter(storage, "train", number)
        for index in range(NUM_SAMPLES // 4):
            made = sample(f"k{number}{index:03d}", "No effusion.")
            # Random bytes after the picture's end, so that a sample is more than one packet.
            image = made.image + random.Random(number * 100 + index).randbytes(6000)
            writer.add(Sample(made.key, image, "png", findings=made.findings))
        shards.append(writer.close())
    ShardIndex(tuple(shards)).save(storage)
    with embedded_s3(folder) as running:
        yield running


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same limits, smaller; pauses between tries left out."""
    monkeypatch.setattr("ssacl.data.s3_storage.READ_TIMEOUT_S", 0.4)
    monkeypatch.setattr("ssacl.data.s3_storage.time.sleep", lambda _: None)


def ranks(tokenizers: Tokenizers, world: int = WORLD) -> list[StreamingLoader]:
    collator = Collator(CONFIG, VISION, tokenizers, 0, True)
    return [StreamingLoader(open_storage("s3://ssacl/set"), "train", collator, rank, world, BATCH, 1) for rank in range(world)]


def keys(way: Iterator[object], steps: int) -> list[str]:
    return [key for batch in itertools.islice(way, steps) for key in batch.keys]  # type: ignore[attr-defined]


def collect(way: Iterator[object], seen: list[str]) -> None:
    for batch in way:
        seen += batch.keys  # type: ignore[attr-defined]


def test_an_epoch_under_faults_is_exact_and_retries_are_counted(
    server: EmbeddedS3, tokenizers: Tokenizers, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty_s3(server, seed=11, share=0.4, kinds=KINDS, in_a_row=2) as proxy:
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value)
        loaders = ranks(tokenizers)
        seen = [key for each in loaders for key in keys(iter(each), each.steps_per_epoch)]
        assert sorted(seen) == sorted(f"k{number}{index:03d}" for number in range(4) for index in range(NUM_SAMPLES // 4))
        assert all(not each.bad_samples for each in loaders)
        assert all(each.state_dict() == loaders[0].state_dict() for each in loaders)
        assert {kind for kind, count in proxy.injected.items() if count} >= {"error", "reset", "truncate", "flip", "slow"}
        retries = sum((each.storage.retries for each in loaders), start=loaders[0].storage.retries - loaders[0].storage.retries)
        # What is read ahead for the next epoch when the loader stops may still be broken, uncounted.
        assert 0.7 * proxy.injected.total() <= retries.total() <= proxy.injected.total() + retries["wrong_bytes"]
        assert {"server_error", "timeout", "wrong_bytes"} <= set(retries)


def test_storage_gone_for_good_is_named_in_time_and_the_loader_goes_on_from_there(
    server: EmbeddedS3, tokenizers: Tokenizers, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty_s3(server, share=0.0) as proxy:
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value)
        undisturbed = keys(iter(ranks(tokenizers, 1)[0]), 24)
        each = ranks(tokenizers, 1)[0]
        way = iter(each)
        seen = keys(way, 3)
        proxy.down = True
        started = time.monotonic()
        with pytest.raises(StorageError, match="does not answer or breaks off"):
            collect(way, seen)
        assert time.monotonic() - started < 20
        assert len(seen) == each.state_dict()["samples_consumed"] < NUM_SAMPLES
        proxy.down = False
        # The same loader, and one of a new process.
        new = ranks(tokenizers, 1)[0]
        new.load_state_dict(each.state_dict())
        rest = keys(iter(each), 24 - len(seen) // BATCH)
        assert seen + rest == undisturbed
        assert keys(iter(new), 24 - len(seen) // BATCH) == rest
