"""Shards: the same samples give the same bytes, any tar reader reads them, and every kind of damage is found."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from ssacl.data.records import Sample
from ssacl.data.shards import INDEX, ShardEntry, ShardIndex, ShardWriter, read_sample
from ssacl.data.storage import FolderStorage, open_storage
from ssacl.data.verification import verify
from ssacl.errors import ConfigError, DataError, StorageError


def make_sample(number: int) -> Sample:
    buffer = io.BytesIO()
    Image.frombytes("L", (40, 30), random.Random(number).randbytes(1200)).save(buffer, "PNG" if number % 2 else "JPEG")
    return Sample(
        key=f"{number:024x}-00",
        image=buffer.getvalue(),
        image_format="png" if number % 2 else "jpg",
        patient_key=f"{number:024x}",
        view="PA",
        width_px=40,
        height_px=30,
        original_width_px=400,
        original_height_px=300,
        findings=f"Größe {number}: the heart is normal." if number % 3 else "",
        impression="",
        labels=(3,) * 14 if number % 3 else (),
        anatomy_groups=("lungs",),
        provenance={"content_sha256": str(number), "licence": "CC0"},
    )


def write_shard(storage: FolderStorage, split: str = "train", number: int = 0, count: int = 5) -> ShardEntry:
    writer = ShardWriter(storage, split, number)
    for item in range(count):
        writer.add(make_sample(100 * number + item))
    return writer.close()


@pytest.fixture
def storage(tmp_path: Path) -> FolderStorage:
    folder = open_storage(tmp_path / "set")
    assert isinstance(folder, FolderStorage)
    ShardIndex((write_shard(folder), write_shard(folder, "train", 1), write_shard(folder, "test", 0, 2)), "f").save(folder)
    return folder


def test_samples_come_back_as_they_were(storage: FolderStorage) -> None:
    index = ShardIndex.load(storage)
    entries = index.samples("train")
    assert [read_sample(storage, entry) for entry in entries] == [make_sample(number) for number in (*range(5), *range(100, 105))]
    assert len(index.samples("test")) == 2
    assert index.samples("val") == []
    assert index.fingerprint == "f"
    assert verify(storage) == []
    with pytest.raises(ConfigError, match="no split"):
        index.samples("dev")


def test_the_same_samples_give_the_same_bytes(storage: FolderStorage, tmp_path: Path) -> None:
    other = FolderStorage(tmp_path / "other")
    assert write_shard(other) == ShardIndex.load(storage).shards[0]
    assert other.read("train-000000.tar") == storage.read("train-000000.tar")


def test_other_readers_read_the_shards(storage: FolderStorage) -> None:
    with tarfile.open(storage.root / "train-000000.tar") as tar:
        assert tar.getnames()[:2] == [f"{0:024x}-00.jpg", f"{0:024x}-00.json"]
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}
    rows = list(webdataset.WebDataset(str(storage.root / "train-000000.tar"), shardshuffle=False))
    assert [row["__key__"] for row in rows] == [make_sample(number).key for number in range(5)]
    assert json.loads(rows[1]["json"])["findings"] == make_sample(1).findings


def test_nothing_is_visible_before_close_and_no_samples_make_no_shard(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    writer = ShardWriter(storage, "train")
    writer.add(make_sample(1))
    assert storage.list() == []
    empty = ShardWriter(storage, "val").close()
    assert (empty.count, empty.bytes, storage.list()) == (0, 0, [])


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3000])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)


def _garble(path: Path) -> None:
    path.write_bytes(bytes(random.Random(0).randbytes(path.stat().st_size)))


@pytest.mark.parametrize(
    ("harm", "problem"), [(Path.unlink, "missing"), (_cut, "bytes instead of"), (_flip, "sha256 differs"), (_garble, "not a readable tar")]
)
def test_damage_is_found(storage: FolderStorage, harm: Callable[[Path], None], problem: str) -> None:
    harm(storage.root / "train-000001.tar")
    damages = verify(storage)
    assert {damage.file for damage in damages} == {"train-000001.tar"}
    assert any(problem in str(damage) for damage in damages)
    bad, good = 0, 0
    for entry in ShardIndex.load(storage).samples("train"):
        try:
            assert read_sample(storage, entry).key == entry.key
            good += 1
        except (DataError, StorageError):
            bad += 1
    assert bad >= 1
    assert good >= 5


def test_a_picture_that_does_not_decode_and_a_wrong_count_are_found(storage: FolderStorage) -> None:
    writer = ShardWriter(storage, "val")
    writer.add(dataclasses.replace(make_sample(0), image=b"\xff\xd8\xff no picture"))
    writer.add(make_sample(1))
    bad = writer.close()
    miscounted = dataclasses.replace(bad, samples=bad.samples[:1])
    ShardIndex((miscounted,)).save(storage)
    problems = " ".join(str(damage) for damage in verify(storage))
    assert "4 members instead of 2" in problems
    assert f"sample {0:024x}-00 cannot be read" in problems


def test_no_index_a_damaged_one_and_another_version(storage: FolderStorage, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ssacl data ingest"):
        ShardIndex.load(open_storage(tmp_path / "nowhere"))
    whole = storage.read(INDEX)
    for content, said in ((whole[:-20], "damaged"), (b"[]", "version"), (b'{"version":1}', "damaged"), (b'{"version":99}', "version")):
        storage.write(INDEX, content)
        with pytest.raises(DataError, match=said):
            ShardIndex.load(storage)


def test_unknown_fields_of_later_releases_are_left_out(storage: FolderStorage) -> None:
    from ssacl.data.shards import decode_sample, encode_document

    sample = make_sample(4)
    document = json.dumps(json.loads(encode_document(sample)) | {"later": 1}).encode()
    assert decode_sample(sample.key, sample.image, document) == sample
    with pytest.raises(DataError, match="damaged"):
        decode_sample(sample.key, sample.image, document[:-2])
