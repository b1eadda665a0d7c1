"""The layouts that labelled films come in.

nih       `Data_Entry_2017*.csv` (`Image Index`, `Finding Labels` joined by "|", `Patient ID`), `train_val_list.txt`, `test_list.txt`, and
          PNG files anywhere below. A tenth of the patients of train_val_list is set apart for choosing.
rsna      `stage_2_train_labels.csv` (`patientId`, `x`, `y`, `width`, `height`, `Target`; a row per box) and `stage_2_train_images/ID.dcm`.
          An id is an examination: every film counts as a patient.
ingested  A data set of `ssacl data ingest`, with its own splits.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ssacl.anatomy import FINDINGS, FindingStatus
from ssacl.data.labeler import Uncertain
from ssacl.data.loader import open_split
from ssacl.data.records import SPLITS
from ssacl.data.shards import INDEX, ShardIndex, read_sample
from ssacl.data.storage import open_storage
from ssacl.errors import ConfigError, DataError
from ssacl.evaluation.annotations import Problems
from ssacl.evaluation.downstream.films import ABSENT, PRESENT, UNKNOWN, TaskFilm, TaskSet
from ssacl.evaluation.downstream.splits import VAL_SHARE, split_patients

LAYOUTS = ("nih", "rsna", "ingested")
NIH_FINDINGS = (
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax", "Consolidation"),
    *("Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"),
)
_NO_FINDING = "No Finding"
_RSNA_LABELS, _RSNA_IMAGES = "stage_2_train_labels.csv", "stage_2_train_images"
_NIH_TABLES = "Data_Entry_2017*.csv"


@dataclass(frozen=True)
class LabelOptions:
    """Which films and findings of a set are the task."""

    layout: str = ""
    """One of `LAYOUTS`; empty: told by the files."""
    findings: tuple[str, ...] = ()
    """Findings to classify; empty: all of the layout."""
    only: tuple[str, ...] = ()
    """Only films on which one of these findings is present; empty: all."""
    uncertain: Uncertain = "present"
    """What an uncertain label of an ingested set counts as; "ignore" takes it out."""
    seed: int = 0
    leave_out_bad: bool = False
    """Leave out, and count, films whose file is not there."""


def read_labels(place: str | Path, options: LabelOptions) -> TaskSet:
    """The task of a folder (or, if ingested, an s3:// prefix).

    Raises
    ------
    ConfigError
        A finding is not one of the layout's.
    DataError, SplitError, StorageError
        No layout is there, a table is damaged, films are missing, a split is empty or shares a patient with another.
    """
    layout = options.layout or _found_layout(str(place))
    if layout not in LAYOUTS:
        raise ConfigError(f"'{layout}' is no layout of labelled films; expected one of: {', '.join(LAYOUTS)}.")
    if layout == "nih":
        return _nih(Path(place), options)
    return _rsna(Path(place), options) if layout == "rsna" else _ingested(str(place), options)


def _found_layout(place: str) -> str:
    folder = Path(place)
    if "://" in place or (folder / INDEX).is_file():
        return "ingested"
    if list(folder.glob(_NIH_TABLES)):
        return "nih"
    if (folder / _RSNA_LABELS).is_file():
        return "rsna"
    raise DataError(
        f"{folder.name} holds no layout of labelled films: {INDEX} (ingested), {_NIH_TABLES} (NIH) or {_RSNA_LABELS} (RSNA) was expected."
    )


def _nih(folder: Path, options: LabelOptions) -> TaskSet:
    tables = list(folder.glob(_NIH_TABLES))
    if len(tables) != 1:
        raise DataError(f"{len(tables)} tables {_NIH_TABLES} in {folder.name}; exactly one was expected.")
    names, everything = _columns(options.findings, NIH_FINDINGS) or NIH_FINDINGS, (*NIH_FINDINGS, _NO_FINDING)
    only = _columns(options.only, everything)
    files = {path.name: path for path in folder.rglob("*.png")}
    rows: dict[str, tuple[str, frozenset[str]]] = {}
    for row in read_table(tables[0], ("Image Index", "Finding Labels", "Patient ID")):
        found = frozenset(part.strip() for part in row["Finding Labels"].split("|"))
        if unknown := sorted(found - {*everything}):
            raise DataError(f"{tables[0].name} has the label '{unknown[0]}', which is none of NIH's 14 findings or '{_NO_FINDING}'.")
        if row["Image Index"] in rows:
            raise DataError(f"{tables[0].name} lists a picture twice (row {len(rows) + 2}); give each picture one row.")
        rows[row["Image Index"]] = row["Patient ID"], found
    lists = {name: _listed(folder / f"{name}_list.txt", rows, tables[0].name) for name in ("train_val", "test")}
    if both := len({*lists["train_val"]} & {*lists["test"]}):
        raise DataError(f"{both} pictures are in train_val_list.txt and in test_list.txt; a picture belongs to one of them.")
    problems, films = Problems(), {}
    for name, listed in lists.items():
        kept = [each for each in listed if not only or rows[each][1] & {*only}]
        if missing := sum(each not in files for each in kept):
            problems.add("missing image", count=missing)
        films[name] = [
            TaskFilm(each, rows[each][0], tuple(PRESENT if finding in rows[each][1] else ABSENT for finding in names), files[each])
            for each in kept
            if each in files
        ]
    left_out = problems.settle(options.leave_out_bad)
    dealt = split_patients(films["train_val"], options.seed, {"train": 1 - VAL_SHARE, "val": VAL_SHARE})
    how = f"train_val_list.txt ({VAL_SHARE:.0%} of its patients for choosing) and test_list.txt"
    return TaskSet("nih", names, dealt | {"test": tuple(films["test"])}, how, left_out)


def _rsna(folder: Path, options: LabelOptions) -> TaskSet:
    names = _columns(options.findings, ("Pneumonia",)) or ("Pneumonia",)
    if options.only:
        raise ConfigError("--only goes with layouts of several findings; RSNA's labels say Pneumonia or not.")
    targets: dict[str, int] = {}
    for row in read_table(folder / _RSNA_LABELS, ("patientId", "x", "y", "width", "height", "Target")):
        if row["Target"] not in ("0", "1"):
            raise DataError(f"{_RSNA_LABELS} has the Target '{row['Target'][:20]}'; 0 or 1 was expected.")
        # A film with several boxes has several rows.
        if targets.setdefault(row["patientId"], int(row["Target"])) != int(row["Target"]):
            raise DataError(f"{_RSNA_LABELS} says 0 and 1 of one film; correct its rows.")
    problems = Problems()
    files = {name: folder / _RSNA_IMAGES / f"{name}.dcm" for name in targets}
    films = [
        TaskFilm(name, name, (PRESENT if target else ABSENT,), files[name]) for name, target in targets.items() if files[name].is_file()
    ]
    if missing := len(targets) - len(films):
        problems.add("missing image", count=missing)
    left_out = problems.settle(options.leave_out_bad)
    return TaskSet("rsna", names, split_patients(films, options.seed), f"patients dealt by seed {options.seed}", left_out, False)


def _ingested(url: str, options: LabelOptions) -> TaskSet:
    names, only = _columns(options.findings, FINDINGS) or FINDINGS, _columns(options.only, FINDINGS)
    storage = open_storage(url)
    splits, unlabelled = {}, 0
    for split in SPLITS:
        films = []
        for entry in open_split(storage, split, purpose="evaluation"):
            sample = read_sample(storage, entry)
            unlabelled += not sample.labels
            labels = dict(zip(FINDINGS, told_labels(sample.labels, options.uncertain), strict=False))
            if labels and (not only or any(labels[finding] == PRESENT for finding in only)):
                films.append(TaskFilm(entry.key, sample.patient_key, tuple(labels[finding] for finding in names), entry))
        splits[split] = tuple(films)
    left_out = {"film without labels": unlabelled} if unlabelled else {}
    return TaskSet("ingested", names, splits, "the data set", left_out, storage=storage, sha256=ShardIndex.load(storage).digest)


def told_labels(status: Sequence[int], uncertain: Uncertain) -> tuple[int, ...]:
    """`PRESENT`, `ABSENT` or `UNKNOWN` of each `FindingStatus`; what is not mentioned counts as absent."""
    doubt = {"present": PRESENT, "absent": ABSENT, "ignore": UNKNOWN}[uncertain]
    told = {FindingStatus.PRESENT: PRESENT, FindingStatus.UNCERTAIN: doubt}
    return tuple(told.get(FindingStatus(each), ABSENT) for each in status)


def _columns(asked: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The findings asked for; "pleural effusion" and "Pleural_Effusion" are one."""
    by_name = {finding.lower().replace("_", " "): finding for finding in known}
    wanted = {each: by_name.get(each.lower().replace("_", " ")) for each in asked}
    if unknown := [each for each, finding in wanted.items() if finding is None]:
        raise ConfigError(f"'{unknown[0]}' is no finding of this layout; expected some of: {', '.join(known)}.")
    return tuple(dict.fromkeys(finding for finding in wanted.values() if finding))


def _listed(path: Path, rows: dict[str, tuple[str, frozenset[str]]], table: str) -> list[str]:
    try:
        listed = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path.name} cannot be read; NIH's layout has train_val_list.txt and test_list.txt beside its table.") from error
    if unknown := sum(each not in rows for each in listed):
        raise DataError(f"{path.name} lists {unknown} pictures that {table} does not have; give the lists that belong to it.")
    return list(dict.fromkeys(listed))


def read_table(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows of a CSV file that has at least `columns`; spaces around names and values are cut.

    Raises
    ------
    DataError
        It cannot be read, or lacks a column, or a row is short.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True)
            head = [name.strip() for name in next(reader, [])]
            if missing := [column for column in columns if column not in head]:
                raise DataError(f"{path.name} has no column '{missing[0]}'; expected {', '.join(columns)}.")
            places = [head.index(column) for column in columns]
            return [{column: row[place].strip() for column, place in zip(columns, places, strict=True)} for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path.name} cannot be read as a table ({type(error).__name__}); copy it again.") from error
    except IndexError as error:
        raise DataError(f"{path.name} has a row with fewer than {len(columns)} values; copy it again.") from error
