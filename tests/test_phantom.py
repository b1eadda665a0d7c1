"""The phantom: same bytes everywhere, true masks, visible findings, honest reports, a valid DICOM tree, truth out of reach."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import UID
from scipy import ndimage

from ssacl.anatomy import CHILDREN, FINDINGS, INNER_NODES, LEAVES, NO_FINDING, NODE_INDEX, NODES, FindingStatus
from ssacl.data.labeler import label_report
from ssacl.data.reports import split_sections
from ssacl.errors import ConfigError, DataError, StorageError
from ssacl.phantom import PhantomTruth, generate_study, write_dicom_tree
from ssacl.phantom.dicom import dicom_bytes
from ssacl.phantom.findings import WEIGHTS, TrueFinding, _draw, changed_body, draw_findings, is_normal
from ssacl.phantom.geometry import Anatomy, Frame, draw_body, draw_pose
from ssacl.phantom.paint import paint
from ssacl.phantom.render import Scene, expose
from ssacl.phantom.reports import write_report
from ssacl.phantom.study import patient_of, split_of
from ssacl.phantom.truth import MANIFEST, decode_truth, encode_truth

ROOT = Path(__file__).parents[1]
_PRINT_HASHES = """
import hashlib
from ssacl.phantom import generate_study
for index in (0, 3, 17):
    study = generate_study(5, index, 96)
    print(hashlib.sha256(study.detector.tobytes() + study.report.encode() + study.truth.masks.tobytes()).hexdigest())
"""


def test_equal_bytes_in_another_process() -> None:
    result = subprocess.run([sys.executable, "-c", _PRINT_HASHES], cwd=ROOT, capture_output=True, text=True, check=True)
    here = []
    for index in (17, 3, 0):
        study = generate_study(5, index, 96)
        here.append(hashlib.sha256(study.detector.tobytes() + study.report.encode() + study.truth.masks.tobytes()).hexdigest())
    assert result.stdout.split() == here[::-1]
    assert len(set(here)) == 3


def test_studies_depend_on_seed_and_index_but_text_not_on_size() -> None:
    one, other, small = generate_study(1, 4, 96), generate_study(2, 4, 96), generate_study(1, 4, 64, with_truth=False)
    assert not np.array_equal(one.detector, other.detector)
    assert one.patient_id != other.patient_id
    assert (one.report, one.study_id, one.view) == (small.report, small.study_id, small.view)
    assert small.truth is None
    assert np.array_equal(small.detector, generate_study(1, 4, 64).detector)


@pytest.mark.parametrize("arguments", [(-1, 0, 96), (0, -1, 96), (0, 0, 8)])
def test_arguments_out_of_range_are_named(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="size_px >= 32"):
        generate_study(*arguments)


def test_masks_follow_the_graph_and_the_sides() -> None:
    for index in range(12):
        study = generate_study(3, index, 96)
        masks = study.truth.masks
        assert masks.shape == (32, 96, 96)
        assert masks.dtype == bool
        assert study.image.shape == (96, 96)
        for node in INNER_NODES:
            union = np.logical_or.reduce([masks[NODE_INDEX[child]] for child in CHILDREN[node]])
            if node == "cardiac silhouette":
                assert not (union & ~masks[NODE_INDEX[node]]).sum() > 0.1 * union.sum()
            else:
                assert np.array_equal(masks[NODE_INDEX[node]], union)
        centre = {node: np.array(ndimage.center_of_mass(masks[NODE_INDEX[node]])) for node in NODES if masks[NODE_INDEX[node]].any()}
        # The patient's right is on the left of the picture.
        assert centre["right lung"][1] < centre["spine"][1] < centre["left lung"][1]
        assert centre["aortic arch"][1] > centre["superior vena cava"][1]
        for side in ("right", "left"):
            order = [f"{side} {part}" for part in ("apical zone", "upper lung zone", "mid lung zone", "lower lung zone", "hemidiaphragm")]
            rows = [centre[node][0] for node in order if node in centre]
            assert rows == sorted(rows)


def test_a_fixed_map_points_right_in_at_most_half_of_the_cases() -> None:
    """Argmax of the training average of each leaf's mask, on other studies: exact, and within 16 px on a 224 px picture."""
    size, num_train, num_test = 112, 120, 80
    radius = 16 * size / 224
    leaves = [NODE_INDEX[leaf] for leaf in LEAVES]
    masks = np.stack([generate_study(9, index, size).truth.masks[leaves] for index in range(num_train + num_test)])
    average, others = masks[:num_train].mean(0), masks[num_train:]
    rows, columns = np.mgrid[:size, :size]
    exact, near, inside_own_film = [], [], []
    for leaf in range(len(LEAVES)):
        y, x = np.unravel_index(average[leaf].argmax(), average[leaf].shape)
        disc = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
        exact.append(others[:, leaf, y, x].mean())
        near.append((others[:, leaf] & disc).any(axis=(1, 2)).mean())
        inside_own_film.append(others[:, leaf].any(axis=(1, 2)).mean())
    assert np.mean(exact) <= 0.25
    assert np.mean(near) <= 0.5
    # The variation must not come from anatomy pushed off the film.
    assert np.mean(inside_own_film) >= 0.97


def _twins(name: str, index: int, size: int = 112) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures of one patient with and without a marked finding, exposed alike, and the finding's mask."""
    pictures, mask = [], np.zeros((size, size), dtype=bool)
    for with_finding in (True, False):
        rng = np.random.default_rng([21, index])
        body, pose = draw_body(rng), draw_pose(rng, "PA")
        findings = [dataclasses.replace(item, severity="severe", amount=0.9) for item in _draw(name, rng, set())] if with_finding else []
        anatomy = Anatomy(changed_body(body, findings), pose, Frame(pose, size))
        scene = Scene(anatomy, np.random.default_rng([22, index]))
        for item in findings:
            mask |= paint(scene, item)
        pictures.append(expose(scene, np.random.default_rng([23, index])) / 4095)
    return pictures[0], pictures[1], mask


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_a_marked_finding_changes_the_picture_where_its_mask_says(name: str) -> None:
    inside, outside = [], []
    for index in range(6):
        sick, well, mask = _twins(name, index)
        if mask.sum() < 5:  # off the film
            continue
        change = np.abs(sick - well)
        inside.append(change[mask].mean())
        outside.append(change[~ndimage.binary_dilation(mask, iterations=3)].mean())
    assert len(inside) >= 4
    assert np.mean(inside) > 0.04
    assert np.mean(inside) > 4 * np.mean(outside)


def test_prevalences() -> None:
    counts: Counter[str] = Counter()
    num = 3000
    for index in range(num):
        findings = draw_findings(np.random.default_rng([1, 2, index]))
        counts.update({item.name for item in findings})
        counts[NO_FINDING] += is_normal(findings)
        assert len({item.name for item in findings}) <= 3
    shares = {name: counts[name] / num for name in FINDINGS}
    assert 0.26 < shares.pop(NO_FINDING) < 0.38
    assert 0.16 < shares["Pleural Effusion"] < 0.25
    assert all(0.07 < share < 0.25 for share in shares.values()), shares


def _report(index: int) -> tuple[list[TrueFinding], str]:
    findings = draw_findings(np.random.default_rng([31, index]))
    return findings, write_report(findings, "PA", index % 5 == 0, np.random.default_rng([32, index]))


def test_reports_say_exactly_what_is_there() -> None:
    """The rule labeler, which knows nothing of the templates, reads the truth back out of every report."""
    for index in range(300):
        findings, text = _report(index)
        sections = split_sections(text)
        labels = label_report(sections.findings, sections.impression).labels
        true = {item.name: item.certainty for item in findings}
        for name, status in zip(FINDINGS, labels, strict=True):
            if name == NO_FINDING:
                assert (status == FindingStatus.PRESENT) == is_normal(findings), text
            elif name in true:
                assert status == (FindingStatus.PRESENT if true[name] == "present" else FindingStatus.UNCERTAIN), (name, text)
            else:
                assert status in (FindingStatus.ABSENT, FindingStatus.UNMENTIONED), (name, text)


def test_reports_name_the_side_and_only_it() -> None:
    checked = 0
    for index in range(300):
        findings, text = _report(index)
        if len(findings) != 1 or findings[0].side not in ("right", "left") or findings[0].name == "Support Devices":
            continue
        impression = split_sections(text).impression.lower()
        other = {"right": "left", "left": "right"}[findings[0].side]
        assert findings[0].side in impression, text
        assert other not in impression, text
        checked += 1
    assert checked > 30


def test_language_is_small_and_varied() -> None:
    texts = [_report(index)[1] for index in range(600)]
    described = [" ".join((split_sections(text).findings, split_sections(text).impression)) for text in texts]
    words = [text.lower().replace(".", " ").replace(",", " ").split() for text in described]
    assert len({word for text in words for word in text}) < 500
    lengths = [len(text) for text in words]
    assert 38 <= np.median(lengths) <= 65
    assert max(lengths) <= 110
    assert len(set(described)) > 0.85 * len(described)
    assert all("{" not in text and "  " not in text for text in texts)


def test_patients_have_one_split_and_one_to_three_studies() -> None:
    visits: Counter[int] = Counter()
    for index in range(1000):
        patient, visit = patient_of(6, index)
        assert visit == visits[patient]
        visits[patient] += 1
    assert set(visits.values()) == {1, 2, 3}
    splits = Counter(split_of(f"PH{number}") for number in range(4000))
    assert 0.77 < splits["train"] / 4000 < 0.83
    assert 0.08 < splits["val"] / 4000 < 0.12
    studies = [generate_study(6, index, 32, with_truth=False) for index in range(30)]
    by_patient: dict[str, set[str]] = {}
    for study in studies:
        by_patient.setdefault(study.patient_id, set()).add(study.split)
    assert len(by_patient) == 21
    assert all(len(split) == 1 for split in by_patient.values())


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom") / "data"
    told: list[int] = []
    summary = write_dicom_tree(folder, 24, seed=2, size_px=64, num_processes=2, progress=told.append)
    assert sum(told) == 24
    assert sum(summary.num_per_split.values()) == 24
    return folder


def test_tree_is_valid_dicom_and_joins_its_truth(tree: Path) -> None:
    truth = PhantomTruth.load(tree)
    studies = {study.study_id: study for study in (generate_study(2, index, 64) for index in range(24))}
    files = sorted(tree.rglob("*.dcm"))
    assert len(files) == len(truth) == 24
    instances, kinds = set(), Counter()
    for path in files:
        split, patient, study_id = path.relative_to(tree).parts[:3]
        ds = pydicom.dcmread(path)
        study = studies[study_id]
        entry = truth[hashlib.sha256(ds.PixelData).hexdigest()]
        assert entry.study_id == study_id
        assert np.array_equal(entry.masks, study.truth.masks)
        assert entry.findings == study.truth.findings
        assert all(np.array_equal(a.mask, b.mask) for a, b in zip(entry.findings, study.truth.findings, strict=True))
        assert (split, patient) == (study.split, study.patient_id) == (entry.split, ds.PatientID)
        assert (path.parent / "report.txt").read_text(encoding="utf-8") == study.report
        # PS3.3 type 1 attributes of the DX image.
        for keyword in (
            "ImageType",
            "PixelIntensityRelationship",
            "RescaleType",
            "PresentationLUTShape",
            "BurnedInAnnotation",
            "ImagerPixelSpacing",
        ):
            assert ds[keyword].value not in (None, ""), keyword
        assert ds.SOPClassUID.name == "Digital X-Ray Image Storage - For Presentation"
        assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
        assert all(
            UID(str(uid)).is_valid and str(uid).startswith("2.25.")
            for uid in (ds.SOPInstanceUID, ds.SeriesInstanceUID, ds.StudyInstanceUID)
        )
        instances.add(ds.SOPInstanceUID)
        kinds[ds.PhotometricInterpretation] += 1
        shown = pydicom.pixels.apply_voi_lut(ds.pixel_array, ds) / 4095
        shown = 1 - shown if ds.PhotometricInterpretation == "MONOCHROME1" else shown
        assert np.abs(shown - study.detector / 4095).max() < 2e-3
    assert len(instances) == 24
    assert kinds["MONOCHROME2"] > 12


def test_about_one_study_in_ten_is_monochrome1() -> None:
    blank = generate_study(0, 0, 32, with_truth=False)
    files = [dicom_bytes(dataclasses.replace(blank, study_id=f"ST{index}"))[0] for index in range(300)]
    inverted = sum(b"MONOCHROME1" in content for content in files)
    assert 15 <= inverted <= 50


def test_a_finished_tree_is_kept_and_an_interrupted_one_is_finished(tree: Path) -> None:
    image = next(tree.rglob("*.dcm"))
    before, stamp = image.read_bytes(), image.stat().st_mtime_ns
    write_dicom_tree(tree, 24, seed=2, size_px=64, num_processes=1)
    assert image.stat().st_mtime_ns == stamp
    manifest = tree.with_name("data_truth") / MANIFEST
    settings = json.loads(manifest.read_text())["settings"]
    manifest.write_text(json.dumps({"settings": settings, "complete": False}))
    image.write_bytes(before[:100])
    with pytest.raises(DataError, match="no complete phantom truth"):
        PhantomTruth.load(tree)
    write_dicom_tree(tree, 24, seed=2, size_px=64, num_processes=1)
    assert image.read_bytes() == before
    assert len(PhantomTruth.load(tree)) == 24


def test_a_tree_is_not_mixed_with_other_data(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="other data"):
        write_dicom_tree(tree, 25, seed=2, size_px=64, num_processes=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="other data"):
        write_dicom_tree(tmp_path / "mine", 2, seed=2, size_px=64, num_processes=1)
    with pytest.raises(ConfigError, match="_truth"):
        write_dicom_tree(tmp_path / "x_truth", 2, seed=2)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="Cannot write"):
        write_dicom_tree(tmp_path / "file" / "data", 2, seed=2, size_px=64, num_processes=1)


def test_a_full_disk_leaves_no_half_written_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if "IMAGE.dcm" in path.name:
            whole(path, content[:50])
            raise OSError(28, "No space left on device")
        return whole(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="No space left"):
        write_dicom_tree(tmp_path / "data", 2, seed=2, size_px=64, num_processes=1)
    assert not list((tmp_path / "data").rglob("IMAGE.dcm*"))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:200] + b"\xff" * 300 + b[500:]])
def test_damaged_truth_is_named(damage) -> None:
    content = encode_truth(generate_study(1, 1, 64).truth)
    with pytest.raises(DataError, match="damaged"):
        decode_truth(damage(content))


def test_only_evaluation_code_can_open_the_truth() -> None:
    """No module of the method or of the Ray jobs names the truth, except the phantom itself and evaluation."""
    secret = {"PhantomTruth", "StudyTruth", "TRUTH_SUFFIX", "truth_folder", "decode_truth", "read_manifest"}
    allowed = (
        ROOT / "ssacl/phantom",
        ROOT / "ssacl/evaluation",
        ROOT / "ssacl/commands",
        ROOT / "ray_jobs/evaluate.py",
        ROOT / "ray_jobs/demo.py",
    )
    checked = 0
    for path in [*ROOT.glob("ssacl/**/*.py"), *ROOT.glob("ray_jobs/**/*.py"), *ROOT.glob("serve/**/*.py")]:
        if any(path.is_relative_to(place) for place in allowed):
            continue
        checked += 1
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ssacl.phantom"):
                assert not secret & {name.name for name in node.names}, path
                assert not (node.module or "").endswith(("truth", "masks")), path
            if isinstance(node, ast.Import):
                assert not any(name.name.startswith("ssacl.phantom") for name in node.names), path
            if isinstance(node, ast.Attribute):
                assert node.attr not in secret, path
    assert checked > 5
