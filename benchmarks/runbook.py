"""Runs the commands that docs/OPERATIONS.md tells people to type, as they stand there, with the names of a place put in."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.raylets import BIN
from benchmarks.record import REPOSITORY
from ssacl.errors import ClusterError

PAGE = REPOSITORY / "docs" / "OPERATIONS.md"
_COMMAND_LIMIT_S = 400.0


@dataclass
class Running:
    """A command that was started."""

    started_s: float
    process: subprocess.Popen[str]
    output: list[str] = field(default_factory=list)
    reader: threading.Thread | None = None

    def wait(self) -> int:
        """Its exit code.

        Raises
        ------
        ClusterError
            It takes too long.
        """
        try:
            code = self.process.wait(_COMMAND_LIMIT_S)
        except subprocess.TimeoutExpired as error:
            self.process.kill()
            raise ClusterError(f"{shlex.join(self.process.args[:3])} took more than {_COMMAND_LIMIT_S:.0f} s: {self.tail()}") from error
        if self.reader is not None:
            self.reader.join(10)
        return code

    def tail(self) -> str:
        return "".join(self.output)[-1500:]


class Runbook:
    """Commands of the page by how they begin.

    Parameters
    ----------
    names : what stands on the page -> what it is called here; longer texts before shorter ones.
    environment : variables of the commands, on top of this process'.
    folder : where they run, beside links to the repository's configurations.
    """

    def __init__(self, names: Mapping[str, str], environment: Mapping[str, str], folder: Path) -> None:
        self.names = dict(names)
        self.environment = dict(environment)
        self._folder = folder
        text = PAGE.read_text(encoding="utf-8")
        self._lines = [line.strip() for line in text.splitlines() if line.startswith("    ")] + re.findall(r"`([a-z]+ [^`]+)`", text)
        self.transcript: list[dict[str, object]] = []
        """Of each command that ended: as it stands on the page, its exit code and seconds."""

    def line(self, start: str) -> str:
        """The page's line that begins so.

        Raises
        ------
        ClusterError
            There is none.
        """
        found = next((line for line in self._lines if f"{line} ".startswith(f"{start} ")), None)
        if found is None:
            raise ClusterError(f"{PAGE.name} has no command that begins with '{start}'.")
        return found

    def start(self, start: str, *more: str, names: Mapping[str, str] | None = None) -> Running:
        """Start a command of the page, with `more` words behind it."""
        text = self.line(start)
        for old, new in {**(names or {}), **self.names}.items():
            text = text.replace(old, new)
        words = [*shlex.split(text), *more]
        print(f"cluster: {shlex.join(words)}", file=sys.stderr)
        environment = {**os.environ, **self.environment}
        process = subprocess.Popen(
            [str(BIN / words[0]), *words[1:]],
            cwd=self._folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        running = Running(time.monotonic(), process)
        running.reader = threading.Thread(target=self._read, args=(running,), daemon=True)
        running.reader.start()
        return running

    def finish(self, start: str, running: Running, expect: int = 0) -> str:
        """Wait for a started command; gives what it wrote.

        Raises
        ------
        ClusterError
            Its exit code is not `expect`; the end of its output is told.
        """
        code = running.wait()
        self.transcript.append({"command": self.line(start), "exit_code": code, "seconds": round(time.monotonic() - running.started_s, 1)})
        if code != expect:
            raise ClusterError(f"'{start}' ended with exit code {code}: {running.tail()}")
        return "".join(running.output)

    def run(self, start: str, *more: str, names: Mapping[str, str] | None = None, expect: int = 0) -> str:
        """`start` and `finish`."""
        return self.finish(start, self.start(start, *more, names=names), expect)

    @staticmethod
    def _read(running: Running) -> None:
        assert running.process.stdout is not None
        running.output.extend(running.process.stdout)
