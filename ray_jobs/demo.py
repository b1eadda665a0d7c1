"""`make demo`: from nothing to a served draft report with evidence, on embedded defaults, with real parts in every joint.

Phantom DICOM -> ingest -> shards in an S3 server -> Ray Train (contrastive, generation, findings) -> evaluation on the test
split -> Ray Serve -> a test DICOM is posted. Every process started here is stopped here, on Ctrl-C too.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from ssacl.config import Config, load_config
from ssacl.data.storage import embedded_s3
from ssacl.errors import ServeError, SSACLError
from ssacl.progress import ProgressBar

logger = logging.getLogger(__name__)

BUCKET = "ssacl-demo"
CONFIG = Path(__file__).parents[1] / "configs" / "phantom_tiny.yaml"


@dataclass
class Timings:
    """Seconds per part of the demo, in order."""

    parts: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        logger.info("=== %s", name)
        started = time.monotonic()
        yield
        self.parts[name] = round(time.monotonic() - started, 1)


def run_demo(out: Path, num_studies: int, seed: int, port: int, overrides: list[str]) -> dict[str, Any]:
    """Run every part; returns the metrics tree, which also lies in `out/metrics.json`.

    Raises
    ------
    SSACLError
        Whatever a part names; nothing is left running.
    """
    work, scores = out / "files", out / "scores"
    for old in (work, scores):
        shutil.rmtree(old, ignore_errors=True)
    work.mkdir(parents=True)
    timings = Timings()
    with ExitStack() as stack:
        with timings.part("phantom: chest radiographs as DICOM, with reports"):
            studies = _write_phantom(work / "phantom", num_studies, seed)
        os.environ.update(stack.enter_context(embedded_s3(work / "s3", bucket=BUCKET)).environment)
        os.environ["SSACL_KEY_SECRET"] = os.environ.get("SSACL_KEY_SECRET") or os.urandom(16).hex()
        data_url = f"s3://{BUCKET}/phantom"
        config = load_config(CONFIG, [f"data.url={data_url}", f"run.storage_url=s3://{BUCKET}/runs", f"run.seed={seed}", *overrides])
        with timings.part("Ray: start"):
            from ray_jobs.session import ray_session

            stack.enter_context(ray_session(num_cpus=max(2, os.cpu_count() or 2)))
        with timings.part("ingest: de-identified shards in S3, tokenizers"):
            _ingest(studies, data_url, config)
        with timings.part("train: contrastive, generation, findings (Ray Train, DeepSpeed)"):
            from ray_jobs.train import run_training

            trained = run_training(config, progress=True, out_folder=out)
        with timings.part("evaluate: the test split, read for the first time"):
            from ray_jobs.evaluate import run_evaluation

            truth = studies.with_name(studies.name + "_truth")
            metrics = run_evaluation(
                trained.model_url, data_url, split="test", truth_folder=truth, out_folder=scores, num_workers=2, progress=True
            )
        with timings.part("serve: endpoint up, a test DICOM posted"):
            _serve_one(trained.model_url, _film_with_findings(studies), out, port)
    metrics["seconds"] = timings.parts
    _write_json(out / "metrics.json", metrics)
    return metrics


def _write_phantom(folder: Path, num_studies: int, seed: int) -> Path:
    from ssacl.phantom import write_dicom_tree

    with ProgressBar("phantom", total=num_studies, unit="studies") as bar:
        write_dicom_tree(folder, num_studies, seed, num_processes=os.cpu_count() or 1, progress=bar.advance)
    return folder


def _ingest(studies: Path, data_url: str, config: Config) -> None:
    from ray_jobs.ingest import run_ingest
    from ssacl.data.corpus import train_dataset_tokenizers
    from ssacl.data.ingest import IngestSettings
    from ssacl.data.sources import SourceOptions

    summary = run_ingest("dicom-dir", studies, data_url, IngestSettings.from_environment(), SourceOptions(), num_workers=2, progress=True)
    logger.info(summary.describe())
    train_dataset_tokenizers(data_url, None, config.model.text.vocab_size, config.model.language.vocab_size)


def _film_with_findings(studies: Path) -> Path:
    """A film of the test split whose report has something to say (an effusion, where there is one)."""
    reports = sorted((studies / "test").rglob("report.txt"))
    telling = [report for report in reports if "effusion" in report.read_text().partition("IMPRESSION")[2].lower()]
    return next((telling or reports)[0].parent.glob("*.dcm"))


def _serve_one(model_url: str, film: Path, out: Path, port: int) -> None:
    import httpx

    from serve.app import run_server
    from serve.settings import ServeSettings

    with run_server(ServeSettings(checkpoint_url=model_url, port=port), blocking=False) as server:
        answers = {}
        for accept, name in (("application/json", "report.json"), ("image/png", "evidence.png")):
            response = httpx.post(
                f"{server.url}/v1/reports",
                files={"file": ("film.dcm", film.read_bytes(), "application/dicom")},
                headers={"Accept": accept},
                timeout=60,
            )
            if response.status_code != 200:
                raise ServeError(f"The endpoint answered {response.status_code} to the demo's film: {response.text[:300]}")
            answers[name] = response.content
        for name, content in answers.items():
            (out / name).write_bytes(content)


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(tree, indent=2))
    temporary.replace(path)


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


NEXT_STEPS = """
Go on by yourself ({out}/files holds the films and the embedded S3's folder):
  source .venv/bin/activate
  ssacl data phantom --out films --num-studies 3000 --seed 1
  ssacl data ingest --format dicom-dir films --out shards && ssacl data tokenizer --data shards
  ssacl train --config configs/phantom_tiny.yaml data.url=shards run.storage_url=runs
  ssacl evaluate reports --checkpoint runs/phantom_tiny/model --data shards --truth films_truth --out scores
  ssacl serve --checkpoint {out}/files/s3/{model} --port 8000
  curl -F file=@{film} http://127.0.0.1:8000/v1/reports
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_out"))
    parser.add_argument("--num-studies", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=0, help="port of the endpoint; 0: a free one")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as in run.num_train_workers=1")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    signal.signal(signal.SIGTERM, _stop)
    try:
        metrics = run_demo(options.out, options.num_studies, options.seed, options.port, options.overrides)
    except SSACLError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; everything it had started is stopped.", file=sys.stderr)
        return 130
    for name, seconds in metrics["seconds"].items():
        print(f"{seconds:7.1f} s  {name}")
    model = f"{BUCKET}/runs/{load_config(CONFIG, options.overrides).run.name}/model"
    print(NEXT_STEPS.format(out=options.out, model=model, film=_film_with_findings(options.out / "files" / "phantom")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
