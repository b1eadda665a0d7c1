"""What the cluster benchmarks type stands in docs/OPERATIONS.md, and this release takes it; a short run of a node that is lost."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from benchmarks import cluster_jobs as benchmark
from benchmarks.cluster_serving import serve_file
from benchmarks.runbook import Runbook
from benchmarks.steady_client import Asked, SteadyClient
from serve.configured import application
from ssacl.cli import build_parser
from ssacl.commands.submit import checked_command
from ssacl.errors import ClusterError
from ssacl.sweeps.config import load_sweep

SOURCE = "".join((Path(benchmark.__file__).with_name(name)).read_text() for name in ("cluster_jobs.py", "cluster_serving.py"))
STARTS = sorted(set(re.findall(r'"((?:ssacl|serve) [^"{]+)"', SOURCE)))


def test_commands_stand_on_the_page(tmp_path: Path) -> None:
    book = Runbook({}, {}, tmp_path)
    assert len(STARTS) > 15
    for start in STARTS:
        words = shlex.split(book.line(start))
        if words[0] == "ssacl":
            options = build_parser().parse_args(words[1:])
            assert (
                options.command != "submit"
                or options.action in ("status", "logs", "stop")
                or checked_command(options.job, options.arguments)
            )
    with pytest.raises(ClusterError, match="no command that begins with 'ssacl model demote'"):
        book.line("ssacl model demote")


def test_a_command_runs_as_the_page_has_it_with_the_places_names(tmp_path: Path) -> None:
    book = Runbook({"signing.pem": "private.pem"}, {}, tmp_path)
    book.run("ssacl model keys")
    assert (tmp_path / "private.pem").is_file()
    with pytest.raises(ClusterError, match=r"'ssacl model keys' ended with exit code 1: .*exists"):
        book.run("ssacl model keys")
    assert [(entry["command"], entry["exit_code"]) for entry in book.transcript] == [
        ("ssacl model keys signing.pem signing.pub", code) for code in (0, 1)
    ]


def test_the_sweep_and_the_endpoint_are_taken(tmp_path: Path) -> None:
    sweep = load_sweep(benchmark.write_sweep(tmp_path), ["data.url=x"])
    assert sweep.config.budget.trials == 2
    assert sweep.base.data.url == "x"
    tree = yaml.safe_load(serve_file(tmp_path, 8001).read_text())
    [described] = ServeDeploySchema.model_validate(tree).applications
    model = application({**described.args, "checkpoint_url": "x"})._bound_deployment.init_args[0]._bound_deployment
    assert model.ray_actor_options["num_gpus"] == 0


def test_gaps_are_times_without_a_report() -> None:
    client = SteadyClient("http://127.0.0.1:9", b"", "")
    client._asked = [
        Asked(at, 1.0, answer) for at, answer in [(0, "200"), (2, "200"), (4, "503"), (6, "ConnectError"), (9, "200"), (20, "200")]
    ]
    assert client.figures(0, 12) == {
        "requests": 5,
        "answered_share": 0.6,
        "longest_gap_s": 7.0,
        "answers": {"200": 3, "503": 1, "ConnectError": 1},
        "seconds_p50": 1.0,
        "seconds_p95": 1.0,
    }
