"""What cluster/monitoring reads: names of metrics by file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

MONITORING = Path(__file__).parents[1] / "cluster" / "monitoring"


def watched() -> dict[str, set[str]]:
    """Of the alerts and of each dashboard."""
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())
    read = {"alerts.yml": [rule["expr"] for group in rules["groups"] for rule in group["rules"]]}
    for path in (MONITORING / "grafana").glob("*.json"):
        read[path.name] = [target["expr"] for panel in json.loads(path.read_text())["panels"] for target in panel["targets"]]
    return {name: set(re.findall(r"\b(?:ray|ssacl)_[a-z0-9_]+", " ".join(expressions))) for name, expressions in read.items()}
