"""The clients of benchmarks/serve_load.py, against a real interface in this process and against a figure worked out by hand."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from pathlib import Path

import pytest
from dicom_nodes import free_port, study_film
from PIL import Image
from report_endpoint import InProcess, running_endpoint
from tiny_model import tiny_model_folder

from benchmarks.open_loop import Answer, closed_loop, open_loop, poisson_moments, seen
from benchmarks.serve_scaling import Timeline, draw
from serve.problems import OverloadedError
from ssacl.data.dicom import Picture
from ssacl.inference.report import DraftReport


class EveryOtherShed(InProcess):
    async def report(self, picture: Picture, model: str | None = None) -> DraftReport:
        draft = await super().report(picture, model)
        if self.num_reports % 2 == 0:
            raise OverloadedError
        return draft


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model") / "model")


def test_moments_are_a_poisson_process() -> None:
    moments = poisson_moments(50.0, 100.0, seed=1)
    assert len(moments) == pytest.approx(5000, abs=4 * 5000**0.5)
    gaps = [after - before for before, after in itertools.pairwise(moments)]
    # Exponential gaps: their mean is their standard deviation.
    assert statistics.mean(gaps) == pytest.approx(0.02, rel=0.06)
    assert statistics.stdev(gaps) == pytest.approx(0.02, rel=0.06)
    assert moments == poisson_moments(50.0, 100.0, seed=1)


def test_an_open_loop_does_not_wait_for_answers(model: Path) -> None:
    films = [study_film(1), study_film(2)]
    with running_endpoint(EveryOtherShed(model), free_port()) as url:
        answers = asyncio.run(open_loop(url, films, [0.0] * 6))
        one_by_one = asyncio.run(closed_loop(url, films, num_clients=1, seconds=2.0))
    assert sorted(answer.status for answer in answers) == [200] * 3 + [503] * 3
    assert all(answer.is_shed for answer in answers if answer.status == 503)
    # All were sent at once, so that the last waited for the others.
    assert max(answer.took_s for answer in answers) > 2 * min(answer.took_s for answer in one_by_one)
    assert [answer.status for answer in one_by_one[:2]] == [200, 503]


def test_an_endpoint_that_is_away_is_counted() -> None:
    (answer,) = asyncio.run(open_loop(f"http://127.0.0.1:{free_port()}", [b""], [0.0]))
    assert (answer.status, seen([answer])["failed"]) == (0, 1)


def test_figures_worked_out_by_hand() -> None:
    answers = [Answer(number * 0.1, 0.01 * (number + 1), 200, False) for number in range(101)]
    answers += [Answer(10.0, 0.0, 503, True), Answer(10.0, 0.0, 503, False), Answer(10.0, 0.0, 500, True)]
    figures = seen(answers)
    assert (figures["p50_s"], figures["p95_s"], figures["p99_s"]) == (0.51, 0.96, 1.0)
    # The last answer comes at 10 + 1.01 s.
    assert figures["answered_per_s"] == pytest.approx(101 / 11.01, abs=1e-3)
    assert (figures["shed_share"], figures["failed"]) == (round(1 / 104, 4), 2)


def test_a_timeline_tells_when_the_number_of_replicas_changed(tmp_path: Path) -> None:
    timeline = Timeline(
        [(0.0, 1), (0.5, 1), (1.0, 3), (1.5, 3), (2.0, 1)], 1.5, [Answer(0.1, 0.2, 200, False), Answer(0.2, 0.0, 503, True)]
    )
    assert timeline.changes() == [(0.0, 1), (1.0, 3), (2.0, 1)]
    draw(timeline, tmp_path / "timeline.png")
    assert Image.open(tmp_path / "timeline.png").format == "PNG"
