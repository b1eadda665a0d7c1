"""The real folder as a data set for benchmarks, its splits dealt by patients here: the ingest's own would follow the user's key."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from ssacl.data.convert import IngestSettings
from ssacl.data.corpus import train_dataset_tokenizers
from ssacl.data.ingest import run_local
from ssacl.data.shards import INDEX
from ssacl.data.sources.options import SourceOptions
from ssacl.data.storage import open_storage
from ssacl.errors import DataError

REAL = Path(__file__).parents[2] / "shared" / "data" / "real"
Row = dict[str, str]
"""A row of `images.csv`."""
_COLUMNS = {"image": "file", "patient": "patient_group", "labels": "findings", "view": "view", "split": "dealt_split"}
_VOCAB_SIZE = 2000


def real_data(data: Path, shards: Path, deal: Callable[[Sequence[Row]], dict[str, str]], texts: bool) -> Path:
    """The data set in `shards`, made on the first call; `deal` gives each file's split.

    With `texts` a film's notes go before its labels, and tokenizers are trained.

    Raises
    ------
    DataError
        The real folder is not there, or the ingest's errors.
    """
    if open_storage(str(shards)).exists("wordpiece.json" if texts else INDEX):
        return shards
    rows = real_rows(data)
    split_of = deal(rows)
    columns = _COLUMNS | ({"report": "text_imaging_auto"} if texts else {})
    table = shards.parent / f"{shards.name}.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns.values()], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row | {"dealt_split": split_of[row["file"]]} for row in rows)
    settings = IngestSettings(key_secret="a key for public films alone")  # noqa: S106
    run_local("csv", table, str(shards), settings, SourceOptions(columns=columns, image_root=str(data / "images")), None)
    if texts:
        train_dataset_tokenizers(str(shards), None, _VOCAB_SIZE, _VOCAB_SIZE)
    return shards


def real_rows(data: Path) -> list[Row]:
    """The rows of `images.csv`."""
    try:
        return list(csv.DictReader(io.StringIO((data / "images.csv").read_text(encoding="utf-8"))))
    except OSError as error:
        raise DataError(f"There is no real folder at {data.name} (images.csv); give it with --data.") from error


def hold_annotated_patients_out(rows: Sequence[Row]) -> dict[str, str]:
    """Half of the patients with a mask or box are the test split; of all others one in twelve is for validation."""
    annotated = {
        row["patient_group"]
        for row in rows
        if row["lung_mask"] or row["n_structure_masks"] not in ("", "0") or row["n_boxes"] not in ("", "0")
    }

    def split(patient: str) -> str:
        digest = hashlib.sha256(patient.encode()).digest()
        if patient in annotated and digest[0] % 2:
            return "test"
        return "val" if digest[1] % 12 == 0 else "train"

    return {row["file"]: split(row["patient_group"]) for row in rows}
