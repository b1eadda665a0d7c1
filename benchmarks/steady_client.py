"""A client that asks the endpoint at a steady pace, repeats nothing, and remembers when it was answered."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import httpx
import numpy as np

from ssacl.data.quiet import quiet_loggers

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Asked:
    at_s: float
    """When it was sent, by the monotonic clock."""
    seconds: float
    answer: str
    """Status, or what the transport said."""
    version: str = ""
    """Of the model that wrote the report."""


class SteadyClient:
    """Posts a film every `every_s` seconds inside the block, each in a thread of its own so that a slow answer delays no other."""

    def __init__(self, url: str, film: bytes, authorization: str, every_s: float = 0.5) -> None:
        quiet_loggers("httpx", "httpcore")
        self._url, self._film, self._every_s = url, film, every_s
        self._headers = {"content-type": "application/dicom", "authorization": authorization}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._asked: list[Asked] = []

    def figures(self, since_s: float, until_s: float) -> dict[str, Any]:
        """Of the requests sent between two times of the monotonic clock: how many, the share answered with a report, the longest
        time in which no report came, and what a report took."""
        sent = sorted((each for each in self._asked if since_s <= each.at_s < until_s), key=lambda each: each.at_s)
        reports = sorted(each.at_s + each.seconds for each in self._asked if each.answer == "200")
        seconds = [each.seconds for each in sent if each.answer == "200"] or [float(TIMEOUT_S)]
        moments = [since_s, *(moment for moment in reports if since_s < moment < until_s), until_s]
        return {
            "requests": len(sent),
            "answered_share": round(sum(each.answer == "200" for each in sent) / max(len(sent), 1), 4),
            "longest_gap_s": round(max(later - earlier for earlier, later in pairwise(moments)), 1),
            "answers": dict(sorted(Counter(each.answer for each in sent).items())),
            "seconds_p50": round(float(np.percentile(seconds, 50)), 3),
            "seconds_p95": round(float(np.percentile(seconds, 95)), 3),
        }

    def versions(self, count: int) -> set[str]:
        """Versions of the models that wrote the last `count` reports."""
        reports = sorted((each for each in self._asked if each.answer == "200"), key=lambda each: each.at_s)
        return {each.version for each in reports[-count:]}

    def __enter__(self) -> SteadyClient:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        waiting: list[threading.Thread] = []
        while not self._stopped.wait(self._every_s):
            thread = threading.Thread(target=self._ask, daemon=True)
            thread.start()
            waiting.append(thread)
        for thread in waiting:
            thread.join(TIMEOUT_S)

    def _ask(self) -> None:
        at_s, version = time.monotonic(), ""
        try:
            response = httpx.post(self._url, content=self._film, headers=self._headers, timeout=TIMEOUT_S, trust_env=False)
            answer = str(response.status_code)
            if response.is_success:
                version = str(response.json()["model_version"])
        except httpx.TransportError as error:
            answer = type(error).__name__
        self._asked.append(Asked(at_s, time.monotonic() - at_s, answer, version))
