"""A sweep of tiny runs for tests."""

from pathlib import Path
from typing import Any

import yaml
from training_set import tiny_tree, write_training_set

SPACE = {
    "losses.global_contrastive": {"log_uniform": [0.01, 1]},
    "losses.anatomy_reconstruction": {"log_uniform": [0.1, 2]},
    "optim.lr": {"log_uniform": ["1e-4", "1e-2"]},
    "losses.balance": {"choice": ["fixed", "uncertainty"]},
}


def sweep_tree(folder: Path) -> dict[str, Any]:
    return {
        "name": "tiny",
        "storage_url": str(folder / "sweeps"),
        "base": {"config": "base.yaml"},
        "space": SPACE,
        "num_films": 2,
        "searcher": {"num_random": 2},
        "scheduler": {"metric": "mirror_agreement", "first_rung_steps": 2, "factor": 2},
        "budget": {"trials": 3},
        "stability": {"seeds": 0},
        "max_concurrent": 1,
    }


def write_sweep(folder: Path, **changes: Any) -> Path:
    """`sweep.yaml` with some top-level keys replaced, and its `base.yaml`, in `folder`; the data is written where `folder/set` lacks it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "set").exists():
        write_training_set(folder / "set")
    base = tiny_tree(folder / "set", "runs")
    base["run"] |= {
        "stages": [{"kind": "contrastive", "num_steps": 4}, {"kind": "findings", "num_steps": 2}, {"kind": "generation", "num_steps": 2}],
        "checkpoint_every_steps": 2,
        "validate_every_steps": 2,
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep_tree(folder) | changes))
    return path
