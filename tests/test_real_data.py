"""A subset of real films through the whole way: CSV -> shards -> tokenizers -> three stages -> drafts of films and DICOM files.

Most of the films have no text: they serve the image-only losses and, where the source brings labels, the findings head.
"""

from __future__ import annotations

import csv
import json
import logging
import math
from pathlib import Path

import pytest
import torch

from ray_jobs.predict import run_predict
from ssacl.anatomy import FINDING_INDEX, FINDINGS, FindingStatus
from ssacl.config import load_config
from ssacl.data.collate import Collator
from ssacl.data.corpus import train_dataset_tokenizers
from ssacl.data.ingest import IngestSettings, run_local
from ssacl.data.loader import open_split
from ssacl.data.records import Sample
from ssacl.data.shards import read_sample
from ssacl.data.sources import SourceOptions
from ssacl.data.storage import open_storage
from ssacl.data.tokenization import Tokenizers
from ssacl.inference.generator import GenerationOptions
from ssacl.models.ssacl import SSACL
from ssacl.training.loop import train
from ssacl.training.reporter import LogReporter

REAL = Path(__file__).parents[2] / "shared" / "data" / "real"
CONFIG = Path(__file__).parents[1] / "configs" / "real_small.yaml"
COLUMNS = {
    "image": "file",
    "report": "text_imaging_auto",
    "patient": "patient_group",
    "labels": "findings",
    "licence": "licence_image",
    "view": "view",
}
FAST = GenerationOptions(num_beams=1, max_new_tokens=8)

pytestmark = pytest.mark.skipif(not (REAL / "images.csv").is_file(), reason="the shared real films are not beside the checkout")


def some_rows() -> list[dict[str, str]]:
    """About 100 rows: with text, with usable labels, and with names outside the 14 findings."""
    with (REAL / "images.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    text = [row for row in rows if row["text_imaging_auto"]][:40]
    labels = [row for row in rows if not row["text_imaging_auto"] and row["dataset"] == "nih"][:40]
    neither = [row for row in rows if not row["text_imaging_auto"] and row["findings"] == "COVID-19"][:20]
    return text + labels + neither


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    rows = some_rows()
    with (folder / "films.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    settings = IngestSettings(key_secret="real films test secret", shard_size=32, longest_side_px=128)
    options = SourceOptions(columns=COLUMNS, image_root=REAL / "images")
    summary = run_local("csv", folder / "films.csv", str(folder / "set"), settings, options)
    assert sum(summary.num_samples.values()) + sum(summary.rejects.values()) == 100
    train_dataset_tokenizers(str(folder / "set"), None, 800, 800)
    return folder / "set"


@pytest.fixture(scope="module")
def samples(data: Path) -> dict[str, list[Sample]]:
    storage = open_storage(data)
    return {
        split: [read_sample(storage, entry) for entry in open_split(storage, split, purpose="evaluation")]
        for split in ("train", "val", "test")
    }


@pytest.fixture(scope="module")
def model_url(data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    stages = "[{kind: contrastive, num_steps: 3}, {kind: findings, num_steps: 3}, {kind: generation, num_steps: 3, freeze_encoder: true}]"
    runs = tmp_path_factory.mktemp("runs")
    changed = [f"data.url={data}", f"run.storage_url={runs}", f"run.stages={stages}", "run.num_train_workers=1", "run.log_every_steps=1"]
    quick = ["engine.kind=torch", "engine.precision=fp32", "engine.micro_batch_size=8", "data.num_loader_threads=0"]
    outcome = train(load_config(CONFIG, changed + quick), LogReporter())
    losses = [record["losses"]["total"] for record in outcome.metrics if record["event"] == "step"]
    assert len(losses) == 9
    assert all(math.isfinite(value) for value in losses)
    return outcome.model_url


def test_no_patient_is_in_two_splits_and_licences_travel(samples: dict[str, list[Sample]]) -> None:
    patients = {split: {sample.patient_key for sample in group} for split, group in samples.items()}
    assert not patients["train"] & patients["val"]
    assert not patients["train"] & patients["test"]
    assert not patients["val"] & patients["test"]
    assert all(sample.provenance["licence"] for group in samples.values() for sample in group)


def test_labels_come_from_text_else_from_the_source_else_not_at_all(samples: dict[str, list[Sample]]) -> None:
    every = [sample for group in samples.values() for sample in group]
    with_text = [sample for sample in every if sample.has_text]
    assert 30 <= len(with_text) <= 40
    assert all(len(sample.labels) == len(FINDINGS) for sample in with_text)
    # "COVID-19" names none of the 14 findings: unknown, not "No Finding".
    unlabelled = [sample for sample in every if not sample.labels]
    assert len(unlabelled) == 20
    from_source = [sample for sample in every if sample.labels and not sample.has_text]
    assert len(from_source) >= 38
    no_finding = FINDING_INDEX["No Finding"]
    for sample in from_source:
        others = {status for index, status in enumerate(sample.labels) if index != no_finding}
        assert (sample.labels[no_finding] == FindingStatus.PRESENT) != (FindingStatus.PRESENT in others)


@pytest.mark.parametrize("kind", ["none", "labels", "one text"])
@pytest.mark.parametrize("stage", ["contrastive", "generation", "findings"])
def test_a_batch_without_text_or_labels_trains_on(kind: str, stage: str, data: Path, samples: dict[str, list[Sample]]) -> None:
    train_samples = samples["train"]
    silent = [sample for sample in train_samples if not sample.has_text]
    rows = {
        "none": [sample for sample in silent if not sample.labels],
        "labels": [sample for sample in silent if sample.labels],
        "one text": [next(sample for sample in train_samples if sample.has_text), *silent],
    }[kind][:4]
    assert len(rows) == 4
    config = load_config(CONFIG)
    tokenizers = Tokenizers.load(str(data))
    batch = Collator(config.data, config.model.vision, tokenizers, seed=1, training=True)(rows, epoch=0)
    torch.manual_seed(0)
    model = SSACL.from_config(config, tokenizers)
    losses = model(batch, stage)
    losses.total.backward()
    total = float(losses.total.detach())
    assert math.isfinite(total)
    if stage == "contrastive":
        # The image-only losses teach whatever the text says.
        assert float(losses.image_reconstruction.detach()) > 0
        assert float(model.encoder.patch_embed.weight.grad.abs().sum()) > 0
    if stage == "generation":
        assert (total > 0) == (kind == "one text")
    if stage == "findings":
        assert (total > 0) == (kind != "none")


def test_its_films_and_dicom_files_get_a_draft_or_a_reason(model_url: str, tmp_path: Path) -> None:
    films = [REAL / "images" / row["file"] for row in some_rows()[::12]]
    summary = run_predict(model_url, [*films, REAL / "dicom"], tmp_path / "drafts", FAST)
    reasons = {Path(outcome.path).name: outcome.reason for outcome in summary.outcomes}
    assert len(reasons) == len(films) + 3
    assert [name for name, reason in reasons.items() if reason] == ["veterinary_dx_mono1_lateral_dog.dcm"]
    drafts = {
        Path(each.path).name: json.loads((tmp_path / "drafts" / "results" / f"{each.result_id}.json").read_text())
        for each in summary.outcomes
        if not each.reason
    }
    twins = [drafts[f"siim_cr_pa_jpegbaseline_mono{kind}.dcm"] for kind in ("1_relabelled", "2")]
    probabilities = [[finding["probability"] for finding in twin["findings"]] for twin in twins]
    # Not bit for bit: they were read in batches of different sizes.
    assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-5)
    assert twins[0]["text"] == twins[1]["text"]
    assert len({json.dumps(draft["findings"]) for draft in drafts.values()}) > len(films)


def test_a_label_outside_the_findings_is_counted_not_named(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    from ssacl.data.sources import open_source

    with caplog.at_level(logging.WARNING):
        list(open_source("csv", data.parent / "films.csv", SourceOptions(columns=COLUMNS, image_root=REAL / "images")))
    assert "rows name labels outside the 14 findings" in caplog.text
    assert "COVID" not in caplog.text
