"""The training loop: stages, steps, validation, checkpoints, and the exported model. Knows no Ray.

Run by `python -m ssacl.training` (one process or torchrun) and by each train worker of `ray_jobs/train.py`. Validation alone chooses
anything; the loop opens the splits "train" and "val" and no other.
"""

from __future__ import annotations

import gc
import logging
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

import ssacl
from ssacl.config import Config
from ssacl.data.collate import Collator
from ssacl.data.lease import Holder, Lease, hold_lease
from ssacl.data.loader import StreamingLoader
from ssacl.data.records import Batch
from ssacl.data.shards import ShardIndex
from ssacl.data.storage import open_storage
from ssacl.models.divided import fill_shares, whole_state
from ssacl.models.findings_head import FindingsBatch
from ssacl.models.ssacl import SSACL
from ssacl.training.checkpoint import WEIGHTS, export_weights, load_weights, save_model_folder, upload_folder
from ssacl.training.deepspeed_engine import construction
from ssacl.training.engine import Engine, make_engine
from ssacl.training.events import EventFiles
from ssacl.training.figures import ValidationFigures
from ssacl.training.frozen import freeze_samples
from ssacl.training.host_copies import HostCopies
from ssacl.training.legs import Leg, legs_left
from ssacl.training.memory import set_freed_memory
from ssacl.training.reporter import MetricsLog, Reporter
from ssacl.training.resume import Position, RunStore, check_same_run, load_random_state, on_rank_0, random_path, random_state, run_storage
from ssacl.training.samples import SampleReports
from ssacl.training.sealed import MANIFEST, parse_manifest
from ssacl.training.settings import run_settings
from ssacl.training.speed import SpeedWindow, memory_gib, step_work, training_peak
from ssacl.training.stages import StagePlan, fit_batch, plan_stages, steps_done
from ssacl.training.start import Start, run_tokenizers, start_encoder_from, start_from
from ssacl.training.thresholds import validation_thresholds
from ssacl.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

NUM_VALIDATION_BATCHES = 4
"""Micro batches per rank whose mean losses are a validation."""
HOLDER = Holder("training run", "Let it end, or stop it, then run the same command again; or choose another run.name.", key="run.lock")


@dataclass(frozen=True)
class TrainingOutcome:
    """What a run leaves. `metrics` are the JSON-lines records (rank 0; empty elsewhere)."""

    model_url: str
    metrics: list[dict[str, Any]]
    manifest: dict[str, Any]
    """The model folder's; empty where the run ended before its last step, as it was told to."""


def train(
    config: Config,
    reporter: Reporter,
    world_rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    until_step: int | None = None,
) -> TrainingOutcome:
    """Run all stages of `config`, or what is left of them, and export the model.

    The same `(run.storage_url, run.name)` continues where it stood; a finished run is given back as it is.

    Parameters
    ----------
    until_step : optimizer steps, over all stages, after which the run ends with a validation and a checkpoint, to be continued.

    Raises
    ------
    TrainingError
        A loss is not finite.
    CheckpointError
        The name is in use by a run with other settings, or a checkpoint is damaged.
    BusyError
        Another run of the same name and storage is alive.
    ConfigError, DataError, StorageError
        The settings contradict each other, the data set is empty, or storage cannot be reached.
    """
    if config.engine.kind == "deepspeed" and config.engine.zero_stage == 3:
        set_freed_memory("returned")
    elif torch.device(device).type == "cpu":
        set_freed_memory("kept")
    for leg in legs_left(fit_batch(config, world_size), world_rank, until_step):
        outcome = _Run(leg, reporter, world_rank, world_size, torch.device(device)).run()
        if outcome.manifest:
            break
        # Its model is let go before the next leg's is made.
        gc.collect()
    return outcome


class _Run:
    def __init__(self, leg: Leg, reporter: Reporter, world_rank: int, world_size: int, device: torch.device) -> None:
        self.config, self.leg, self.reporter, self.device = (config := leg.config), leg, reporter, device
        self.world_rank, self.world_size = world_rank, world_size
        self.started = time.monotonic()
        self.data, self.storage = open_storage(config.data.url), run_storage(config)
        self.store = RunStore(self.storage, world_rank, config.run.keep_last, config.run.asynchronous_checkpoints, self._check_lease)
        self.tokenizers = run_tokenizers(config, self.data)
        self.metrics, self.events = MetricsLog(), EventFiles(self.storage)
        self.samples = SampleReports(config, self.tokenizers, self.data, self.storage, self.device)
        self.figures = ValidationFigures(config, self.tokenizers, self.data, self.device)
        self.watchdog = Watchdog(config.run.hang_limit_s, lambda text: reporter.progress({"event": "hang", "note": text}))
        self.lease: Lease | None = None
        self.model = self._new_model()
        self.start = start_from(self.model, config.run.init_from) if config.run.init_from else Start()
        self.thresholds = self.start.thresholds
        if config.run.init_encoder_from:
            start_encoder_from(self.model, config.run.init_encoder_from)

    # -- the run ------------------------------------------------------------------------------------------------------------------

    def run(self) -> TrainingOutcome:
        finished = on_rank_0(self._finished_manifest, self.world_rank)
        if finished is not None:
            logger.info("run %s is finished; nothing to train", self.config.run.name)
            return self._outcome(finished)
        with ExitStack() as stack:
            stack.callback(self.watchdog.close)
            stack.callback(self.events.close)
            on_rank_0(lambda: self._hold(stack), self.world_rank)
            stack.callback(self.store.close)
            return self._train()

    def _hold(self, stack: ExitStack) -> None:
        self.lease = stack.enter_context(hold_lease(self.storage, HOLDER))

    def _check_lease(self) -> None:
        if self.lease is not None:
            self.lease.check()

    def _train(self) -> TrainingOutcome:
        self.reporter.progress(
            {"event": "files", "note": f"metrics and samples in {self.storage.url}; tensorboard --logdir {self.events.url}"}
        )
        self.data.patience.seconds = self.storage.patience.seconds = self.config.run.storage_patience_s
        self.peak = training_peak(self.config.engine.precision, self.device)
        self.loader = self._loader("train", self.config.data.last_batch)
        self.validation_batches = self._validation_batches()
        self.plans = plans = plan_stages(self.config, self.loader.steps_per_epoch)
        with tempfile.TemporaryDirectory(prefix="ssacl-resume-") as parent:
            position, folder = self._find_start(Path(parent))
            # Closed at the end, with the threads that read ahead.
            with closing(cast("Generator[Batch]", iter(self.loader))) as self.batches:
                for plan in plans[position.stage_index :]:
                    first_step = position.step if plan.index == position.stage_index else 0
                    if first_step >= self.leg.last_step(plan):
                        break
                    self._run_stage(plan, first_step, folder)
                    folder = None
        self.watchdog.watch("the last checkpoint")
        self.store.wait()
        self.watchdog.rest()
        if any(self.leg.last_step(plan) < plan.num_steps for plan in plans):
            return TrainingOutcome("", self.metrics.records, {})
        state = whole_state(self.model)
        manifest = on_rank_0(lambda: self._export(state), self.world_rank)
        self._milestone({"event": "model", "note": f"model version {manifest['model_version']}; tensorboard --logdir {self.events.url}"})
        on_rank_0(lambda: self._store_metrics(self.metrics), self.world_rank)
        return self._outcome(manifest)

    def _run_stage(self, plan: StagePlan, first_step: int, folder: Path | None) -> None:
        torch.manual_seed(hash((self.config.run.seed, plan.index, self.world_rank)) % 2**31)
        engine = make_engine(self.model, self.config, plan, self.device)
        if folder is not None and first_step > 0:
            engine.load(folder)
            load_random_state(folder, self.world_rank)
        batches: Iterator[Batch | FindingsBatch] = self.batches
        if plan.kind == "findings":
            frozen = freeze_samples(self.model, self._loader("train", "wrap", training=False), self.device)
            settings = self.config.engine
            first = first_step * settings.accumulation_steps
            batches = frozen.batches(self.config.run.seed, settings.micro_batch_size, self.world_rank, self.world_size, first)
        self._steps(plan, engine, batches, first_step)
        if self.leg.last_step(plan) < plan.num_steps:
            engine.close()
            return
        self.watchdog.watch(f"the end of stage '{plan.kind}'")
        self.model = self._take_over(engine)
        if plan.kind == "findings":
            self.thresholds = validation_thresholds(self.model, self._loader("val", "wrap"), self.config.data.uncertain, self.device)
        self._milestone({"event": "stage_end", "stage": plan.kind, "stage_index": plan.index, "note": f"stage {plan.kind} done"})
        self._save_weights(Position(plan.index + 1, 0))
        self.watchdog.rest()

    def _steps(self, plan: StagePlan, engine: Engine, source: Iterator[Batch | FindingsBatch], first_step: int) -> None:
        run, accumulation = self.config.run, self.config.engine.accumulation_steps
        images = accumulation * self.config.engine.micro_batch_size * self.world_size
        window, stage_started, work = SpeedWindow(first_step), time.monotonic(), 0.0
        for step in range(first_step + 1, (last_step := self.leg.last_step(plan)) + 1):
            self.watchdog.watch(f"step {step} of stage '{plan.kind}'")
            with window.spend("wait"):
                batches = [next(source) for _ in range(accumulation)]
            if work == 0.0:
                with window.spend("pause"):
                    work = step_work(engine, self.model, batches[0]) * accumulation
            values = engine.step(batches, plan.ramp(step - 1))
            last = step == last_step
            if step % run.log_every_steps == 0 or last or step == first_step + 1:
                norm = values.pop("gradient_norm")
                record = self._record(plan, step, "step", values) | {
                    "gradient_norm": norm,
                    "lr": engine.lr,
                    **window.close(step, images, work, self.peak),
                    "memory_gib": memory_gib(self.device),
                    "remaining_s": (time.monotonic() - stage_started) / (step - first_step) * (plan.num_steps - step),
                }
                self._keep(record)
                self.reporter.progress(record)
                self.store.poll()
            if step % run.validate_every_steps == 0 or last:
                self.watchdog.watch(f"validation at step {step} of stage '{plan.kind}'")
                with window.spend("pause"):
                    self._validate(plan, engine, step)
            if (step % run.checkpoint_every_steps == 0 or last) and step < plan.num_steps:
                self.watchdog.watch(f"checkpoint at step {step} of stage '{plan.kind}'")
                with window.spend("checkpoint"):
                    self._save_engine(plan, engine, step)

    # -- validation ---------------------------------------------------------------------------------------------------------------

    def _validate(self, plan: StagePlan, engine: Engine, step: int) -> None:
        sums: dict[str, float] = {}
        for batch in self.validation_batches:
            for name, value in engine.evaluate(batch, 1.0).items():
                sums[name] = sums.get(name, 0.0) + value / len(self.validation_batches)
        record = self._record(plan, step, "validation", sums)
        # Under ZeRO 3 rank 0 has but a part of the weights.
        whole = self.config.engine.kind == "torch" or self.config.engine.zero_stage < 3
        if self.config.run.num_figure_films > 0 and whole:
            figures = on_rank_0(lambda: self.figures.of(self.model, self.thresholds, self._scores_reports(plan)), self.world_rank)
            record["figures"] = figures
        self._milestone(record)
        if self.world_rank == 0 and whole and plan.kind != "contrastive" and self._writes_reports(plan):
            self.samples.write(self.model, self.thresholds, f"{plan.name}-{step:08d}")

    def _writes_reports(self, plan: StagePlan) -> bool:
        """Whether the language model has learned, in this run or in the one that it started from."""
        return bool(self.config.run.init_from) or any(past.kind in ("generation", "joint") for past in self.plans[: plan.index + 1])

    def _scores_reports(self, plan: StagePlan) -> bool:
        """Whether reports can be told from chance: they follow the findings head, which must have learned too."""
        heads = any(past.kind == "findings" for past in self.plans[: plan.index + 1])
        return self._writes_reports(plan) and (heads or bool(self.config.run.init_from))

    def _validation_batches(self) -> list[Batch]:
        loader = self._loader("val", "wrap")
        batches = iter(loader)
        # Kept in memory: the same pictures and the same masks every time, without reading them again.
        return [next(batches) for _ in range(min(NUM_VALIDATION_BATCHES, loader.steps_per_epoch))]

    # -- checkpoints and the model ------------------------------------------------------------------------------------------------

    def _find_start(self, parent: Path) -> tuple[Position, Path | None]:
        found = self.store.latest()
        if found is None:
            return Position(0, 0), None
        position, manifest = found
        check_same_run(manifest, self.leg.whole, steps_done(self.plans, position.stage_index, position.step), self.tokenizers.fingerprint)
        folder = self.store.fetch(position, parent / "checkpoint")
        self.loader.load_state_dict(manifest["loader"])
        self.thresholds = dict(manifest["thresholds"])
        if position.step == 0:
            load_weights(folder / WEIGHTS, self.model)
        if self.world_rank == 0 and self.storage.exists(MetricsLog.KEY):
            self.metrics = MetricsLog.parse(self.storage.read(MetricsLog.KEY))
            self.metrics.rewind(position.stage_index, position.step)
        self.reporter.progress({"event": "resume", "note": f"continues stage {position.stage_index + 1} after {position.step} steps"})
        return position, folder

    def _save_engine(self, plan: StagePlan, engine: Engine, step: int) -> None:
        def write(folder: Path) -> HostCopies:
            copies = engine.save(folder)
            copies.add(random_state(), random_path(folder, self.world_rank))
            return copies

        self._save(Position(plan.index, step), write)

    def _save_weights(self, position: Position) -> None:
        state = whole_state(self.model)
        self._save(position, lambda folder: export_weights(folder / WEIGHTS, self.model, state) if self.world_rank == 0 else None)

    def _save(self, position: Position, write: Callable[[Path], HostCopies | None]) -> None:
        done = steps_done(self.plans, position.stage_index, position.step)
        entries = {
            "settings": run_settings(self.leg.whole, done),
            "run_step": done,
            "config": self.leg.whole.model_dump(mode="json"),
            "loader": self.loader.state_dict(),
            "thresholds": dict(self.thresholds),
            "tokenizer_fingerprint": self.tokenizers.fingerprint,
            "world_size": self.world_size,
            "code_version": ssacl.__version__,
        }
        # A run that goes on from here finds them; what they tell of later steps it forgets.
        metrics = MetricsLog(list(self.metrics.records))
        self.store.save(position, write, entries, before_seal=lambda: self._store_metrics(metrics))

    def _export(self, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        provenance = {
            "data_sha256": ShardIndex.load(self.data).digest,
            "uncertain_policy": self.config.data.uncertain,
            "stages": list(dict.fromkeys([*self.start.stages, *(stage.kind for stage in self.config.run.stages)])),
            "world_size": self.world_size,
        }
        with tempfile.TemporaryDirectory(prefix="ssacl-export-") as parent:
            folder = Path(parent) / "model"
            last = {record["stage"]: record["losses"] | record.get("figures", {}) for record in self.metrics.validations()}
            manifest = save_model_folder(
                *(folder, self.model, self.leg.whole, self.tokenizers, self.thresholds, {"validation": last}, provenance, state),
                self.start.extras or None,
            )
            upload_folder(folder, self.storage, "model")
        return manifest

    def _finished_manifest(self) -> dict[str, Any] | None:
        if not self.storage.exists(f"model/{MANIFEST}"):
            return None
        manifest = parse_manifest(self.storage.read(f"model/{MANIFEST}"), "model")
        if self.storage.exists(MetricsLog.KEY):
            self.metrics = MetricsLog.parse(self.storage.read(MetricsLog.KEY))
        return manifest

    def _outcome(self, manifest: dict[str, Any]) -> TrainingOutcome:
        return TrainingOutcome(self.storage.sub("model").url, self.metrics.records, manifest)

    # -- parts --------------------------------------------------------------------------------------------------------------------

    def _new_model(self) -> SSACL:
        torch.manual_seed(self.config.run.seed)
        with construction(self.config.engine):
            return SSACL.from_config(self.config, self.tokenizers).to(self.device)

    def _take_over(self, engine: Engine) -> SSACL:
        """The trained weights in a model without an engine's hooks and flat buffers."""
        state = engine.rank_state()
        engine.close()
        return fill_shares(self._new_model(), state)

    def _loader(self, split: str, last_batch: str, training: bool | None = None) -> StreamingLoader:
        """`training` False: rows as in evaluation, without augmentation; by default those of "train" are augmented."""
        data, training = self.config.data, split == "train" if training is None else training
        collator = Collator(data, self.config.model.vision, self.tokenizers, self.config.run.seed, training)
        return StreamingLoader(
            self.data,
            split,
            collator,
            world_rank=self.world_rank,
            world_size=self.world_size,
            micro_batch_size=self.config.engine.micro_batch_size,
            seed=self.config.run.seed,
            last_batch=last_batch,
            num_threads=data.num_loader_threads if split == "train" else 0,
            purpose="training" if split == "train" else None,
        )

    def _record(self, plan: StagePlan, step: int, event: str, losses: Mapping[str, float]) -> dict[str, Any]:
        return {
            "event": event,
            "stage": plan.kind,
            "stage_index": plan.index,
            "step": step,
            "num_steps": plan.num_steps,
            "run_step": plan.steps_before + step,
            "elapsed_s": time.monotonic() - self.started,
            "losses": dict(losses),
        }

    def _milestone(self, record: dict[str, Any]) -> None:
        self._keep(record)
        self.reporter.milestone(record)

    def _keep(self, record: dict[str, Any]) -> None:
        self.metrics.add(record)
        if self.world_rank == 0:
            self.events.add(record)

    def _store_metrics(self, metrics: MetricsLog) -> None:
        self.storage.write(MetricsLog.KEY, metrics.dump())
        self.events.store()
