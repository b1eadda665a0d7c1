"""Small films in a CSV for tests of ingest: quick to read, with repeats, a broken file and a missing one."""

from __future__ import annotations

import csv
import hashlib
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from ssacl.data.ingest import IngestSettings, IngestSummary, run_local
from ssacl.data.sources import SourceOptions

SECRET = "a secret of the tests"
SETTINGS = IngestSettings(key_secret=SECRET, shard_size=4, longest_side_px=48)
SOURCE = SourceOptions({"image": "file", "report": "text", "patient": "who", "licence": "terms"})


def write_films(folder: Path, num_studies: int, first: int = 0) -> Path:
    """`num_studies` films from number `first` on as CSV; every seventh repeats the one five before, number 3 is cut, number 4 not there."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [("file", "text", "who", "terms")]
    for number in range(first, first + num_studies):
        file = folder / f"{number}.png"
        if number % 7 == 6:
            shutil.copy(folder / f"{number - 5}.png", file)
        elif number != 4:
            pixels = np.random.default_rng(number).normal(128, 40, (12, 12)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).resize((64, 56)).save(file)
        if number == 3:
            file.write_bytes(file.read_bytes()[:300])
        rows.append((file.name, f"IMPRESSION: Film {number} shows no effusion.", f"p{number // 2}", "CC0"))
    table = folder / f"films_{first}.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return table


def join_tables(out: Path, *tables: Path) -> Path:
    """One CSV with the rows of several."""
    lines = [table.read_text().splitlines() for table in tables]
    out.write_text("\n".join([lines[0][0], *(row for part in lines for row in part[1:])]) + "\n")
    return out


def ingest_films(table: Path, out: Path | str, settings: IngestSettings = SETTINGS) -> IngestSummary:
    return run_local("csv", table, str(out), settings, SOURCE)


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}
