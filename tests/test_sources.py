"""Sources: each public layout becomes the same studies, from a folder and from S3, with its official splits."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dicom_files import dicom, film
from source_trees import STUDIES, mimic_tree, open_i_tree, picture, r2gen_tree, release_tree, table, write

from ssacl.anatomy import FINDING_INDEX, FindingStatus
from ssacl.data.ingest import IngestSettings, run_local
from ssacl.data.records import Sample, Study
from ssacl.data.shards import ShardIndex, read_sample
from ssacl.data.sources import FORMATS, SourceOptions, open_source
from ssacl.data.storage import embedded_s3, open_storage
from ssacl.errors import ConfigError, DataError

SETTINGS = IngestSettings(key_secret="a secret of the tests", shard_size=4)
Tree = Callable[[Path], Path]


def csv_tree(root: Path) -> Path:
    for number in range(3):
        write(root / "films" / f"{number}.png", picture(number))
    table(root / "films.csv", ("file", "text", "part"), [(f"{n}.png", f"IMPRESSION: Effusion {n}.", "train") for n in range(3)])
    return root / "films.csv"


def dicom_tree(root: Path) -> Path:
    write(root / "val" / "p1" / "s1" / "1.2.840.5", dicom(film(64), PatientID="p1"))
    write(root / "val" / "p1" / "s1" / "report.txt", "FINDINGS: Clear lungs.")
    write(root / "train" / "p2" / "s2" / "IM000001", dicom(film(64)[::-1].copy(), PatientID="p2"))
    write(root / "train" / "p2" / "s2" / "DICOMDIR", b"not a film")
    return root


TREES: dict[str, tuple[str, Tree, SourceOptions]] = {
    "mimic-cxr": ("mimic-cxr", lambda root: mimic_tree(root, ".dcm"), SourceOptions()),
    "mimic-cxr-jpg": ("mimic-cxr-jpg", lambda root: mimic_tree(root, ".jpg"), SourceOptions()),
    "open-i": ("iu-xray", open_i_tree, SourceOptions()),
    "r2gen": ("iu-xray", r2gen_tree, SourceOptions()),
    "release-csv": ("release-csv", release_tree, SourceOptions()),
    "csv": ("csv", csv_tree, SourceOptions({"image": "file", "report": "text", "split": "part"})),
    "dicom-dir": ("dicom-dir", dicom_tree, SourceOptions()),
}


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path, str], str]]:
    """Copies a folder to a prefix of a real S3 server, and gives its URL."""

    def put(folder: Path, prefix: str) -> str:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                open_storage(f"s3://ssacl/{prefix}").upload(path.relative_to(folder).as_posix(), path)
        return f"s3://ssacl/{prefix}"

    with embedded_s3(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield put


def samples(url: Path | str) -> list[Sample]:
    storage = open_storage(url)
    return [read_sample(storage, entry) for shard in ShardIndex.load(storage).shards for entry in shard.samples]


def by_study(studies: Iterator[Study]) -> dict[str, Study]:
    return {study.study_id: study for study in studies}


@pytest.mark.parametrize("name", TREES)
def test_a_source_gives_the_same_data_set_from_a_folder_and_from_s3(name: str, s3: Callable[[Path, str], str], tmp_path: Path) -> None:
    format, make, options = TREES[name]
    local = make(tmp_path / "source")
    remote = s3(tmp_path / "source", name) + ("/films.csv" if format == "csv" else "")
    roots = {"local": tmp_path / "source" / "films", "s3": f"s3://ssacl/{name}/films"} if format == "csv" else {"local": None, "s3": None}
    made = {}
    for kind, place in (("local", local), ("s3", remote)):
        chosen = SourceOptions(options.columns, roots[kind])
        made[kind] = run_local(format, place, str(tmp_path / kind), SETTINGS, chosen)
    assert sum(made["local"].num_samples.values()) > 0
    assert made["local"].num_samples == made["s3"].num_samples
    assert made["local"].rejects == made["s3"].rejects
    shards = [sorted((path.name, path.read_bytes()) for path in (tmp_path / kind).glob("*.tar")) for kind in made]
    assert shards[0] == shards[1]


def test_every_format_is_tried() -> None:
    assert {format for format, _, _ in TREES.values()} | {"dicomweb"} == set(FORMATS)


@pytest.mark.parametrize("suffix", [".dcm", ".jpg"])
def test_mimic_keeps_official_splits_views_and_reports(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    format = "mimic-cxr" if suffix == ".dcm" else "mimic-cxr-jpg"
    studies = by_study(open_source(format, mimic_tree(tmp_path, suffix)))
    assert {study: studies[f"s{study}"].split for study in STUDIES} == {
        study: {"validate": "val"}.get(split, split) for study, (_, split, _, _) in STUDIES.items()
    }
    assert studies["s50414267"].patient_id == studies["s53189527"].patient_id == "p10000032"
    assert [image.view for image in studies["s50414267"].images] == ["PA", "LATERAL"]
    assert "left pleural effusion" in studies["s50414267"].report
    assert studies["s58555910"].report == ""
    assert studies["s58555910"].labels == {"Pleural Effusion": FindingStatus.UNCERTAIN}
    assert "PhysioNet" in studies["s50414267"].licence
    assert "1 of 7 pictures of the split table are not here" in caplog.text
    summary = run_local(format, tmp_path, str(tmp_path / "set"), SETTINGS)
    assert summary.num_samples == {"train": 2, "val": 1, "test": 1}
    assert summary.rejects == {"lateral": 2}
    unread = next(sample for sample in samples(tmp_path / "set") if not sample.has_text)
    # Labels of the source serve where there is no text.
    assert unread.labels[FINDING_INDEX["Pleural Effusion"]] == FindingStatus.UNCERTAIN


def test_mimic_reports_may_lie_elsewhere_and_tables_may_be_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree = mimic_tree(tmp_path / "set", ".jpg")
    reports = tmp_path / "reports" / "mimic-cxr-reports" / "files"
    for path in list(tree.rglob("*.txt")):
        target = reports / path.relative_to(tree / "files")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)
    for path in tree.glob("*.csv.gz"):
        path.unlink()
    assert not any(study.report for study in open_source("mimic-cxr-jpg", tree))
    assert "no report found" in caplog.text
    assert "no metadata table" in caplog.text
    studies = by_study(open_source("mimic-cxr-jpg", tree, SourceOptions(reports=tmp_path / "reports")))
    assert "left pleural effusion" in studies["s50414267"].report
    assert {study.split for study in studies.values()} == {""}


def test_open_i_reports_name_their_pictures_and_projections_their_views(tmp_path: Path) -> None:
    studies = by_study(open_source("iu-xray", open_i_tree(tmp_path)))
    assert sorted(studies) == ["1", "2", "3", "4"]
    assert [image.view for image in studies["1"].images] == ["Frontal", "Lateral"]
    assert "enlarged" in studies["1"].report
    assert "cough" not in studies["1"].report
    summary = run_local("iu-xray", tmp_path, str(tmp_path / "set"), SETTINGS)
    assert summary.rejects == {"lateral": 1, "missing_file": 1, "no_image": 1}


def test_r2gen_keeps_its_split_and_says_that_views_are_unknown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = r2gen_tree(tmp_path)
    for place in (root, root / "annotation.json"):
        studies = by_study(open_source("iu-xray", place))
        assert {name: study.split for name, study in studies.items()} == {
            "CXR2384_IM-0942": "train", "CXR7_IM-1": "val", "CXR9_IM-2": "test"
        }  # fmt: skip
    assert studies["CXR7_IM-1"].patient_id == "CXR7"
    assert "lateral films count as frontal" in caplog.text


def test_the_release_table_gives_reports_and_neither_prompt_nor_anatomies(tmp_path: Path) -> None:
    root = release_tree(tmp_path / "in")
    summary = run_local("release-csv", root, str(tmp_path / "set"), SETTINGS)
    assert summary.num_samples == {"train": 3, "val": 1, "test": 2}
    everything = b"".join(path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file())
    assert b"pleural effusion" in everything
    assert b"PLANTED" not in everything
    one = by_study(open_source("release-csv", root / "ANA-MIMIC-validate.csv"))
    assert {study.split for study in one.values()} == {"val"}
    assert {study.patient_id for study in one.values()} == {"p11000011"}


def test_other_split_words_fall_to_the_patient(tmp_path: Path) -> None:
    """Two films of one patient, one of them not in the split table: both go together."""
    tree = mimic_tree(tmp_path, ".jpg")
    write(tree / "files" / "p12" / "p12000014" / "s57777777" / "newfilm.jpg", picture(40, "JPEG"))
    assert by_study(open_source("mimic-cxr-jpg", tree))["s57777777"].split == "test"


def test_a_film_without_a_suffix_is_found_and_a_directory_file_is_not(tmp_path: Path) -> None:
    studies = list(open_source("dicom-dir", dicom_tree(tmp_path)))
    assert [(study.split, study.patient_id, len(study.images)) for study in studies] == [("train", "p2", 1), ("val", "p1", 1)]


@pytest.mark.parametrize(
    ("format", "make", "error", "said"),
    [
        ("mimic-cxr", lambda root: mimic_tree(root, ".jpg"), DataError, "or --format mimic-cxr-jpg"),
        ("mimic-cxr-jpg", csv_tree, DataError, "is a file"),
        ("iu-xray", dicom_tree, DataError, "neither annotation.json nor"),
        ("release-csv", dicom_tree, DataError, "No ANA-MIMIC-train.csv"),
        ("release-csv", csv_tree, DataError, "has no column image_id"),
        ("dicomweb", dicom_tree, ConfigError, "give its http"),
        ("no-such", dicom_tree, ConfigError, "choose one of csv"),
    ],
)
def test_what_is_not_the_format_says_what_was_expected(format: str, make: Tree, error: type[Exception], said: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=said):
        list(open_source(format, make(tmp_path)))


def test_damaged_tables_and_reports_are_named(tmp_path: Path) -> None:
    tree = mimic_tree(tmp_path / "mimic", ".jpg")
    (tree / "mimic-cxr-2.0.0-split.csv.gz").write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match="not a readable CSV"):
        list(open_source("mimic-cxr-jpg", tree))
    table(tree / "mimic-cxr-2.0.0-split.csv.gz", ("dicom_id", "fold"), [("a", "train")])
    with pytest.raises(DataError, match="has not the columns"):
        list(open_source("mimic-cxr-jpg", tree))
    iu = open_i_tree(tmp_path / "iu")
    write(iu / "ecgen-radiology" / "5.xml", '<!DOCTYPE x [<!ENTITY a "b">]><x>&a;</x>')
    with pytest.raises(DataError, match=r"5\.xml is not one of"):
        list(open_source("iu-xray", iu))
    r2gen = r2gen_tree(tmp_path / "r2gen")
    (r2gen / "annotation.json").write_text(json.dumps({"train": [{"id": 1}]}))
    with pytest.raises(DataError, match="not R2Gen's"):
        list(open_source("iu-xray", r2gen))


def test_s3_that_holds_nothing_and_pictures_that_are_gone(
    s3: Callable[[Path, str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DataError, match="nothing at s3://ssacl/nowhere"):
        open_source("dicom-dir", "s3://ssacl/nowhere")
    csv_tree(tmp_path / "films")
    (tmp_path / "films" / "films" / "1.png").unlink()
    s3(tmp_path / "films", "gone")
    options = SourceOptions({"image": "file"}, "s3://ssacl/gone/films")
    with caplog.at_level(logging.WARNING):
        summary = run_local("csv", "s3://ssacl/gone/films.csv", str(tmp_path / "set"), SETTINGS, options)
    assert summary.rejects == {"missing_file": 1}
    outside = tmp_path / "outside.csv"
    table(outside, ("file",), [("../../etc/passwd",), ("2.png",)])
    assert run_local("csv", outside, str(tmp_path / "set2"), SETTINGS, options).rejects == {"missing_file": 1}
