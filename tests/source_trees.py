"""Miniature trees in the true layouts of the public sets, made by the tests."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

from dicom_files import dicom, film
from PIL import Image

STUDIES = {
    # study -> (subject, split, [(dicom_id, view)], report)
    "50414267": ("10000032", "train", [("02aa804e", "PA"), ("174413ec", "LATERAL")], " FINDINGS:\n Small left pleural effusion.\n"),
    "53189527": ("10000032", "train", [("2a2277a9", "AP")], " IMPRESSION:\n No pneumothorax.\n"),
    "56699142": ("11000011", "validate", [("68b5c4b1", "AP")], " FINDINGS:\n The lungs are clear.\n"),
    "58555910": ("12000014", "test", [("ea030e7a", "PA"), ("fa20160d", "XTABLE LATERAL")], ""),
}
_FINDINGS = ("Pleural Effusion", "Pneumothorax", "No Finding")
_CHEXPERT = {"50414267": ("1.0", "", ""), "53189527": ("", "0.0", ""), "56699142": ("", "", "1.0"), "58555910": ("-1.0", "", "")}


def picture(number: int, kind: str = "PNG") -> bytes:
    """A film that differs from the others in a few pixels."""
    pixels = film(64).copy()
    pixels[0, number] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def table(path: Path, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    buffer = io.StringIO()
    csv.writer(buffer).writerows([header, *rows])
    content = buffer.getvalue().encode()
    write(path, gzip.compress(content) if path.suffix == ".gz" else content)


def mimic_tree(root: Path, suffix: str) -> Path:
    """MIMIC-CXR (".dcm") or MIMIC-CXR-JPG (".jpg") with tables; the split table names one picture that is not there."""
    number = 0
    splits, metadata = [("absent00", "59999999", "19999999", "train")], []
    for study, (subject, split, pictures, report) in STUDIES.items():
        folder = root / "files" / f"p{subject[:2]}" / f"p{subject}"
        if report:
            write(folder / f"s{study}.txt", f"                                 FINAL REPORT\n{report}")
        for dicom_id, view in pictures:
            number += 1
            pixels = film(64).copy()
            pixels[0, number] = 255
            position = "LL" if "LATERAL" in view else view
            content = dicom(pixels, ViewPosition=position, PatientID=subject) if suffix == ".dcm" else picture(number, "JPEG")
            write(folder / f"s{study}" / f"{dicom_id}{suffix}", content)
            splits.append((dicom_id, study, subject, split))
            metadata.append((dicom_id, subject, study, view, "64", "64"))
    table(root / "mimic-cxr-2.0.0-split.csv.gz", ("dicom_id", "study_id", "subject_id", "split"), splits)
    table(root / "mimic-cxr-2.0.0-metadata.csv.gz", ("dicom_id", "subject_id", "study_id", "ViewPosition", "Rows", "Columns"), metadata)
    labels = [(STUDIES[study][0], study, *values) for study, values in _CHEXPERT.items()]
    table(root / "mimic-cxr-2.0.0-chexpert.csv.gz", ("subject_id", "study_id", *_FINDINGS), labels)
    return root


def open_i_tree(root: Path) -> Path:
    """Open-i's XML reports and PNGs, the table of projections, one report without a picture, one picture that is missing."""
    names = {
        "1": ["CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"],
        "2": ["CXR2_IM-0652-1001"],
        "3": [],
        "4": ["CXR4_IM-2050-1001"],
    }
    rows = []
    for place, (number, pictures) in enumerate(names.items()):
        parents = "".join(f'<parentImage id="{name}"><figureId>F1</figureId></parentImage>' for name in pictures)
        write(
            root / "ecgen-radiology" / f"{number}.xml",
            f'<?xml version="1.0" encoding="utf-8"?><eCitation><uId id="CXR{number}"/>'
            '<licenseURL>x</licenseURL><MedlineCitation><Article><Abstract><AbstractText Label="COMPARISON">None.</AbstractText>'
            '<AbstractText Label="INDICATION">XXXX-year-old with cough</AbstractText>'
            '<AbstractText Label="FINDINGS">The cardiac silhouette is enlarged.</AbstractText>'
            '<AbstractText Label="IMPRESSION">Cardiomegaly. XXXX.</AbstractText></Abstract></Article></MedlineCitation>'
            f"{parents}</eCitation>",
        )
        for index, name in enumerate(pictures):
            if number != "4":
                write(root / "NLMCXR_png" / f"{name}.png", picture(10 * place + index))
            base = name.removeprefix("CXR").removeprefix("1_1_IM") if number == "1" else name.removeprefix("CXR")
            base = f"1_IM{base}" if number == "1" else base
            rows.append((number, f"{base}.dcm.png", "Lateral" if name.endswith("4001") else "Frontal"))
    table(root / "indiana_projections.csv", ("uid", "filename", "projection"), rows)
    return root


def r2gen_tree(root: Path) -> Path:
    """R2Gen's annotation.json beside images/."""
    tree: dict[str, list[dict[str, object]]] = {"train": [], "val": [], "test": []}
    for number, (split, study) in enumerate([("train", "CXR2384_IM-0942"), ("val", "CXR7_IM-1"), ("test", "CXR9_IM-2")]):
        paths = [f"{study}/{index}.png" for index in range(2)]
        for index, path in enumerate(paths):
            write(root / "images" / path, picture(2 * number + index))
        row = {"id": study, "report": "The heart is enlarged . No effusion .", "image_path": paths, "split": split}
        tree[split].append(row)
    write(root / "annotation.json", json.dumps(tree))
    return root


def release_tree(root: Path) -> Path:
    """The published code's tables over a MIMIC-CXR-JPG tree; their paths are those of another machine."""
    mimic_tree(root, ".jpg")
    for path in root.glob("*.csv.gz"):
        path.unlink()
    for split, ours in (("train", "train"), ("validate", "validate"), ("test", "test")):
        rows = []
        for study, (subject, given, pictures, report) in STUDIES.items():
            if given != ours:
                continue
            for dicom_id, _ in pictures:
                path = f"/data/mimic/files/p{subject[:2]}/p{subject}/s{study}/{dicom_id}.jpg"
                anatomies = json.dumps({"PLANTEDANATOMY": ["PLANTEDSENTENCE"]})
                rows.append((dicom_id, path, report.strip() or "Clear.", "PLANTEDPROMPT", anatomies))
        table(root / f"ANA-MIMIC-{split}.csv", ("image_id", "image_path", "report", "prompt", "anatomies"), rows)
    return root
