"""Ingest: studies to a data set that is whole or absent, holds no identifier, and is the same however often it is interrupted."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from dicom_files import dicom, film
from ingest_sets import SECRET, hashes
from PIL import Image

from ssacl.anatomy import FINDING_INDEX, FindingStatus
from ssacl.data.convert import split_of
from ssacl.data.deidentify import key_secret, scrub
from ssacl.data.ingest import IngestSettings, IngestSummary, Reject, run_local, study_to_samples
from ssacl.data.records import Study, StudyImage
from ssacl.data.shards import ShardIndex, read_sample
from ssacl.data.sources import SourceOptions, finding_labels, open_source
from ssacl.data.storage import embedded_s3, open_storage
from ssacl.data.verification import verify
from ssacl.errors import ConfigError, DataError, NotBuiltError, StorageError
from ssacl.phantom import PhantomTruth, write_dicom_tree

SETTINGS = IngestSettings(key_secret=SECRET, shard_size=4)
NUM_STUDIES = 14


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom") / "studies"
    write_dicom_tree(folder, NUM_STUDIES, seed=5, size_px=96, num_processes=1)
    return folder


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A CSV with two films of one patient, one study of two rows, a missing file, a broken one and a copy."""
    folder = tmp_path / "films"
    folder.mkdir()
    base = film().astype(int)
    for number in range(4):
        Image.fromarray(np.clip(base + number, 0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    shutil.copy(folder / "0.png", folder / "copy.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:500])
    rows = [
        ("0.png", "FINDINGS: Small left pleural effusion.", "p1", "s1", "", "CC0"),
        ("1.png", "", "p1", "s2", "No Finding", "CC0"),
        ("2.png", "", "p2", "s3", "Effusion|Pneumonia", ""),
        ("3.png", "", "p2", "s3", "", ""),
        ("copy.png", "", "p3", "s4", "", ""),
        ("broken.png", "", "p4", "s5", "", ""),
        ("absent.png", "", "p5", "s6", "", ""),
    ]
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "text", "who", "visit", "named", "terms"), *rows])
    return tmp_path / "table.csv"


COLUMNS = {"image": "file", "report": "text", "patient": "who", "study": "visit", "labels": "named", "licence": "terms"}


def ingest_tree(tree: Path, out: Path | str) -> IngestSummary:
    return run_local("dicom-dir", tree, str(out), SETTINGS)


def test_a_dicom_tree_becomes_a_data_set(tree: Path, tmp_path: Path) -> None:
    summary = ingest_tree(tree, tmp_path / "set")
    storage = open_storage(tmp_path / "set")
    index = ShardIndex.load(storage)
    assert verify(storage) == []
    assert sum(summary.num_samples.values()) == summary.num_studies == NUM_STUDIES
    given = {split: len(list((tree / split).rglob("*.dcm"))) for split in ("train", "val", "test")}
    assert {split: len(index.samples(split)) for split in given} == summary.num_samples == given
    digests = set()
    for split in given:
        for entry in index.samples(split):
            sample = read_sample(storage, entry)
            digests.add(sample.provenance["content_sha256"])
            assert sample.has_text
            assert len(sample.labels) == 14
            assert sample.view in {"PA", "AP"}
            assert not sample.provenance["polarity_corrected"]
    # The digest is the link by which evaluation finds the truth of a test film.
    assert set(PhantomTruth.load(tree)) == digests
    card = json.loads(storage.read("dataset_card.json"))
    assert card["samples"] == given
    assert SECRET not in json.dumps(card)


def test_a_second_run_does_nothing_and_makes_good_what_was_lost(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    ingest_tree(tree, out)
    before, times = hashes(out), {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert ingest_tree(tree, out).num_shards_written == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times
    (out / "train-000000.tar").unlink()
    (out / "index.json").write_text("{")
    assert ingest_tree(tree, out).num_shards_written == 1
    assert hashes(out) == before


def test_csv_rows_become_studies_with_rejects_in_the_ledger(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    summary = run_local("csv", table, str(out), SETTINGS, SourceOptions(COLUMNS, tmp_path / "films"))
    assert summary.rejects == {"duplicate": 1, "missing_file": 1, "unreadable": 1}
    assert sum(summary.num_samples.values()) == 4
    assert "unreadable 1" in summary.describe()
    ledger = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert sorted(line["reason"] for line in ledger) == ["duplicate", "missing_file", "unreadable"]
    storage = open_storage(out)
    samples = [read_sample(storage, entry) for shard in ShardIndex.load(storage).shards for entry in shard.samples]
    effusion = FINDING_INDEX["Pleural Effusion"]
    with_text = [sample for sample in samples if sample.has_text]
    assert [sample.labels[effusion] for sample in with_text] == [FindingStatus.PRESENT]
    normal = next(sample for sample in samples if sample.labels and sample.labels[-1] == FindingStatus.PRESENT)
    assert normal.labels[effusion] == FindingStatus.ABSENT
    assert len({sample.patient_key for sample in samples}) == 2
    assert verify(storage) == []


def test_films_of_a_patient_stay_in_one_split_and_shares_are_kept() -> None:
    assert {split_of("p", SETTINGS) for _ in range(3)} == {split_of("p", SETTINGS)}
    counts = {split: [split_of(f"p{n}", SETTINGS) for n in range(2000)].count(split) / 2000 for split in ("train", "val", "test")}
    assert counts == pytest.approx({"train": 0.8, "val": 0.1, "test": 0.1}, abs=0.03)
    other = IngestSettings(key_secret="another secret here")
    assert any(split_of(f"p{n}", other) != split_of(f"p{n}", SETTINGS) for n in range(100))


def test_no_identifier_survives(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    planted = "Zyxwvut"
    folder = tmp_path / "in" / f"{planted}Patient" / f"{planted}Study"
    folder.mkdir(parents=True)
    content = dicom(
        film(),
        PatientName=f"{planted}^Quentin",
        PatientID=f"{planted}77",
        AccessionNumber="ACC123456",
        ReferringPhysicianName="Doctor^House",
        InstitutionName=f"{planted} Hospital",
        PatientComments=planted,
        ImageComments=planted,
        ViewPosition="AP",
        SeriesDescription=planted,
    )
    (folder / f"{planted}.dcm").write_bytes(content)
    (folder / f"{planted}bad.dcm").write_bytes(planted.encode() * 100)
    (folder / "report.txt").write_text(
        f"PATIENT: {planted}, QUENTIN  ACC: ACC123456\nFINDINGS: Compared with ___. {planted} has a small effusion. Dr. House was told.\n"
        f"IMPRESSION: {planted}77 at {planted} Hospital: effusion, accession acc123456."
    )
    out = tmp_path / "set"
    with caplog.at_level(logging.DEBUG):
        summary = run_local("dicom-dir", tmp_path / "in", str(out), SETTINGS)
    assert summary.rejects == {"not_dicom": 1}
    files = [path for path in out.rglob("*") if path.is_file()]
    everything = b"".join(path.read_bytes() + path.relative_to(out).as_posix().encode() for path in files).lower()
    for secret in (planted, "quentin", "acc123456", "house", "hospital", SECRET):
        assert secret.lower().encode() not in everything, secret
        assert secret.lower() not in caplog.text.lower().replace(str(tmp_path).lower(), "")
    sample = read_sample(
        open_storage(out), next(entry for s in ("train", "val", "test") for entry in ShardIndex.load(open_storage(out)).samples(s))
    )
    assert "small effusion" in sample.findings
    assert "___" in sample.findings


def test_scrubbing_takes_whole_words_only() -> None:
    assert scrub("Lee was seen; sleeve. LEE's film 1234, 123, 12345.", {"Lee", "1234", "123", "ab"}) == (
        "___ was seen; sleeve. ___'s film ___, 123, 12345."
    )


def test_a_study_gives_samples_or_one_named_reject() -> None:
    good = Study("s", "p", (StudyImage(content=dicom(film())), StudyImage(content=b"text", view="PA")), report="IMPRESSION: No effusion.")
    samples = study_to_samples(good, SETTINGS)
    assert isinstance(samples, list)
    assert [sample.key[-3:] for sample in samples] == ["-00"]
    assert samples[0].impression == "No effusion."
    assert study_to_samples(Study("s", "p", ()), SETTINGS) == Reject(samples[0].key[:-3], "no_image")
    lateral = study_to_samples(Study("s", "p", (StudyImage(content=dicom(film()), view="lateral"),)), SETTINGS)
    assert isinstance(lateral, Reject)
    assert lateral.reason == "lateral"


@pytest.mark.parametrize(
    ("format", "make", "options", "error", "said"),
    [
        ("csv", None, {}, DataError, "nothing at"),
        ("csv", "file,who\n", {"image": "file"}, DataError, "none with an image"),
        ("csv", "file,who\na.png,x\n", {"image": "picture"}, DataError, "image=picture. It has: file, who"),
        ("csv", "file,who\na.png,x\n", {}, DataError, "Give --column image=NAME. It has: file, who"),
        ("csv", "", {"image": "file"}, DataError, "no header line"),
        ("csv", "file,s\na.png,dev\n", {"image": "file", "split": "s"}, DataError, "expected train, val or test"),
        ("csv", "file\na.png\n", {"image": "file", "age": "x"}, ConfigError, "unknown role"),
        ("dicom-dir", "text", {}, DataError, "is a file"),
        ("dicom-dir", "folder", {}, DataError, "No .dcm file below .* It holds: .txt"),
        ("csv", "folder", {"image": "file"}, DataError, "is a folder"),
        ("excel", "x", {}, ConfigError, "choose one of csv, dicom-dir"),
        ("mimic-cxr", "folder", {}, NotBuiltError, "not built yet"),
    ],
)
def test_sources_that_cannot_be_read(
    format: str, make: str | None, options: dict[str, str], error: type[Exception], said: str, tmp_path: Path
) -> None:
    place = tmp_path / "source"
    if make == "folder":
        place.mkdir()
        (place / "readme.txt").write_text("no films")
    elif make is not None:
        place.write_text(make)
    with pytest.raises(error, match=said):
        run_local(format, place, str(tmp_path / "set"), SETTINGS, SourceOptions(options))
    assert not (tmp_path / "set").exists()


def test_a_source_without_one_usable_picture_makes_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.dcm").write_text("no DICOM")
    with pytest.raises(DataError, match=r"Not one usable picture in 1 studies \(not_dicom 1\)"):
        run_local("dicom-dir", tmp_path / "in", str(tmp_path / "set"), SETTINGS)
    with pytest.raises(DataError, match="No data set"):
        ShardIndex.load(open_storage(tmp_path / "set"))


def test_another_source_or_key_does_not_overwrite_a_data_set(tree: Path, tmp_path: Path) -> None:
    ingest_tree(tree, tmp_path / "set")
    before = hashes(tmp_path / "set")
    with pytest.raises(DataError, match="Choose another URL"):
        run_local("dicom-dir", tree, str(tmp_path / "set"), IngestSettings(key_secret="another secret here", shard_size=4))
    assert hashes(tmp_path / "set") == before


def test_the_key_file_is_private_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSACL_KEY_SECRET", raising=False)
    file = tmp_path / "deep" / "key"
    secret = key_secret(file)
    assert secret == key_secret(file)
    assert len(secret) == 64
    assert file.stat().st_mode & 0o077 == 0
    assert [path.name for path in file.parent.iterdir()] == ["key"]
    monkeypatch.setenv("SSACL_KEY_SECRET", SECRET)
    assert IngestSettings.from_environment(file).key_secret == SECRET
    assert SECRET not in repr(IngestSettings.from_environment(file))
    monkeypatch.setenv("SSACL_KEY_SECRET", "short")
    with pytest.raises(ConfigError, match="16 characters"):
        key_secret(file)


def test_label_lists() -> None:
    assert finding_labels("Effusion|Pleural_Thickening; mass") == {
        "Lung Lesion": 1,
        "Pleural Effusion": 1,
        "Pleural Other": 1,
        "No Finding": 0,
    }
    assert finding_labels("COVID-19, ARDS") == {}
    normal = finding_labels("No Finding")
    assert normal.pop("No Finding") == 1
    assert set(normal.values()) == {0}
    assert "Support Devices" not in normal


def test_patients_and_splits_of_a_dicom_tree(tmp_path: Path) -> None:
    for place, patient in (("train/A/1", "one"), ("train/A/2", "one"), ("Val/B/1", ""), ("C/1", "")):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        (folder / "x.dcm").write_bytes(dicom(film(), PatientID=patient))
    (tmp_path / "train/A/1/notes.txt").write_text("notes")
    studies = {study.study_id: study for study in open_source("dicom-dir", tmp_path)}
    assert {key: (study.patient_id, study.split) for key, study in studies.items()} == {
        "train/A/1": ("one", "train"),
        "train/A/2": ("one", "train"),
        "Val/B/1": ("B", "val"),
        "C/1": ("C", ""),
    }
    assert studies["train/A/1"].report == "notes"


@pytest.mark.ray
def test_on_ray_the_data_set_is_the_same(tree: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from ray_jobs.ingest import run_ingest

    ingest_tree(tree, tmp_path / "local")
    with embedded_s3(tmp_path / "s3") as server:
        # Ray is up before the credentials are there: tasks must get them with their work.
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        try:
            for name, value in server.environment.items():
                monkeypatch.setenv(name, value)
            summary = run_ingest("dicom-dir", tree, "s3://ssacl/set", SETTINGS, progress=False)
            assert ray.is_initialized()
            assert summary.num_shards_written == summary.num_shards
            (tmp_path / "other" / "train-000000.tar").mkdir(parents=True)
            films = SourceOptions(COLUMNS, tmp_path / "films")
            with pytest.raises(StorageError, match="Is a directory"):
                run_ingest("csv", table, str(tmp_path / "other"), SETTINGS, films, progress=False)
        finally:
            ray.shutdown()
        assert hashes(tmp_path / "s3" / "ssacl" / "set") == hashes(tmp_path / "local")
