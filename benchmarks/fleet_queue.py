"""A day of the autoscaled endpoint as a queue: studies come as the clock has it, replicas come and go as Ray Serve would have it.

Time goes in steps. Within one, arrivals are Poisson, replicas serve in batches, first come first served; the wait of a study is read
off two cumulative counts (those that came, those that were served), so that ten million studies cost as much as a thousand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

DAY_S = 86_400
HOURLY_SHARE = np.array(
    [1.2, 1.0, 0.9, 0.9, 1.0, 1.6, 2.8, 4.6, 6.6, 7.6, 7.9, 7.6, 6.4, 6.6, 7.0, 6.8, 6.0, 5.0, 4.2, 3.6, 3.2, 3.0, 2.6, 1.9]
)
"""Shape of a hospital's day, an assumption: most films between 8 and 17 o'clock, a third of the peak in the evening, an eighth at night."""


@dataclass(frozen=True)
class Fleet:
    """The endpoint; times in seconds."""

    batch_s: tuple[float, ...]
    """Measured time of a batch of 1, 2, ... studies on one replica."""
    min_replicas: int = 2
    max_replicas: int = 100_000
    start_s: float = 120.0
    """From the decision to a replica that answers: a node, the image, the model."""
    decide_s: float = 10.0
    downscale_delay_s: float = 300.0
    failures_per_replica_day: float = 0.05
    """Replicas lost, with their node or alone."""

    @property
    def rate_per_s(self) -> float:
        """Most studies per second of one replica."""
        return max((index + 1) / seconds for index, seconds in enumerate(self.batch_s))

    @property
    def target_ongoing(self) -> int:
        """Studies per replica that the autoscaler aims at: a full batch."""
        return len(self.batch_s)


@dataclass(frozen=True)
class Day:
    """What came out."""

    studies: int
    waited_p50_s: float
    answered_p95_s: float
    answered_p99_s: float
    replicas_mean: float
    replicas_peak: int
    replica_hours: float
    utilisation: float
    lost_replicas: int
    left_over: int
    """Studies that had not been served at midnight."""


def simulate(
    fleet: Fleet,
    studies_per_day: float,
    seed: int = 0,
    step_s: float = 2.0,
    surge: float = 1.0,
    hourly_share: npt.NDArray[np.float64] = HOURLY_SHARE,
    seconds: int = DAY_S,
) -> Day:
    """One day, or as many `seconds` of it; `studies_per_day` are those of the time that is simulated.

    Parameters
    ----------
    surge : factor on the rate for one hour at noon, with the rest unchanged.
    hourly_share : of the day's studies, in any unit.
    """
    random = np.random.default_rng(seed)
    num_steps = int(seconds / step_s)
    clock = np.arange(num_steps) * step_s
    rate = _rate(clock, studies_per_day, hourly_share)
    rate[(clock >= 12 * 3600) & (clock < 13 * 3600)] *= surge
    came = np.cumsum(random.poisson(rate * step_s))
    served, replicas = np.zeros(num_steps), np.zeros(num_steps)
    running, starting, queue, done = float(fleet.min_replicas), [], 0.0, 0.0
    low_since, lost, ongoing_seen = 0.0, 0, 0.0
    decide_every = max(1, round(fleet.decide_s / step_s))
    for step in range(num_steps):
        running += sum(count for ready, count in starting if ready <= clock[step])
        starting = [(ready, count) for ready, count in starting if ready > clock[step]]
        gone = min(running, random.poisson(running * fleet.failures_per_replica_day * step_s / DAY_S))
        running, lost = running - gone, lost + int(gone)
        queue = came[step] - done
        speed = running * fleet.rate_per_s * step_s
        now = min(queue, speed)
        done += now
        served[step], replicas[step] = done, running
        # Ongoing requests, as handles report them: what waits and what is being read.
        ongoing_seen = queue - now + now / step_s * fleet.batch_s[-1]
        if step % decide_every == 0:
            wanted = float(np.clip(math.ceil(ongoing_seen / fleet.target_ongoing), fleet.min_replicas, fleet.max_replicas))
            coming = running + sum(count for _, count in starting)
            if wanted > coming:
                starting.append((clock[step] + fleet.start_s, wanted - coming))
                low_since = clock[step]
            elif wanted < running:
                if clock[step] - low_since >= fleet.downscale_delay_s:
                    running, low_since = wanted, clock[step]
            else:
                low_since = clock[step]
    waited = _waits(came, served, clock, step_s)
    answered = waited + fleet.batch_s[-1]
    work_s = done / fleet.rate_per_s
    return Day(
        studies=int(came[-1]),
        waited_p50_s=_percentile(waited, 50),
        answered_p95_s=_percentile(answered, 95),
        answered_p99_s=_percentile(answered, 99),
        replicas_mean=float(replicas.mean()),
        replicas_peak=int(replicas.max()),
        replica_hours=float(replicas.sum() * step_s / 3600),
        utilisation=float(work_s) / float(replicas.sum() * step_s),
        lost_replicas=lost,
        left_over=int(came[-1] - done),
    )


def _rate(
    clock: npt.NDArray[np.float64], studies_per_day: float, hourly_share: npt.NDArray[np.float64] = HOURLY_SHARE
) -> npt.NDArray[np.float64]:
    """Studies per second through the day, linear between the middles of the hours."""
    share = hourly_share / hourly_share.sum() / 3600
    middles = (np.arange(-1, 25) + 0.5) * 3600
    rate: npt.NDArray[np.float64] = np.interp(clock, middles, np.concatenate([share[-1:], share, share[:1]])) * studies_per_day
    return rate * studies_per_day / (rate.sum() * (clock[1] - clock[0]))


def _waits(
    came: npt.NDArray[np.int64], served: npt.NDArray[np.float64], clock: npt.NDArray[np.float64], step_s: float
) -> npt.NDArray[np.float64]:
    """Wait of (up to 200,000 evenly spaced) studies: when the served count passes their number, less when they came."""
    total = int(min(came[-1], served[-1]))
    if total == 0:
        return np.zeros(1)
    numbers = np.linspace(1, total, min(total, 200_000))
    arrival = clock[np.searchsorted(came, numbers)]
    leaving = clock[np.searchsorted(served, numbers - 1e-6)]
    return np.maximum(leaving - arrival, 0.0) + step_s / 2


def _percentile(values: npt.NDArray[np.float64], share: float) -> float:
    return float(np.percentile(values, share))
