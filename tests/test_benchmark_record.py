"""The form of benchmark records: exact keys, goals, last stdout line, dated file, no trace of the machine's paths or name."""

from __future__ import annotations

import argparse
import json
import platform
import re
from pathlib import Path

import pytest

from benchmarks.record import Goal, Measurement, Record, command_line, hardware, run_benchmark
from ssacl.errors import DataError

KEYS = ["name", "figures", "goals", "ok", "command", "commit", "config", "hardware", "versions", "n", "spread"]


def _measure(options: argparse.Namespace) -> Measurement:
    rate = 10.0 if options.quick else 20.0
    return Measurement({"rate": rate, "by": {"step_ms": 5}}, {"rate": Goal(min=15), "by.step_ms": Goal(max=5)}, {"batch": 4}, 3, 0.5)


def test_last_line_is_the_record_and_the_exit_code_tells_the_goals(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_benchmark("example", _measure, arguments=[]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out.splitlines()[-1])
    assert list(record) == KEYS
    assert record["ok"] is True
    assert record["goals"] == {"rate": {"min": 15, "met": True}, "by.step_ms": {"max": 5, "met": True}}
    assert (record["figures"]["rate"], record["config"], record["n"], record["spread"]) == (20.0, {"batch": 4}, 3, 0.5)
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|", record["commit"])
    assert "meets its goal" in captured.err

    assert run_benchmark("example", _measure, arguments=["--quick"]) == 1
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["ok"] is False
    assert record["goals"]["rate"] == {"min": 15, "met": False}


@pytest.mark.parametrize("value", [None, float("nan"), "fast", True])
def test_a_figure_that_is_no_number_misses_its_goal(value: object) -> None:
    assert Goal(min=0).check(value) == {"min": 0, "met": False}
    assert Record.of("example", Measurement({"x": value}, {"x": Goal(max=1)}), []).ok is False
    assert Record.of("example", Measurement({}, {"x": Goal(max=1)}), []).ok is False


def test_goals_are_inclusive_and_two_sided() -> None:
    assert Goal(min=1, max=2).check(1) == {"min": 1, "max": 2, "met": True}
    assert Goal(min=1, max=2).check(2.5)["met"] is False
    with pytest.raises(ValueError, match="minimum or a maximum"):
        Goal()


def test_save_writes_one_dated_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        run_benchmark("example", _measure, arguments=["--save"], results=tmp_path / "results")
    (path,) = (tmp_path / "results").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-example\.json", path.name)
    assert json.loads(path.read_text()) == json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_figure_without_a_finite_value_is_never_written(tmp_path: Path) -> None:
    record = Record.of("example", Measurement({"x": float("inf")}), [])
    with pytest.raises(ValueError, match="JSON"):
        record.to_line()
    with pytest.raises(ValueError, match="JSON"):
        record.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_named_errors_end_in_one_line_and_no_record(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(options: argparse.Namespace) -> Measurement:
        raise DataError("No data set there.")

    assert run_benchmark("example", fails, arguments=[]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip().endswith("example: No data set there.")


def test_own_arguments_reach_the_measurement() -> None:
    seen: list[int] = []

    def measure(options: argparse.Namespace) -> Measurement:
        seen.append(options.batch)
        return Measurement({})

    run_benchmark("example", measure, lambda parser: parser.add_argument("--batch", type=int, default=1), ["--batch", "7"])
    assert seen == [7]


def test_command_has_no_machine_paths(tmp_path: Path) -> None:
    line = command_line("example", [str(tmp_path / "vectors"), f"--out={tmp_path}/scores", "--batch", "4", "data.url=s3://bucket/x y"])
    assert line == "python -m benchmarks.example vectors --out=scores --batch 4 'data.url=s3://bucket/x y'"
    assert str(tmp_path) not in line


def test_hardware_says_what_it_is_not_whose() -> None:
    described = hardware()
    assert list(described) == ["cpu", "cores", "memory_gib", "gpus"]
    assert described["cores"] >= 1
    assert described["memory_gib"] > 0.1
    assert platform.node() == "" or platform.node() not in json.dumps(described)
