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

from ssacl.evaluation.downstream import run_length

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


def square_mask(number: int) -> NDArray[np.bool_]:
    """[64, 64] the place of a white square, which depends on the number."""
    mask = np.zeros((SIDE_PX, SIDE_PX), dtype=bool)
    top, left = 8 + 4 * (number % 6), 8 + 8 * (number % 4)
    mask[top : top + 20, left : left + 24] = True
    return mask


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


def write_siim(folder: Path, num_films: int = 24) -> Path:
    """Two of three films have a pneumothorax, a white square, in two runs of rows; two films a patient; nested as the challenge ships."""
    rows: list[list[object]] = []
    for number in range(num_films):
        name, pixels = f"1.2.276.0.7230010.3.1.4.8323329.{number}", film(SIDE_PX, SIDE_PX, number)
        place = folder / "dicom-images-train" / f"1.2.276.{number}" / f"1.3.{number}"
        place.mkdir(parents=True)
        if number % 3:
            mask = square_mask(number)
            pixels[mask] = 250
            upper, lower = mask.copy(), mask.copy()
            upper[20:], lower[:20] = False, False
            rows += [[name, run_length.encode(half)] for half in (upper, lower) if half.any()]
        else:
            rows.append([name, "-1"])
        (place / f"{name}.dcm").write_bytes(dicom(pixels, PatientID=f"patient {number // 2}"))
    # The challenge's own table has a space before its second column's name.
    write_rows(folder / "train-rle.csv", ("ImageId", " EncodedPixels"), rows)
    return folder


def write_mask_folders(folder: Path, num_films: int = 20) -> Path:
    """Every film has a mask of the right lung, every second one of the left lung."""
    for name in ("images", "masks/right_lung", "masks/left_lung"):
        (folder / name).mkdir(parents=True)
    for number in range(num_films):
        pixels, mask = film(SIDE_PX, SIDE_PX, number), square_mask(number)
        pixels[mask] = 250
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / "right_lung" / f"{number}.png")
        if number % 2:
            Image.fromarray(~mask).save(folder / "masks" / "left_lung" / f"{number}.png")
    return folder
