"""An HTTP client of the endpoint that repeats what may be repeated, and counts."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import httpx

from ssacl.data.quiet import quiet_loggers

REPEATED = (429, 500, 502, 503, 504)
"""Answers after which the same film may be sent again: a report changes nothing in the endpoint."""
MAX_ATTEMPTS = 12
_LONGEST_WAIT_S = 8.0


class HttpClient:
    """Posts one film after the other inside the block, in a thread of its own."""

    def __init__(self, url: str, film: bytes) -> None:
        # Below its warnings httpx tells every request.
        quiet_loggers("httpx", "httpcore")
        self._url, self._film = url, film
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.first_answers = Counter[str]()
        self.attempts: list[int] = []
        """Of each request; more than `MAX_ATTEMPTS` for one that was given up."""

    def figures(self) -> dict[str, Any]:
        """Requests, how many failed in the end, what the first attempts were answered with, and the most attempts that one took."""
        return {
            "requests": len(self.attempts),
            "failed": sum(count > MAX_ATTEMPTS for count in self.attempts),
            "first_answers": dict(sorted(self.first_answers.items())),
            "most_attempts": max(self.attempts, default=0),
        }

    def stop(self) -> None:
        """Wait for the request in hand, and ask no more."""
        self._stopped.set()
        self._thread.join()

    def __enter__(self) -> HttpClient:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        with httpx.Client(timeout=120, trust_env=False, headers={"content-type": "application/dicom"}) as client:
            while not self._stopped.is_set():
                self.attempts.append(self._request(client))

    def _request(self, client: httpx.Client) -> int:
        for attempt in range(1, MAX_ATTEMPTS + 1):
            wait_s = min(0.25 * 2**attempt, _LONGEST_WAIT_S)
            try:
                answer = client.post(self._url, content=self._film)
                name, is_final = str(answer.status_code), answer.status_code not in REPEATED
                wait_s = float(answer.headers.get("retry-after", wait_s))
            except httpx.TransportError:
                name, is_final = "broke off", False
            if attempt == 1:
                self.first_answers[name] += 1
            if is_final:
                return attempt if name == "200" else MAX_ATTEMPTS + 1
            time.sleep(wait_s)
        return MAX_ATTEMPTS + 1
