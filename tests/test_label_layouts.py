"""Labelled films in the layouts of NIH, RSNA and ingested sets: what is read, how patients are split, and what is refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from downstream_trees import SIDE_PX, marked_film, write_nih, write_rsna
from training_set import write_training_set

from ssacl.errors import ConfigError, DataError
from ssacl.evaluation.downstream.films import ABSENT, PRESENT, FilmReader, TaskFilm, TaskSet, label_table
from ssacl.evaluation.downstream.label_layouts import NIH_FINDINGS, LabelOptions, read_labels
from ssacl.evaluation.downstream.splits import SHARES, label_subset, split_patients

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def nih(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nih(tmp_path_factory.mktemp("labels") / "nih")


@pytest.fixture(scope="module")
def rsna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rsna(tmp_path_factory.mktemp("labels") / "rsna")


def films_of(num_patients: int, films_each: int = 2) -> list[TaskFilm]:
    """A tenth of the patients has the rare first finding, a half the second."""
    return [
        TaskFilm(f"{patient}-{number}", str(patient), (int(patient % 10 == 0), int(patient % 2 == 0)), Path("none"))
        for patient in range(num_patients)
        for number in range(films_each)
    ]


def patients(films: tuple[TaskFilm, ...]) -> set[str]:
    return {film.patient for film in films}


def test_nih_is_read_whole_and_keeps_its_own_test_list(nih: Path) -> None:
    task = read_labels(nih, LabelOptions())
    assert task.layout == "nih"
    assert task.names == NIH_FINDINGS
    assert {name: len(films) for name, films in task.splits.items()} == {"train": 54, "val": 6, "test": 20}
    assert patients(task.splits["test"]) == {str(patient) for patient in range(0, 40, 4)}
    effusion, atelectasis = (task.names.index(name) for name in ("Effusion", "Atelectasis"))
    labels = {film.id: film.labels for films in task.splits.values() for film in films}
    assert labels["00000001_000.png"][effusion] == labels["00000001_001.png"][atelectasis] == PRESENT
    assert labels["00000002_000.png"][atelectasis] == labels["00000039_000.png"][effusion] == ABSENT
    assert sum(labels["00000039_000.png"]) == 0
    film = next(film for film in task.splits["test"] if film.id == "00000004_001.png")
    assert np.allclose(FilmReader().square(film, SIDE_PX), marked_film(True, 9) / 255, atol=1e-6)


def test_findings_and_films_are_chosen(nih: Path) -> None:
    task = read_labels(nih, LabelOptions(findings=("effusion",), only=("Atelectasis", "no finding")))
    assert task.names == ("Effusion",)
    shown = {int(film.patient) for films in task.splits.values() for film in films}
    assert shown == {patient for patient in range(40) if patient >= 20 or patient % 2}


def test_rsna_is_one_row_per_box_and_one_film_per_id(rsna: Path) -> None:
    task = read_labels(rsna, LabelOptions(seed=1))
    films = [film for name in SPLITS for film in task.splits[name]]
    assert len(films) == len({film.id for film in films}) == 20
    assert sum(film.labels[0] for film in films) == 10
    assert not task.patients_known
    assert np.allclose(
        FilmReader().square(films[0], SIDE_PX), marked_film(bool(films[0].labels[0]), int(films[0].id[-4:])) / 255, atol=1e-6
    )


def test_an_ingested_set_keeps_its_splits(tmp_path: Path) -> None:
    url = str(write_training_set(tmp_path / "set"))
    task = read_labels(url, LabelOptions(findings=("Pleural Effusion",), only=("Pleural Effusion", "No Finding")))
    assert {name: label_table(films).sum() for name, films in task.splits.items()} == {"train": 10, "val": 4, "test": 2}
    assert task.sha256
    assert FilmReader(task.storage).square(task.splits["val"][0], 48).max() > 0.5
    assert len(read_labels(url, LabelOptions(findings=("Pleural Effusion",), only=("No Finding",))).splits["train"]) == 10


def test_patients_are_dealt_whole_in_the_asked_shares_and_by_finding() -> None:
    films = films_of(200)
    dealt = split_patients(films, 3)
    assert {name: len(patients(own)) for name, own in dealt.items()} == {"train": 140, "val": 20, "test": 40}
    for name, own in dealt.items():
        positive = label_table(own).mean(0)
        assert positive[0] == pytest.approx(0.1, abs=0.05), name
        assert positive[1] == pytest.approx(0.5, abs=0.1), name
    assert sum(len(own) for own in dealt.values()) == len(films)
    assert split_patients(films, 3) == dealt
    assert split_patients(films, 4) != dealt
    assert set(SHARES) == set(dealt)


def test_label_subsets_are_nested_stratified_and_seeded() -> None:
    films = films_of(200)
    one, ten, all_of_them = (label_subset(films, percent, 5) for percent in (1, 10, 100))
    assert patients(one) < patients(ten) < patients(all_of_them)
    assert list(all_of_them) == films
    assert len(patients(ten)) == 20
    assert label_table(ten)[::2].sum(0).tolist() == [2, 10]
    # Of each of the three kinds of patients, one.
    assert len(patients(one)) == 3
    assert label_table(one).any(0).all()
    assert label_subset(films, 10, 5) == ten
    assert label_subset(films, 10, 6) != ten
    for percent in (0, -1, 101):
        with pytest.raises(ConfigError, match="no share of labels"):
            label_subset(films, percent, 0)


def test_a_patient_in_two_splits_and_an_empty_split_are_refused() -> None:
    one, two = TaskFilm("a", "p1", (1,), Path("a")), TaskFilm("b", "p1", (0,), Path("b"))
    other = TaskFilm("c", "p2", (0,), Path("c"))
    with pytest.raises(DataError, match="1 patients have films in more than one split"):
        TaskSet("nih", ("x",), {"train": (one,), "val": (other,), "test": (two,)}, "")
    with pytest.raises(DataError, match="'val' has no film"):
        TaskSet("nih", ("x",), {"train": (one, two), "val": (), "test": (other,)}, "")


def changed(source: Path, target: Path, file: str, old: str, new: str) -> Path:
    shutil.copytree(source, target)
    text = (target / file).read_text()
    assert old in text
    (target / file).write_text(text.replace(old, new, 1))
    return target


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("Data_Entry_2017.csv", "Finding Labels", "Labels", "no column 'Finding Labels'"),
        ("Data_Entry_2017.csv", "Effusion|Atelectasis", "Effusion|Gout", "label 'Gout'"),
        ("Data_Entry_2017.csv", "00000001_000.png", "00000001_001.png", "lists a picture twice"),
        ("train_val_list.txt", "00000001_000.png", "00000000_000.png", "1 pictures are in train_val_list.txt and in test_list.txt"),
        ("train_val_list.txt", "00000001_000.png", "00000099_000.png", "lists 1 pictures that Data_Entry_2017.csv does not have"),
        ("test_list.txt", "00000004_000.png", "00000001_000.png", "1 pictures are in"),
    ],
)
def test_damaged_nih_tables_are_named(nih: Path, tmp_path: Path, file: str, old: str, new: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_labels(changed(nih, tmp_path / "nih", file, old, new), LabelOptions())


def test_missing_pictures_are_counted_and_never_dropped_in_silence(nih: Path, rsna: Path, tmp_path: Path) -> None:
    for source, pattern in ((nih, "**/0000000*_001.png"), (rsna, "**/*000[12].dcm")):
        folder = Path(shutil.copytree(source, tmp_path / source.name))
        lost = sorted(folder.glob(pattern))
        for path in lost:
            path.unlink()
        with pytest.raises(DataError, match=f"missing image: {len(lost)}.*--leave-out-bad"):
            read_labels(folder, LabelOptions())
        task = read_labels(folder, LabelOptions(leave_out_bad=True))
        assert task.left_out == {"missing image": len(lost)}
        assert task.describe()["left_out"] == task.left_out


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [("46,40,10,16,1", "46,40,10,16,0", "says 0 and 1 of one film"), (",1\r\n", ",2\r\n", "Target '2'"), ("Target", "Class", "'Target'")],
)
def test_damaged_rsna_tables_are_named(rsna: Path, tmp_path: Path, old: str, new: str, message: str) -> None:
    shutil.copytree(rsna, tmp_path / "rsna")
    table = tmp_path / "rsna" / "stage_2_train_labels.csv"
    content = table.read_bytes().decode()
    assert old in content
    table.write_bytes(content.replace(old, new, 1).encode())
    with pytest.raises(DataError, match=message):
        read_labels(tmp_path / "rsna", LabelOptions())


def test_what_is_no_layout_or_finding_is_named(nih: Path, rsna: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no layout of labelled films"):
        read_labels(tmp_path, LabelOptions())
    with pytest.raises(ConfigError, match="'Gout' is no finding"):
        read_labels(nih, LabelOptions(findings=("Gout",)))
    with pytest.raises(ConfigError, match="'Gout' is no finding"):
        read_labels(nih, LabelOptions(only=("Gout",)))
    with pytest.raises(ConfigError, match="--only"):
        read_labels(rsna, LabelOptions(only=("Pneumonia",)))
    with pytest.raises(ConfigError, match="no layout"):
        read_labels(nih, LabelOptions(layout="mimic"))


def test_an_unreadable_film_stops_the_task_without_its_name(nih: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(nih, tmp_path / "nih"))
    (folder / "images_001" / "images" / "00000004_000.png").write_bytes(b"nothing")
    test = read_labels(folder, LabelOptions()).splits["test"]
    with pytest.raises(DataError, match="Film 3 of 20") as told:
        list(FilmReader().batches(test, SIDE_PX, 8))
    assert "00000004" not in str(told.value)
