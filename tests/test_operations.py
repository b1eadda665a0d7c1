"""The runbooks: each `ssacl` command in docs/OPERATIONS.md, cluster/README.md and README.md is one that this release takes, and each file
that they name is there. Those for a cluster are run by benchmarks/cluster_jobs.py and cluster_serving.py."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from ssacl.cli import build_parser
from ssacl.commands.submit import COMMANDS

ROOT = Path(__file__).parents[1]
TEXT, FRONT = (
    "".join((ROOT / page).read_text(encoding="utf-8") for page in pages).replace("\\\n", " ")
    for pages in (("docs/OPERATIONS.md", "cluster/README.md"), ("README.md",))
)
BLOCKS = [
    line.strip() for line in (TEXT + FRONT).splitlines() if re.match(r" {4,}(ssacl|export|kubectl|docker|python|serve|ray|echoscu) ", line)
]
INLINE = [found.strip("`") for found in re.findall(r"`ssacl [^`]+`", TEXT)]
LINES = sorted({line for line in [*BLOCKS, *INLINE] if line.startswith("ssacl ") and "`" not in line})


def test_the_page_has_the_runbooks() -> None:
    headings = re.findall(r"^## (.+)$", TEXT, re.MULTILINE)
    assert set(headings) >= {
        "First install",
        "Upgrade",
        "Rollback",
        "Lost node",
        "Full disk",
        "PACS unreachable",
        "Key rotation",
        "Backup and restore",
    }
    assert len(LINES) > 20


@pytest.mark.parametrize("line", LINES)
def test_commands_are_taken(line: str) -> None:
    options = build_parser().parse_args(shlex.split(line)[1:])
    if options.command == "submit" and options.action in COMMANDS:
        build_parser().parse_args([*COMMANDS[options.action], *options.arguments])


def test_a_command_that_does_not_exist_would_be_found() -> None:
    with pytest.raises(SystemExit):
        test_commands_are_taken("ssacl model demote s3://bucket/models")
    with pytest.raises(SystemExit):
        test_commands_are_taken("ssacl submit train --address http://head:8265 -- --no-such-option")


def test_files_that_are_named_are_there() -> None:
    named = re.findall(r"\b(?:cluster|configs|benchmarks)/[\w./-]+\.(?:yaml|yml|py|json|cpu|cuda)", TEXT)
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []
