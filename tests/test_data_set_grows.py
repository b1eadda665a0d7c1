"""A data set that grows with its source: what stands never changes, what is new is added, what was lost is made again bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ingest_sets import SETTINGS, hashes, ingest_films, join_tables, write_films
from PIL import Image

from ssacl.cli import main
from ssacl.data.ingest import IngestSettings
from ssacl.data.records import SPLITS
from ssacl.data.shards import INDEX, ShardIndex
from ssacl.data.storage import open_storage
from ssacl.data.verification import verify
from ssacl.errors import DataError


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_films(tmp_path / "films", 20)


def rewrite(table: Path, change: dict[str, str | None]) -> Path:
    """The same CSV with the rows of some files changed; none: left out."""
    lines = table.read_text().splitlines()
    kept = [change.get(line.partition(",")[0], line) for line in lines]
    table.write_text("\n".join(line for line in kept if line is not None) + "\n")
    return table


def shards(folder: Path) -> dict[str, str]:
    return {name: value for name, value in hashes(folder).items() if name.endswith(".tar") or name.startswith("_parts")}


def samples(folder: Path) -> set[str]:
    index = ShardIndex.load(open_storage(folder))
    return {entry.key for split in SPLITS for entry in index.samples(split)}


def test_new_studies_go_to_new_shards_and_repeats_of_old_pictures_are_left_out(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    ingest_films(table, out)
    before, known = shards(out), samples(out)
    more = write_films(tmp_path / "films", 15, first=20)  # 20 repeats 15, which stands in an old shard.
    grown = ingest_films(join_tables(tmp_path / "films" / "all.csv", table, more), out)
    after = shards(out)
    assert {name: after[name] for name in before} == before
    assert grown.num_shards_written == len(after.keys() - before.keys()) / 2
    assert grown.rejects["duplicate"] == 5
    assert samples(out) > known
    assert len(samples(out)) == 35 - 5 - 2
    assert verify(open_storage(out)) == []
    assert json.loads((out / "dataset_card.json").read_text())["studies"] == 35
    assert ingest_films(tmp_path / "films" / "all.csv", out).num_shards_written == 0


def test_studies_that_change_or_go_stay_as_they_were_and_are_named(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    ingest_films(table, out)
    before = shards(out)
    summary = ingest_films(rewrite(table, {"0.png": "0.png,IMPRESSION: Another text.,p0,CC0", "1.png": None}), out)
    assert summary.rejects["changed"] == summary.rejects["gone"] == 1
    assert shards(out) == before
    assert verify(open_storage(out)) == []


def test_a_study_that_failed_is_tried_again_once_its_file_has_changed(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert ingest_films(table, out).rejects == {"duplicate": 2, "missing_file": 1, "unreadable": 1}
    assert ingest_films(table, out).num_shards_written == 0
    shutil.copy(tmp_path / "films" / "0.png", tmp_path / "films" / "4.png")
    Image.open(tmp_path / "films" / "2.png").rotate(180).save(tmp_path / "films" / "3.png")
    before = shards(out)
    summary = ingest_films(table, out)
    assert summary.rejects == {"duplicate": 3}
    assert sum(summary.num_samples.values()) == 17
    assert shards(out).items() > before.items()


@pytest.mark.parametrize("lose", [["train-000001.tar"], ["_parts/train-000001.json"], ["train-000001.tar", "_parts/train-000001.json"]])
def test_what_was_lost_is_made_again_bit_for_bit(lose: list[str], table: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    ingest_films(table, out)
    before = hashes(out)
    for name in lose:
        (out / name).unlink()
        assert any(damage.file == name and damage.problem == "missing" for damage in verify(open_storage(out)))
    # Without its record, studies of it that gave no sample are new ones and come to a shard more.
    assert 1 <= ingest_films(table, out).num_shards_written <= len(lose) + 1
    after = hashes(out)
    assert {name: after[name] for name in before if name.endswith(".tar")} == {
        name: value for name, value in before.items() if name.endswith(".tar")
    }
    assert verify(open_storage(out)) == []


def test_what_was_lost_and_cannot_be_made_again_is_named(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    ingest_films(table, out)
    before = hashes(out)
    (out / "train-000000.tar").unlink()
    with pytest.raises(DataError, match=r"train-000000\.tar is missing or damaged, and \d of its \d studies"):
        ingest_films(rewrite(table, {f"{number}.png": None for number in range(10)}), out)
    del before["train-000000.tar"]
    assert hashes(out) == before


def test_a_lost_shard_whose_pixels_have_changed_since_is_not_made_of_others(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    ingest_films(table, out)
    (out / "train-000000.tar").unlink()
    before = hashes(out)
    for number in range(20):
        file = tmp_path / "films" / f"{number}.png"
        if file.exists():
            size = file.stat().st_size
            Image.fromarray(np.full((64, 64), 100 + number, np.uint8)).rotate(10).save(file)
            file.write_bytes(file.read_bytes().ljust(size, b"\0"))  # As long as before: the plan sees no change.
            assert file.stat().st_size == size
    with pytest.raises(DataError, match=r"train-000000\.tar cannot be made again as it was"):
        ingest_films(table, out)
    assert hashes(out) == before


@pytest.mark.parametrize("harm", ["{", '{"version": 1}', None])
def test_a_lost_index_is_made_again_from_the_records(harm: str | None, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    ingest_films(table, out)
    ingest_films(join_tables(tmp_path / "films" / "all.csv", table, write_films(tmp_path / "films", 15, first=20)), out)
    before = hashes(out)
    if harm is None:
        (out / INDEX).unlink()
    else:
        (out / INDEX).write_text(harm)
    assert ingest_films(tmp_path / "films" / "all.csv", out).num_shards_written == 0
    assert hashes(out) == before


def test_another_source_other_settings_and_an_index_of_another_version_are_refused(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    ingest_films(table, out)
    before = hashes(out)
    with pytest.raises(DataError, match="not one of them is in this source"):
        ingest_films(write_films(tmp_path / "others", 5, first=105), out)
    with pytest.raises(DataError, match="made with other settings or another key"):
        ingest_films(table, out, IngestSettings(key_secret=SETTINGS.key_secret, shard_size=4, longest_side_px=40))
    assert hashes(out) == before
    (out / INDEX).write_text('{"version": 99}')
    with pytest.raises(DataError, match="not of version 1"):
        ingest_films(table, out)


def test_the_command_names_each_damage_and_exits_1(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "set"
    ingest_films(table, out)
    assert main(["data", "verify", str(out)]) == 0
    assert "every shard is whole: 16 samples" in capsys.readouterr().out
    flipped = bytearray((out / "train-000000.tar").read_bytes())
    flipped[700] ^= 4
    (out / "train-000000.tar").write_bytes(flipped)
    (out / "_parts" / "train-000001.json").write_text("{")
    (out / "train-000002.tar").unlink()
    assert main(["data", "verify", str(out)]) == 1
    said = capsys.readouterr()
    assert "damaged" in said.out
    for problem in (
        "train-000000.tar: sha256 differs",
        "is not as it was written",
        "train-000002.tar: missing",
        "train-000001.json: is damaged",
    ):
        assert problem in said.err
    (out / INDEX).write_bytes((out / INDEX).read_bytes().replace(b"-00", b"-01", 1))
    assert main(["data", "verify", str(out)]) == 1
    assert "index.json is damaged" in capsys.readouterr().err


def test_the_card_tells_people_and_programs_the_same(table: Path, tmp_path: Path) -> None:
    ingest_films(table, tmp_path / "set")
    card = json.loads((tmp_path / "set" / "dataset_card.json").read_text())
    assert card["licence"] == {"CC0": 16}
    assert card["view"] == {"unknown": 16}
    assert card["findings"]["Pleural Effusion"] == {"absent": 16, "present": 0, "uncertain": 0, "unmentioned": 0}
    assert card["left_out"] == {"duplicate": 2, "missing_file": 1, "unreadable": 1}
    assert sum(card["patients"].values()) == len({number // 2 for number in range(20) if number not in {3, 4, 6, 13}})
    text = (tmp_path / "set" / "README.md").read_text()
    assert "16 samples from 20 studies" in text
    assert "| Pleural Effusion | 16 | 0 | 0 | 0 |" in text
    (tmp_path / "set" / "dataset_card.json").write_text(json.dumps(card | {"samples": {"train": 1, "val": 0, "test": 0}}))
    assert [str(damage) for damage in verify(open_storage(tmp_path / "set"))] == ["dataset_card.json: counts other samples than the index"]
