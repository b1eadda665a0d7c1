"""`ssacl submit`: the commands that do long work, as jobs on a Ray cluster (Ray Jobs API)."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ssacl.commands import Commands
from ssacl.errors import ConfigError

if TYPE_CHECKING:
    from ray_jobs.submit import Cluster

COMMANDS = {"train": ("train",), "tune": ("tune",), "ingest": ("data", "ingest"), "evaluate": ("evaluate",)}
"""Job -> the words of the command that it runs."""
_EXAMPLES = """\
examples:
  ssacl submit train --address http://head:8265 --secret AWS_ACCESS_KEY_ID --secret AWS_SECRET_ACCESS_KEY \\
      --env AWS_ENDPOINT_URL=https://s3.hospital.example -- --config configs/phantom_tiny.yaml data.url=s3://bucket/data
  ssacl submit status --address http://head:8265
  ssacl submit logs JOB --address http://head:8265 --follow

A secret is named, never sent: the machines of the cluster have it as a variable (NAME) or a file (NAME=/path).
The exit code is that of the job. Ctrl-C ends the following, not the job.
"""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,99}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_SECRET = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|ACCESS_KEY|PRIVATE|AUTHORIZATION", re.IGNORECASE)
_CREDENTIALS_IN_URL = re.compile(r"://[^/\s@]+@")
_INTERRUPTED = 130


def add_parsers(commands: Commands) -> None:
    actions = commands.add_parser(
        "submit",
        help="run train, tune, ingest or evaluate on a Ray cluster",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).add_subparsers(dest="action", required=True, metavar="ACTION")
    for job, words in COMMANDS.items():
        parser = actions.add_parser(
            job, help=f"ssacl {' '.join(words)} as a job", epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        _add_address(parser)
        parser.add_argument(
            "--image", metavar="IMAGE", help="container image with the code, in place of this working tree (paths are the image's)"
        )
        parser.add_argument(
            "--secret", action="append", default=[], metavar="NAME[=FILE]", help="a variable that every machine has, or a file there"
        )
        parser.add_argument(
            "--env", action="append", default=[], metavar="NAME=VALUE", help="a setting that is no secret, as AWS_ENDPOINT_URL"
        )
        parser.add_argument("--name", default="", help="the job's id (default: made up)")
        parser.add_argument(
            "--cpus", type=float, default=0, help="reserve for the command's own process; its workers reserve for themselves"
        )
        parser.add_argument("--gpus", type=float, default=0, help="likewise")
        parser.add_argument("--start-limit-s", type=float, default=900, metavar="S", help="a job that finds no room for so long is stopped")
        parser.add_argument("--detach", action="store_true", help="print the job's id and end")
        parser.add_argument("arguments", nargs="*", metavar="-- ARGS", help=f"of ssacl {' '.join(words)}, behind --")
        parser.set_defaults(run=_submit, job=job)
    status = actions.add_parser("status", help="one job, or all of them")
    status.add_argument("id", nargs="?", metavar="JOB")
    _add_address(status)
    status.set_defaults(run=_status)
    logs = actions.add_parser("logs", help="print a job's log")
    logs.add_argument("id", metavar="JOB")
    logs.add_argument("--follow", action="store_true", help="until the job ends; its exit code is returned")
    _add_address(logs)
    logs.set_defaults(run=_logs)
    stop = actions.add_parser("stop", help="end a job; a run that is submitted again goes on at its last checkpoint")
    stop.add_argument("id", metavar="JOB")
    _add_address(stop)
    stop.set_defaults(run=_stop)


def _add_address(parser: argparse.ArgumentParser) -> None:
    default = os.environ.get("RAY_API_SERVER_ADDRESS")
    parser.add_argument(
        "--address", required=default is None, default=default, metavar="URL", help="http://head:8265 (default: RAY_API_SERVER_ADDRESS)"
    )


def _submit(options: argparse.Namespace) -> int:
    words, config = checked_command(options.job, options.arguments, here=options.image is None)
    secrets, environment = _secrets(options.secret), _settings(options.env)
    if options.image and (files := [name for name, path in secrets.items() if path]):
        raise ConfigError(f"--image takes secrets from the machines' environment only, not from files: {', '.join(files)}.")
    if options.name and not _NAME.fullmatch(options.name):
        raise ConfigError("--name takes letters, digits, '-', '_' and '.', a letter first.")
    from ray_jobs.submit import Cluster, Job

    cluster = Cluster(options.address)
    job = Job(words, config, options.image, secrets, environment, options.name, options.cpus, options.gpus)
    job_id = cluster.submit(job)
    print(f"job: {job_id}", flush=True)
    return 0 if options.detach else _follow(cluster, job_id, options.start_limit_s)


def checked_command(job: str, arguments: list[str], here: bool = True) -> tuple[tuple[str, ...], Path | None]:
    """The command of a job as words without its `--config`, and that file; wrong usage ends here and not on the cluster.

    Parameters
    ----------
    here : the file of `--config` is one of this machine and is read too.

    Raises
    ------
    ConfigError
        An argument holds credentials, `--address` is among them, or the configuration is wrong.
    """
    from ssacl.cli import build_parser

    if any(_CREDENTIALS_IN_URL.search(argument) for argument in arguments):
        raise ConfigError("An argument holds a password inside a URL: jobs are listed with their arguments. Use --secret.")
    if any(argument.partition("=")[0] == "--address" for argument in arguments):
        raise ConfigError("Behind -- there is no --address: a job works on the cluster that it runs on.")
    parsed = build_parser().parse_args([*COMMANDS[job], *arguments])
    path = getattr(parsed, "config", None)
    if path is None:
        return (*COMMANDS[job], *arguments), None
    if here:
        _load(job, parsed)
    spelled = [index for index, word in enumerate(arguments) if word.partition("=")[0] == "--config"]
    if len(spelled) != 1:
        raise ConfigError("Write --config in full, and once.")
    index = spelled[0]
    rest = arguments[:index] + arguments[index + (1 if "=" in arguments[index] else 2) :]
    return (*COMMANDS[job], *rest), Path(path)


def _load(job: str, parsed: argparse.Namespace) -> None:
    if job == "train":
        from ssacl.config import load_config

        load_config(parsed.config, parsed.overrides)
    elif job == "tune":
        from ssacl.sweeps.config import load_sweep

        load_sweep(parsed.config, parsed.overrides)


def _secrets(texts: list[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        name, separator, path = text.partition("=")
        # What is no path may be the secret itself, which must not be told again.
        if not _VARIABLE.fullmatch(name) or (separator and not path.startswith("/")) or "," in path:
            raise ConfigError("--secret takes NAME, or NAME=/absolute/path of a file on the machines of the cluster; never a value.")
        found[name] = path
    return found


def _settings(texts: list[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not _VARIABLE.fullmatch(name):
            raise ConfigError("--env takes NAME=VALUE, as in --env AWS_ENDPOINT_URL=https://s3.hospital.example.")
        if _SECRET.search(name) or _CREDENTIALS_IN_URL.search(value):
            raise ConfigError(f"{name} looks like a secret, and settings are shown by the cluster's dashboard: use --secret {name}.")
        found[name] = value
    return found


def _follow(cluster: Cluster, job_id: str, start_limit_s: float) -> int:
    try:
        code: int = cluster.follow(job_id, start_limit_s, _write)
    except KeyboardInterrupt:
        print(
            f"The job goes on. Look again: ssacl submit logs {job_id} --follow --address {cluster.address}; end it: ssacl submit stop "
            f"{job_id} --address {cluster.address}",
            file=sys.stderr,
        )
        return _INTERRUPTED
    print(f"job {job_id}: {'done' if code == 0 else f'ended with exit code {code}'}", file=sys.stderr)
    return code


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _status(options: argparse.Namespace) -> int:
    from ray_jobs.submit import Cluster

    cluster = Cluster(options.address)
    for job in [cluster.info(options.id)] if options.id else cluster.jobs():
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((job.start_time or 0) / 1000))
        ran_s = ((job.end_time or time.time() * 1000) - (job.start_time or 0)) / 1000
        code = "" if job.driver_exit_code is None else f"  exit {job.driver_exit_code}"
        print(f"{job.submission_id}  {job.status.value}  {began}  {ran_s:.0f} s{code}")
    return 0


def _logs(options: argparse.Namespace) -> int:
    from ray_jobs.submit import Cluster

    cluster = Cluster(options.address)
    if options.follow:
        return _follow(cluster, options.id, float("inf"))
    _write(cluster.logs(options.id))
    return 0


def _stop(options: argparse.Namespace) -> int:
    from ray_jobs.submit import Cluster

    print("stopping" if Cluster(options.address).stop(options.id) else "it had ended already")
    return 0
