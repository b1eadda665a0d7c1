"""Masks and true findings are for measuring: nothing that leads into training can open them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_set import tiny_config, write_training_set

from ssacl.cli import main
from ssacl.data.ingest import IngestSettings, run_local
from ssacl.data.loader import open_split
from ssacl.data.sources import SourceOptions, open_source
from ssacl.data.storage import FolderStorage, open_storage
from ssacl.data.truth_guard import refuse_truth
from ssacl.errors import SplitError
from ssacl.phantom import write_dicom_tree
from ssacl.training.legs import legs
from ssacl.training.loop import _Run
from ssacl.training.reporter import LogReporter

ROOT = Path(__file__).parents[1]
SETTINGS = IngestSettings(key_secret="truth guard test secret")
TRAINING = (
    "ssacl.training.loop",
    "ssacl.training.__main__",
    "ssacl.training.dry_run",
    "ray_jobs.train",
    "ray_jobs.board",
    "ray_jobs.ingest",
    "ssacl.data.corpus",
)
KEPT_APART = ("ssacl.phantom", "ssacl.evaluation")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom") / "films"
    write_dicom_tree(folder, 6, seed=2, size_px=64, num_processes=1)
    return folder


@pytest.fixture
def truth(tree: Path) -> Path:
    return tree.with_name("films_truth")


def test_every_way_in_refuses_the_truth(truth: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(truth)
    inside = next(path for path in truth.rglob("*") if path.is_file())
    for place in (truth, truth / "." / "x" / "..", inside, tmp_path / "link", f"file://{truth}"):
        with pytest.raises(SplitError, match="only evaluation opens it"):
            open_storage(str(place))
        with pytest.raises(SplitError, match="only evaluation opens it"):
            refuse_truth(place)
    for place in ("s3://bucket/films_truth", "s3://films_truth", "s3://bucket/films_truth/"):
        with pytest.raises(SplitError):
            open_storage(place)
    for purpose in ("training", "validation", "evaluation", "prediction"):
        with pytest.raises(SplitError):
            open_split(FolderStorage(truth), "train", purpose)  # type: ignore[arg-type]
    for place in (truth, inside.parent):
        with pytest.raises(SplitError):
            open_source("dicom-dir", place)


def test_a_csv_cannot_point_into_the_truth(truth: Path, tmp_path: Path) -> None:
    inside = next(path for path in truth.rglob("*") if path.is_file())
    table = tmp_path / "films.csv"
    for row, root in ((inside, tmp_path), (inside.relative_to(truth.parent), truth.parent), (inside.relative_to(truth), truth)):
        table.write_text(f"image\n{row}\n")
        with pytest.raises(SplitError):
            open_source("csv", table, SourceOptions(columns={"image": "image"}, image_root=root))


def test_a_walk_over_data_and_truth_meets_the_data_only(tree: Path, truth: Path, tmp_path: Path) -> None:
    planted = truth / "films" / "planted.dcm"
    planted.parent.mkdir()
    planted.write_bytes(next(tree.rglob("*.dcm")).read_bytes())
    try:
        studies = list(open_source("dicom-dir", tree.parent))
        assert len(studies) == 6
        assert not [image for study in studies for image in study.images if "_truth" in str(image.path)]
        assert sum(run_local("dicom-dir", tree.parent, str(tmp_path / "set"), SETTINGS).num_samples.values()) == 6
    finally:
        planted.unlink()
        planted.parent.rmdir()


def test_folders_of_other_people_pass(tmp_path: Path) -> None:
    films = tmp_path / "ground_truth" / "films"
    films.mkdir(parents=True)
    refuse_truth(films)
    refuse_truth(tmp_path / "truth")
    refuse_truth("s3://bucket/ground_truth/films")
    open_storage(films).write("x", b"1")


@pytest.mark.parametrize(
    "command",
    [
        ["data", "ingest", "--format", "dicom-dir", "{truth}", "--out", "{out}", "--num-workers", "0"],
        ["data", "tokenizer", "--data", "{truth}"],
        ["data", "verify", "{truth}"],
        ["train", "--config", str(ROOT / "configs" / "phantom_tiny.yaml"), "data.url={truth}", "run.storage_url={out}"],
        ["train", "--dry-run", "--config", str(ROOT / "configs" / "phantom_tiny.yaml"), "data.url={truth}", "run.storage_url={out}"],
    ],
)
def test_the_command_says_so(
    command: list[str], truth: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSACL_KEY_SECRET", "truth guard test secret")
    out = tmp_path / "out"
    assert main([part.format(truth=truth, out=out) for part in command]) == 1
    assert "only evaluation opens it" in capsys.readouterr().err
    assert not out.exists()


def test_training_does_not_even_import_what_reads_the_truth() -> None:
    program = f"import sys, {', '.join(TRAINING)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT, timeout=120)
    assert "ssacl.training.loop" in done.stdout.split()
    assert [name for name in done.stdout.split() if name.startswith(KEPT_APART)] == []


def test_no_import_inside_a_function_does_either() -> None:
    parts = [ROOT / "ssacl" / name for name in ("data", "models", "losses", "training", "inference")]
    files = [path for part in parts for path in part.rglob("*.py")] + [ROOT / "ray_jobs" / name for name in ("train.py", "ingest.py")]
    assert len(files) > 40
    found = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [f"{path.name}: {name}" for name in names if name.startswith(KEPT_APART)]
    assert found == []


@pytest.mark.parametrize("training", [True, False])
def test_the_loop_cannot_load_the_test_split(training: bool, tmp_path: Path) -> None:
    data = write_training_set(tmp_path / "set")
    [leg] = legs(tiny_config(data, tmp_path / "runs"))
    run = _Run(leg, LogReporter(), 0, 1, torch.device("cpu"))
    assert run._loader("val", "wrap", training).steps_per_epoch > 0
    with pytest.raises(SplitError):
        run._loader("test", "wrap", training)


def test_no_training_code_asks_for_another_purpose() -> None:
    files = [*(ROOT / "ssacl" / "training").rglob("*.py"), ROOT / "ray_jobs" / "train.py", ROOT / "ray_jobs" / "board.py"]
    asked = {match[1] for path in files for match in re.finditer(r"purpose=.*?\"(\w+)\"", path.read_text(encoding="utf-8"))}
    assert asked == {"training", "validation"}
