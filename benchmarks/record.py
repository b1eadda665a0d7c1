"""The form of every benchmark: `python -m benchmarks.NAME [--quick] [--save]`.

Progress goes to stderr. The last line of stdout is one JSON object, the record; `--save` also writes it, dated, to benchmarks/results/.
The exit code is 0 when every goal is met.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ssacl.errors import SSACLError
from ssacl.evaluation.scorecard import installed_versions

REPOSITORY = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "ray", "deepspeed", "transformers", "numpy")


@dataclass(frozen=True)
class Goal:
    """What a figure is to reach: at least `min`, at most `max`, or both."""

    min: float | None = None
    max: float | None = None

    def __post_init__(self) -> None:
        if self.min is None and self.max is None:
            raise ValueError("A goal needs a minimum or a maximum.")

    def check(self, value: Any) -> dict[str, Any]:
        """The goal's JSON form; a figure that is missing or not a number does not meet it."""
        # A not-a-number fails every comparison, and so its goal.
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        met = is_number and (self.min is None or value >= self.min) and (self.max is None or value <= self.max)
        bounds = {name: bound for name, bound in asdict(self).items() if bound is not None}
        return {**bounds, "met": bool(met)}


@dataclass(frozen=True)
class Measurement:
    """What a benchmark measured."""

    figures: dict[str, Any]
    goals: Mapping[str, Goal] = field(default_factory=dict)
    """Figure name -> goal; dots lead into nested figures."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Settings that the figures depend on."""
    n: int = 1
    """Repetitions, or cases."""
    spread: Any = None
    """Of the repetitions: a number, or one by figure; None where there was one."""


@dataclass(frozen=True)
class Record:
    """One benchmark's result."""

    name: str
    figures: dict[str, Any]
    goals: dict[str, dict[str, Any]]
    ok: bool
    command: str
    commit: str
    config: dict[str, Any]
    hardware: dict[str, Any]
    versions: dict[str, str]
    n: int
    spread: Any

    @classmethod
    def of(cls, name: str, measured: Measurement, arguments: Sequence[str]) -> Record:
        """The record of a measurement made just now, by `arguments`, on this machine."""
        goals = {figure: goal.check(_look_up(measured.figures, figure)) for figure, goal in measured.goals.items()}
        return cls(
            name=name,
            figures=measured.figures,
            goals=goals,
            ok=all(goal["met"] for goal in goals.values()),
            command=command_line(name, arguments),
            commit=commit(),
            config=dict(measured.config),
            hardware=hardware(),
            versions=installed_versions(_PACKAGES),
            n=measured.n,
            spread=measured.spread,
        )

    def to_line(self) -> str:
        """One line of JSON.

        Raises
        ------
        ValueError
            A figure is infinite or not a number.
        """
        return json.dumps(asdict(self), allow_nan=False)

    def save(self, folder: Path = RESULTS) -> Path:
        """Write `folder/YYYY-MM-DD-NAME.json`, whole or not at all; a record of the same day and name is replaced."""
        path = folder / f"{datetime.now(UTC):%Y-%m-%d}-{self.name}.json"
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n", encoding="utf-8")
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return path


def run_benchmark(
    name: str,
    measure: Callable[[argparse.Namespace], Measurement],
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    arguments: Sequence[str] | None = None,
    description: str | None = None,
    results: Path = RESULTS,
) -> int:
    """Parse, measure, print the record, save it on request; returns the exit code: 0 goals met, 1 not met or a named error.

    Parameters
    ----------
    name
        Module name below `benchmarks`.
    measure
        Does the work with the parsed options (`quick`, `save` and those of `add_arguments`).
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions or cases; its figures are rough")
    parser.add_argument("--save", action="store_true", help="write the record, dated, to benchmarks/results/")
    if add_arguments is not None:
        add_arguments(parser)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        with _ended_in_order():
            record = Record.of(name, measure(options), arguments)
    except SSACLError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    if options.save:
        print(f"{name}: saved {record.save(results).name}", file=sys.stderr)
    for figure, goal in record.goals.items():
        print(f"{name}: {figure} {'meets' if goal['met'] else 'misses'} its goal", file=sys.stderr)
    print(record.to_line(), flush=True)
    return 0 if record.ok else 1


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM as an exception inside the block, so that what a benchmark has started ends with it."""
    former = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def command_line(name: str, arguments: Sequence[str]) -> str:
    """The command as anyone can type it: absolute paths are cut to their last part."""
    return shlex.join(["python", "-m", f"benchmarks.{name}", *(_portable(argument) for argument in arguments)])


def commit() -> str:
    """The commit that was measured, with "-dirty" when tracked files differ from it; empty outside a git checkout."""
    head = _output("git", "-C", str(REPOSITORY), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(REPOSITORY), "status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if head and changed else head


def hardware() -> dict[str, Any]:
    """CPU model, cores, memory and GPU names; nothing that names this machine."""
    import torch

    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {"cpu": _cpu_model(), "cores": len(os.sched_getaffinity(0)), "memory_gib": round(pages / 2**30, 1), "gpus": gpus}


def _look_up(figures: Mapping[str, Any], name: str) -> Any:
    if name in figures:
        return figures[name]
    value: Any = figures
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _portable(argument: str) -> str:
    key, separator, value = argument.rpartition("=")
    return f"{key}{separator}{Path(value).name}" if Path(value).is_absolute() else argument


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
