"""A short form of benchmarks/gateway_chaos.py: Ray Serve, gateway and archive for real, and each kind of process killed once."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gateway_chaos import chaos


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_accepted_film_has_exactly_one_result_whatever_is_killed(tmp_path: Path) -> None:
    figures = chaos(tmp_path, num_films=6, num_kills=4)
    assert figures["killed"] == {"controller": 1, "gateway": 1, "ingress replica": 1, "model replica": 1}
    assert (figures["accepted_share"], figures["lost"], figures["doubled"], figures["quarantined"]) == (1.0, 0, 0, 0)
    assert figures["reported"] == 6
    assert figures["http"]["failed"] == 0
    assert figures["http"]["requests"] > 0
    assert figures["of_films_never_sent"] == 0
