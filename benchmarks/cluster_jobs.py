"""Ingest, training, a sweep and an evaluation as jobs on a cluster of several nodes, by the commands of docs/OPERATIONS.md.

A head with Redis and two more nodes, all real raylets of this machine, and a real S3 server. A node is lost under training. Needs
redis-server (make setup-servers). The endpoint: benchmarks/cluster_serving.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.cluster_place import Place, started_place, wait_for
from benchmarks.record import REPOSITORY, Goal, Measurement, run_benchmark
from ssacl.phantom import write_dicom_tree

GOALS = {
    "training.goes_on_s": Goal(max=90.0),
    "training.steps_counted_once": Goal(min=1, max=1),
    "minutes": Goal(max=12.0),
}
RUN = "mimic_cxr_base"
"""The page's name of the run."""


def measure(options: argparse.Namespace) -> Measurement:
    num_studies, num_steps = (40, 24) if options.quick else (60, 60)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ssacl-cluster-") as name:
        work = Path(name)
        write_dicom_tree(work / "studies", num_studies, seed=3, size_px=96, num_processes=1)
        with started_place(work) as place:
            figures = jobs(place, num_steps)
    figures["minutes"] = round((time.monotonic() - started) / 60, 2)
    return Measurement(figures, GOALS, {"studies": num_studies, "steps": num_steps, "nodes": 3, "train_workers": [1, 2]})


def jobs(place: Place, num_steps: int) -> dict[str, Any]:
    """Each kind of job once; looks at jobs, and ends them."""
    book = place.book
    with place.phase("ingest"):
        book.run("ssacl doctor --address")
        studies = {"--format mimic-cxr-jpg s3://bucket/source": f"--format dicom-dir {place.folder / 'studies'}"}
        book.run("ssacl submit ingest", names=studies | {"--num-workers 32": "--num-workers 2"})
        book.run("ssacl data tokenizer")
        book.run("ssacl data verify")
    with place.phase("train"):
        training = train(place, num_steps)
    with place.phase("node_again"):
        place.workers[1] = place.cluster.add_node(num_cpus=1)
    with place.phase("tune"):
        book.run("ssacl submit tune", names={"configs/tune_loss_weights.yaml": str(write_sweep(place.folder))})
    with place.phase("evaluate"):
        shared = {"/shared/scores": str(place.folder / "scores")}
        book.run("ssacl submit evaluate", "--limit", "2", "--split", "val", names=shared)
    with place.phase("look"):
        job = {"JOB": book.run("ssacl submit status").split()[0]}
        book.run("ssacl submit logs", names=job)
        # It has ended: that is told, and is no error.
        book.run("ssacl submit stop", names=job)
    return {
        "phases_s": place.phases_s,
        "training": training,
        "commands": book.transcript,
    }


def train(place: Place, num_steps: int) -> dict[str, Any]:
    """Train as a job; lose a node after the first checkpoint of both train workers."""
    command = "ssacl submit train"
    stages = stages_of(num_steps, 4)
    changes = [f"run.name={RUN}", "run.use_gpu=false", "run.num_train_workers=[1, 2]", f"run.stages={json.dumps(stages)}"]
    changes += ["run.checkpoint_every_steps=4", "run.keep_last=100", "run.log_every_steps=1", "run.resize_check_s=600"]
    changes += ["engine.kind=torch", "engine.micro_batch_size=2", "engine.global_batch_size=4"]
    run = place.s3.folder / "ssacl" / "runs" / RUN

    def sizes() -> list[int]:
        """Train workers behind each checkpoint, the oldest first."""
        return [json.loads(path.read_text())["world_size"] for path in sorted(run.glob("checkpoints/*/manifest.json"))]

    running = place.book.start(command, *changes, names={"configs/mimic_cxr_base.yaml": "configs/phantom_tiny.yaml"})
    wait_for("a checkpoint of two train workers", lambda: 2 in sizes(), running)
    lost = time.monotonic()
    place.workers[1].lose()
    wait_for("a checkpoint of the one that is left", lambda: sizes()[-1] == 1, running)
    goes_on_s = time.monotonic() - lost
    place.book.finish(command, running)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record["run_step"] for record in records if record["event"] == "step"]
    return {
        "goes_on_s": round(goes_on_s, 1),
        "checkpoints_of_two_and_of_one": [sizes().count(2), sizes().count(1)],
        "steps_counted_once": int(steps == list(range(1, num_steps + 9))),
    }


def write_sweep(work: Path) -> Path:
    """A sweep of two short trials of the shipped tiny model."""
    tree = yaml.safe_load((REPOSITORY / "configs" / "phantom_tiny.yaml").read_text(encoding="utf-8"))
    tree["run"] = {"name": "base", "stages": stages_of(2, 2), "checkpoint_every_steps": 2, "validate_every_steps": 2}
    tree["engine"] = {"kind": "torch", "micro_batch_size": 2}
    sweep = {
        "name": "cluster",
        "base": {"overrides": [f"{key}={json.dumps(value)}" for key, value in tree.items()]},
        "space": {"optim.lr": {"log_uniform": [5e-4, 4e-3]}},
        "objectives": {"findings_f1": "max"},
        "num_films": 2,
        "scheduler": {"kind": "none"},
        "budget": {"trials": 2},
        "stability": {"seeds": 0},
        "max_concurrent": 2,
    }
    path = work / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep), encoding="utf-8")
    return path


def stages_of(first: int, others: int) -> list[dict[str, Any]]:
    """The stages of the tiny model, with their steps."""
    return [
        {"kind": "contrastive", "num_steps": first},
        {"kind": "findings", "num_steps": others},
        {"kind": "generation", "num_steps": others, "freeze_encoder": True},
    ]


if __name__ == "__main__":
    sys.exit(run_benchmark("cluster_jobs", measure, description=__doc__))
