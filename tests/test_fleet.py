"""The fleet's queue: cases that can be worked out, and directions that must hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.fleet import _given, _read, of_record, small
from benchmarks.fleet_queue import DAY_S, HOURLY_SHARE, Fleet, _rate, _waits, simulate
from ssacl.errors import ConfigError

FIXED = Fleet(batch_s=(1.0,), min_replicas=4, max_replicas=4, failures_per_replica_day=0.0)


def test_the_day_has_as_many_studies_as_asked_for() -> None:
    clock = np.arange(int(DAY_S / 2)) * 2.0
    assert _rate(clock, 5000).sum() * 2 == pytest.approx(5000)
    noon, night = _rate(clock, 5000)[[10 * 1800 + 900, 2 * 1800 + 900]]
    assert noon / night == pytest.approx(HOURLY_SHARE[10] / HOURLY_SHARE[2], rel=0.05)


def test_waits_are_read_off_the_counts() -> None:
    clock = np.arange(6) * 2.0
    came, served = np.array([4, 4, 4, 4, 4, 4]), np.array([1.0, 2.0, 3.0, 4.0, 4.0, 4.0])
    assert _waits(came, served, clock, 2.0).tolist() == [1.0, 3.0, 5.0, 7.0]


def test_an_idle_fleet_answers_in_the_time_of_a_batch_and_costs_its_least_size() -> None:
    day = simulate(FIXED, 200)
    assert day.answered_p99_s == pytest.approx(1.0 + 1.0, abs=0.01)
    assert day.replica_hours == pytest.approx(96.0)
    assert day.utilisation == pytest.approx(day.studies / (4 * DAY_S))
    assert (day.lost_replicas, day.left_over) == (0, 0)


def test_a_fleet_that_is_too_small_is_left_with_the_difference() -> None:
    one = replace(FIXED, min_replicas=1, max_replicas=1)
    day = simulate(one, 3 * DAY_S)
    # It idles a little at night alone.
    assert 0.9 < day.utilisation < 1.0
    assert day.studies - day.left_over <= DAY_S
    assert day.left_over == pytest.approx(2 * DAY_S, rel=0.05)


def test_replicas_follow_the_load_up_and_down() -> None:
    fleet = Fleet(batch_s=(0.5, 0.6, 0.8, 1.0))
    small, large = simulate(fleet, 10**5), simulate(fleet, 10**7)
    assert large.left_over < 100
    assert large.replicas_peak > 1.5 * large.replicas_mean
    assert large.replicas_mean > 10 * small.replicas_mean
    assert large.replica_hours > large.studies / fleet.rate_per_s / 3600


def test_failures_and_slow_starts_cost_time() -> None:
    fleet = Fleet(batch_s=(0.5, 0.6, 0.8, 1.0))
    base = simulate(fleet, 10**6)
    assert simulate(replace(fleet, failures_per_replica_day=20.0), 10**6).lost_replicas > base.lost_replicas
    assert simulate(replace(fleet, failures_per_replica_day=20.0), 10**6).answered_p99_s >= base.answered_p99_s
    assert simulate(replace(fleet, start_s=900.0), 10**6, surge=3).answered_p99_s > simulate(fleet, 10**6, surge=3).answered_p99_s


def test_the_same_seed_is_the_same_day() -> None:
    fleet = Fleet(batch_s=(1.0,))
    assert simulate(fleet, 1000, seed=3) == simulate(fleet, 1000, seed=3)
    assert simulate(fleet, 1000, seed=3) != simulate(fleet, 1000, seed=4)


@pytest.mark.parametrize("text", ["", "a", "0", "1,-1"])
def test_times_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        _given(text)


FIGURES = {
    "direct": {"batch_1_per_s": 4.0, "batch_2_per_s": 5.0, "batch_4_per_s": 8.0},
    "capacity_per_s": 4.0,
    "load_50": {"offered_per_s": 2.0, "answered_per_s": 1.9, "p95_s": 2.1},
}


def test_times_of_a_record_are_those_of_its_endpoint() -> None:
    # 0.25, 0.4 and 0.5 s of the generator, and the endpoint answers half as much.
    assert of_record(FIGURES) == pytest.approx((0.5, 0.8, 0.9, 1.0))
    assert 4 / of_record(FIGURES)[-1] == pytest.approx(FIGURES["capacity_per_s"])


def test_the_small_end_stands_beside_what_was_measured() -> None:
    found = small(of_record(FIGURES), FIGURES["load_50"])
    # A batch of 1 s, after the wait of a queue (M/D/1) of 0.25 s for a study at half load: one in twenty waits 0.6 to 0.8 s.
    assert found["p95_s_of_the_model"] == pytest.approx(1.7, abs=0.15)
    assert found["model_to_measured"] == pytest.approx(found["p95_s_of_the_model"] / 2.1, abs=0.01)


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no record of benchmarks\.serve_load"):
        _read(tmp_path / "absent.json")


def test_a_day_without_a_shape_is_flat() -> None:
    assert np.ptp(_rate(np.arange(100) * 60.0, 864.0, np.ones(24))) == pytest.approx(0.0)
