"""What a sweep leaves: `best.yaml`, the table as JSON and text, one picture and one page; in its storage and on this machine."""

from __future__ import annotations

import json
import tempfile
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ssacl.config import Config
from ssacl.data.storage import open_storage
from ssacl.evaluation.page import page, table
from ssacl.inference.files import write_whole
from ssacl.registry.versions import register
from ssacl.sweeps.figures import sweep_png
from ssacl.sweeps.front import best_so_far, best_trial, pareto_front
from ssacl.sweeps.importance import importance
from ssacl.sweeps.ledger import CHECKS, Ledger, Trial, trial_config, trial_schedule
from ssacl.sweeps.stability import ARMS, compare_runs
from ssacl.training.sealed import MANIFEST, download_folder, upload_folder

BEST, TABLE, TEXT, PICTURE, PAGE = "best.yaml", "table.json", "table.txt", "sweep.png", "sweep.html"
BEST_MODEL = "best_model"


@dataclass(frozen=True)
class Results:
    """Files on this machine, and what the table holds."""

    best_yaml: Path
    page: Path
    table: dict[str, Any]
    text: str


def write_results(ledger: Ledger, folder: Path, registered: str = "") -> Results:
    """Write the results of a search that has a finished trial; `registered` is the best model's address in a registry.

    Raises
    ------
    StorageError
        Storage or the disk refuses.
    """
    tree = sweep_table(ledger) | {"registered": registered}
    text = table_text(tree)
    png = sweep_png(ledger.sweep.config, ledger.trials(), tree)
    files = {
        BEST: best_config(ledger).to_yaml().encode(),
        TABLE: (json.dumps(tree, indent=1, allow_nan=False) + "\n").encode(),
        TEXT: text.encode(),
        PICTURE: png,
        PAGE: _page(tree, png).encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        ledger.storage.write(name, content)
        write_whole(folder / name, content)
    return Results(folder / BEST, folder / PAGE, tree, text)


def export_best(ledger: Ledger) -> None:
    """Copy the best trial's model to `best_model/`, verified on the way; nothing is done where it is there already.

    Raises
    ------
    CheckpointError
        The trial's model is incomplete or damaged.
    """
    model = ledger.storage.sub(f"runs/{_best(ledger).name}/model")
    target = ledger.storage.sub(BEST_MODEL)
    if model.exists(MANIFEST) and target.exists(MANIFEST) and model.read(MANIFEST) == target.read(MANIFEST):
        return
    with tempfile.TemporaryDirectory(prefix="ssacl-best-") as folder:
        upload_folder(download_folder(model, "", Path(folder) / BEST_MODEL), ledger.storage, BEST_MODEL)


def register_best(ledger: Ledger) -> str:
    """Make `best_model/` a version of the sweep's registry, with the trial's figures in its record; one that is there stays as it is.

    Returns
    -------
    str
        The version's address (REGISTRY@VERSION); empty where the sweep names no registry.

    Raises
    ------
    RegistryError
        The version that is there is damaged or not signed as asked for, or the signing key cannot be read.
    """
    config, best = ledger.sweep.config, _best(ledger)
    if not config.registry_url:
        return ""
    found = {"sweep": config.name, "trial": best.name, **{name: best.value(name) for name in config.objectives}}
    registry, source = open_storage(config.registry_url), ledger.storage.sub(BEST_MODEL)
    with tempfile.TemporaryDirectory(prefix="ssacl-best-") as folder:
        version = register(registry, source, download_folder(source, "", Path(folder) / BEST_MODEL), metrics={"search": found})
    return f"{registry.url}@{version.version}"


def best_config(ledger: Ledger) -> Config:
    """The best trial's configuration, under a run name of its own: `ssacl train --config best.yaml` trains it again."""
    best = _best(ledger)
    config = trial_config(ledger.sweep, best)
    return config.model_copy(update={"run": config.run.model_copy(update={"name": f"{ledger.sweep.config.name}-best"})})


def sweep_table(ledger: Ledger) -> dict[str, Any]:
    """Everything that the sweep learned, as one plain tree."""
    sweep, trials = ledger.sweep, ledger.trials()
    config, best = sweep.config, _best(ledger)
    front = {trial.name for trial in pareto_front(trials, config.objectives)}
    rows = []
    for trial in trials:
        values = trial_schedule(sweep, trial)[-1][1]
        rows.append(
            {
                "name": trial.name,
                "status": trial.status,
                "steps": trial.step,
                "minutes": round(trial.busy_s / 60, 2),
                "on_front": trial.name in front,
                "objectives": {name: trial.value(name) for name in config.objectives},
                "values": {key: values[key] for key in dict.fromkeys((*config.space, *config.same_sum))},
                "copy_of": trial.past[-1].name if trial.past else None,
                "copied_at": trial.forked_at,
                "error": trial.error,
            }
        )
    runs = ledger.trials(*CHECKS)
    # A sweep that goes on may have another best than before: of its runs, those with today's.
    runs = [run for run in runs if run.kind != "best" or run.name.startswith(f"{best.name}-")]
    arms = [arm for arm in ARMS if any(run.kind == arm for run in runs)]
    validation = [
        compare_runs([(run, run.value(name)) for run in runs], arm, name, mode) for arm in arms for name, mode in config.objectives.items()
    ]
    tested = sorted({name for run in runs for name in run.test})
    test = [compare_runs([(run, run.test.get(name)) for run in runs], arm, name, "max") for arm in arms for name in tested]
    return {
        "sweep": config.name,
        "objectives": dict(config.objectives),
        "num_trials": {status: sum(trial.status == status for trial in trials) for status in ("finished", "pruned", "failed", "running")},
        "hours": round(ledger.elapsed_s / 3600, 3),
        "best": best.name,
        "best_schedule": [
            {"trial": name, "after_steps": start, "values": values}
            for name, (start, values) in zip([*(past.name for past in best.past), best.name], trial_schedule(sweep, best), strict=True)
        ],
        "best_model": ledger.storage.sub(BEST_MODEL).url,
        "trials": rows,
        "importance": {name: importance(config, trials, name) for name in config.objectives},
        "best_so_far": {name: best_so_far(trials, name, mode) for name, mode in config.objectives.items()},
        "stability": {"validation": validation, "test": test},
        # What it costs to come by a configuration and to train it once.
        "cost_steps": {
            "best": sum(trial.step - trial.forked_at for trial in trials) + best.step,
            **dict.fromkeys(("base", "uncertainty"), trials[0].step),
        },
        "stability_failures": {run.name: run.error for run in runs if run.status == "failed"},
    }


def _best(ledger: Ledger) -> Trial:
    best = best_trial(ledger.trials(), ledger.sweep.config.objectives)
    assert best is not None, "results are written once a trial has finished"
    return best


def table_text(tree: Mapping[str, Any]) -> str:
    """The table for a terminal."""
    names = list(tree["objectives"])
    head = ["trial", "status", "steps", "min", *names, *tree["trials"][0]["values"]]
    lines = [head]
    for row in tree["trials"]:
        mark = "*" if row["name"] == tree["best"] else "+" if row["on_front"] else ""
        cells = [row["name"] + mark, row["status"], str(row["steps"]), f"{row['minutes']:.1f}"]
        lines.append([*cells, *(_number(row["objectives"][name]) for name in names), *(_number(value) for value in row["values"].values())])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
    lineage = _lineage(tree)
    notes = [f"The best is a schedule, which best.yaml repeats: {lineage}", *_stability_lines(tree)] if lineage else _stability_lines(tree)
    return text + "\n\n* the best, + on the Pareto front\n" + "".join(f"\n{line}" for line in notes) + "\n"


def _lineage(tree: Mapping[str, Any]) -> str:
    """What the best was copied from, in words; empty where it is no copy."""
    if len(tree["best_schedule"]) < 2:
        return ""
    return ", ".join(f"{part['trial']} from step {part['after_steps']}" for part in tree["best_schedule"])


def _stability_lines(tree: Mapping[str, Any]) -> list[str]:
    lines = []
    for split, rows in tree["stability"].items():
        for row in rows:
            if row["seeds"]:
                base, ours, difference = (_spread(row[part]) for part in ("base", "values", "difference"))
                head = f"{split} {row['metric']}, {len(row['seeds'])} seeds"
                lines.append(f"{head}: base {base}, {ARMS[row['arm']]} {ours}, difference {difference}: {row['verdict']}")
    lines += [f"{name} failed: {error}" for name, error in tree["stability_failures"].items()]
    return [*lines, _cost_line(tree)] if lines else ["No stability check: the base is the best, or stability.seeds is 0."]


def _cost_line(tree: Mapping[str, Any]) -> str:
    costs = ", ".join(f"{name} {tree['cost_steps'][arm]}" for arm, name in {"base": "the base", **ARMS}.items())
    return f"Optimizer steps to come by it and train it once: {costs}."


def _page(tree: Mapping[str, Any], png: bytes) -> str:
    names = list(tree["objectives"])
    head = ["trial", "status", "steps", "minutes", *names, *tree["trials"][0]["values"], ""]
    rows = []
    for row in tree["trials"]:
        mark = "best" if row["name"] == tree["best"] else "on the front" if row["on_front"] else row["error"]
        figures = [_number(row["objectives"][name]) for name in names] + [_number(value) for value in row["values"].values()]
        rows.append([row["name"], row["status"], str(row["steps"]), f"{row['minutes']:.1f}", *figures, mark])
    counts = ", ".join(f"{number} {status}" for status, number in tree["num_trials"].items() if number)
    stability = [
        [ARMS[row["arm"]], split, row["metric"], *(_spread(row[part]) for part in ("base", "values", "difference")), row["verdict"]]
        for split, part in tree["stability"].items()
        for row in part
        if row["seeds"]
    ]
    parts = [
        f"<p>{counts}; {tree['hours']:.2f} hours. The best is {tree['best']}: best.yaml trains it again.</p>",
        f"<p>Registered as {escape(tree['registered'])}; no channel points to it by this.</p>" if tree["registered"] else "",
        f"<p>It is a schedule: {escape(_lineage(tree))}.</p>{_schedule_table(tree)}" if _lineage(tree) else "",
        f'<img alt="parallel coordinates, importance, front, learning curves" src="data:image/png;base64,{b64encode(png).decode()}">',
        "<h2>Against the base, with seeds that the search did not see</h2>",
        table(["", "split", "metric", "base", "it", "difference", ""], _escaped(stability)) if stability else "<p>Not compared.</p>",
        f"<p>{escape(_cost_line(tree))}</p>" if stability else "",
        *(f"<p>{escape(name)} failed: {escape(error)}</p>" for name, error in tree["stability_failures"].items()),
        "<h2>Trials</h2>",
        table(head, _escaped(rows), numbers=tuple(range(2, len(head) - 1))),
    ]
    return page(f"Sweep {tree['sweep']}", parts)


def _schedule_table(tree: Mapping[str, Any]) -> str:
    schedule = tree["best_schedule"]
    keys = list(schedule[0]["values"])
    rows = [[part["trial"], str(part["after_steps"]), *(_number(part["values"][key]) for key in keys)] for part in schedule]
    return str(table(["trial", "after steps", *keys], _escaped(rows), numbers=tuple(range(1, len(keys) + 2))))


def _escaped(rows: list[list[str]]) -> list[list[str]]:
    return [[escape(cell) for cell in row] for row in rows]


def _spread(part: Mapping[str, Any]) -> str:
    if part["interval"] is None:
        return _number(part["mean"])
    return f"{_number(part['mean'])} [{_number(part['interval'][0])}, {_number(part['interval'][1])}]"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
