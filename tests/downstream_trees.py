"""Miniature trees of the public layouts of downstream tasks, with films on which what is labelled can be seen."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from dicom_files import dicom
from numpy.typing import NDArray
from PIL import Image
from tiny_model import film

SIDE_PX = 64
NIH_HEAD = (
    *("Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "Patient Gender", "View Position"),
    *("OriginalImage[Width", "Height]", "OriginalImagePixelSpacing[x", "y]"),
)
RSNA_HEAD = ("patientId", "x", "y", "width", "height", "Target")


def marked_film(marked: bool, seed: int) -> NDArray[np.uint8]:
    """[64, 64] a film, with a white patch at the left base where it is marked."""
    pixels = film(SIDE_PX, SIDE_PX, seed)
    if marked:
        pixels[40:56, 36:56] = 235
    return pixels


def write_rows(path: Path, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])


def write_nih(folder: Path, num_patients: int = 40) -> Path:
    """Two films a patient; the first half of the patients has effusion (with atelectasis in every second), a quarter is for testing."""
    images = folder / "images_001" / "images"
    images.mkdir(parents=True)
    rows, lists = [], {"train_val": [], "test": []}
    for patient in range(num_patients):
        effusion = patient < num_patients // 2
        for follow_up in range(2):
            name = f"{patient:08d}_{follow_up:03d}.png"
            Image.fromarray(marked_film(effusion, 2 * patient + follow_up)).save(images / name)
            found = ("Effusion|Atelectasis" if patient % 2 else "Effusion") if effusion else "No Finding"
            rows.append([name, found, follow_up, patient, 50, "F", "PA", 2048, 2500, 0.168, 0.168])
            lists["test" if patient % 4 == 0 else "train_val"].append(name)
    write_rows(folder / "Data_Entry_2017.csv", NIH_HEAD, rows)
    for name, listed in lists.items():
        (folder / f"{name}_list.txt").write_text("\n".join(listed))
    return folder


def write_rsna(folder: Path, num_films: int = 20) -> Path:
    """Every second film has pneumonia, in two boxes."""
    images = folder / "stage_2_train_images"
    images.mkdir(parents=True)
    rows: list[list[object]] = []
    for number in range(num_films):
        name, pneumonia = f"0004cfab-14fd-4e49-80ba-63a80b6b{number:04d}", number % 2 == 0
        (images / f"{name}.dcm").write_bytes(dicom(marked_film(pneumonia, number)))
        rows += [[name, 36, 40, 10, 16, 1], [name, 46, 40, 10, 16, 1]] if pneumonia else [[name, "", "", "", "", 0]]
    write_rows(folder / "stage_2_train_labels.csv", RSNA_HEAD, rows)
    return folder
