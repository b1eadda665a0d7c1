"""Works the spool off: film to the endpoint, results to their destinations, and again later where that did not go."""

from __future__ import annotations

import heapq
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from serve.gateway.config import Retry
from serve.gateway.delivery import Sender
from serve.gateway.endpoint import ReportClient
from serve.gateway.metrics import GatewayMetrics
from serve.gateway.outcomes import AwayError, FailedError, RefusedError
from serve.gateway.spool import Entry, Spool

logger = logging.getLogger(__name__)
_SWEEP_EVERY_S = 600.0
_ENDPOINT = ""
"""Name of the endpoint among the destinations, which have names."""


class Backoff:
    """How long the other side is left alone. Shared by all instances, so that one of them tries, not all."""

    def __init__(self, retry: Retry) -> None:
        self._retry, self._failures, self._until = retry, 0, 0.0

    def wait_s(self) -> float:
        """Seconds until it may be tried again."""
        return max(0.0, self._until - time.monotonic())

    def failed(self, at_least_s: float | None) -> float:
        """The other side is away; returns for how long it is left alone."""
        # What failed while it was being left alone says nothing new.
        if not self.wait_s():
            self._failures += 1
            self._until = time.monotonic() + max(delay_s(self._retry, self._failures), min(at_least_s or 0.0, self._retry.longest_s))
        return self.wait_s()

    def succeeded(self) -> None:
        """It answers."""
        self._failures, self._until = 0, 0.0


def delay_s(retry: Retry, failures: int) -> float:
    """Doubling, with a tenth of chance, so that many do not come back at the same moment."""
    longest = min(retry.longest_s, retry.first_s * 2 ** min(failures - 1, 30))
    return longest * random.uniform(0.9, 1.0)


class Courier:
    """Threads that take waiting instances, the one due first."""

    def __init__(
        self,
        spool: Spool,
        endpoint: ReportClient,
        senders: Mapping[str, Sender],
        retry: Retry,
        num_threads: int,
        metrics: GatewayMetrics,
    ) -> None:
        self._spool, self._endpoint, self._senders, self._retry, self._metrics = spool, endpoint, senders, retry, metrics
        self._backoffs = {name: Backoff(retry) for name in (_ENDPOINT, *senders)}
        self._due: list[tuple[float, str]] = []
        self._wake, self._stopped = threading.Condition(), False
        self._next_sweep = 0.0
        self._threads = [threading.Thread(target=self._run, name=f"ssacl-courier-{number}", daemon=True) for number in range(num_threads)]

    def start(self) -> None:
        """Take up what waits, then what comes."""
        for key in self._spool.waiting():
            self.add(key)
        for thread in self._threads:
            thread.start()

    def add(self, key: str, after_s: float = 0.0) -> None:
        """Work on this instance, now or later."""
        with self._wake:
            heapq.heappush(self._due, (time.monotonic() + after_s, key))
            self._wake.notify()

    def stop(self, patience_s: float = 30.0) -> None:
        """Let work in hand end; what is not finished stays in the spool."""
        with self._wake:
            self._stopped = True
            self._wake.notify_all()
        end = time.monotonic() + patience_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _run(self) -> None:
        while not self._stopped:
            key = self._take()
            try:
                if key is None:
                    self._sweep()
                else:
                    self._work(key)
            # A full disk, most likely: nothing is lost, and the thread must not end.
            except Exception as error:
                logger.error("%s: put off: %s", key[:12] if key else "sweep", type(error).__name__)
                if key:
                    self.add(key, self._retry.longest_s)

    def _take(self) -> str | None:
        """The instance that is due; None after a while without one, or where there is something else to do."""
        with self._wake:
            end = time.monotonic() + 60.0
            while not self._stopped and (now := time.monotonic()) < min(end, self._next_sweep):
                if self._due and self._due[0][0] <= now:
                    return heapq.heappop(self._due)[1]
                self._wake.wait(min([end - now, self._next_sweep - now, *(due - now for due, _ in self._due[:1])]))
        return None

    def _sweep(self) -> None:
        with self._wake:
            is_due = time.monotonic() >= self._next_sweep
            if is_due:
                self._next_sweep = time.monotonic() + _SWEEP_EVERY_S
        if is_due:
            self._spool.sweep()

    def _work(self, key: str) -> None:
        if not self._spool.is_waiting(key):
            return
        entry = self._spool.entry(key)
        try:
            if not self._spool.results(key):
                self._try(_ENDPOINT, lambda: self._report(entry))
                _log(logging.INFO, entry, "reported")
            self._deliver(entry)
        except AwayError as away:
            self._put_off(self._spool.entry(key), away.reason, away.retry_after_s or 0.0)
        except FailedError as failure:
            entry = replace(entry, attempts=entry.attempts + 1)
            if entry.attempts >= self._retry.max_attempts:
                self._set_aside(entry, failure.reason)
            else:
                self._put_off(entry, failure.reason, delay_s(self._retry, entry.attempts))
        except RefusedError as refusal:
            self._set_aside(self._spool.entry(key), refusal.reason)
        else:
            self._spool.settle(key, "reported")
            self._metrics.settled("delivered")
            _log(logging.INFO, entry, "delivered")

    def _report(self, entry: Entry) -> None:
        self._spool.keep_results(entry.key, self._endpoint.results_of(self._spool.film(entry.key), entry.request_id))

    def _deliver(self, entry: Entry) -> None:
        """Send to every destination that has not taken the results yet; one that is away holds up no other.

        Raises
        ------
        AwayError, RefusedError
            Of a destination that did not take them; a refusal, where there is one.
        """
        problems: list[AwayError | RefusedError] = []
        results = self._spool.results(entry.key)
        for name in entry.pending:
            try:
                if name not in self._senders:
                    raise RefusedError("destination_is_not_in_the_configuration")
                self._try(name, partial(self._senders[name].send, results))
            except (AwayError, RefusedError) as problem:
                problems.append(problem)
                continue
            entry = replace(entry, pending=tuple(other for other in entry.pending if other != name))
            self._spool.update(entry)
        if problems:
            raise next((problem for problem in problems if isinstance(problem, RefusedError)), problems[0])

    def _try(self, target: str, work: Callable[[], None]) -> None:
        """Do it, unless the other side is being left alone.

        Raises
        ------
        AwayError
            It is away, or was a moment ago; `retry_after_s` is for how long it is left alone.
        """
        backoff = self._backoffs[target]
        if wait_s := backoff.wait_s():
            raise AwayError(f"destination_{target}_away" if target else "endpoint_away", wait_s)
        outcome = "failed"
        try:
            work()
            outcome = "done"
        except AwayError as away:
            outcome = "away"
            raise AwayError(away.reason, backoff.failed(away.retry_after_s)) from None
        except RefusedError:
            outcome = "refused"
            raise
        finally:
            self._metrics.attempted(target or "endpoint", outcome)
        backoff.succeeded()

    def _put_off(self, entry: Entry, reason: str, after_s: float) -> None:
        if time.time() - entry.received_at > self._retry.give_up_after_s:
            self._set_aside(entry, reason)
            return
        if (entry.reason, entry.attempts) != (reason, self._spool.entry(entry.key).attempts):
            self._spool.update(replace(entry, reason=reason))
            _log(logging.WARNING, entry, f"put off: {reason}")
        self.add(entry.key, after_s)

    def _set_aside(self, entry: Entry, reason: str) -> None:
        self._spool.quarantine(entry, reason)
        self._metrics.settled("quarantined")
        _log(logging.ERROR, entry, f"quarantined: {reason}")


def _log(level: int, entry: Entry, told: str) -> None:
    logger.log(level, "request %s: %s %s", entry.request_id, entry.key[:12], told, extra={"request_id": entry.request_id})
