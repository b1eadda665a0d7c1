"""`ssacl evaluate zero-shot`: findings told by prompts alone.

A film's score for a finding is its cosine with the sentences that say it, less that with the sentences that deny it; the area under the
ROC curve needs no threshold.

Shape letters: n films, F findings, T text width.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ssacl.anatomy import FINDING_INDEX
from ssacl.errors import DataError
from ssacl.evaluation.downstream.areas import area_figures
from ssacl.evaluation.downstream.contrast_run import ContrastOptions, run_contrast
from ssacl.evaluation.downstream.films import PRESENT
from ssacl.evaluation.downstream.label_layouts import told_labels
from ssacl.evaluation.downstream.prompts import embed_prompts, load_prompts
from ssacl.evaluation.downstream.task_card import make_task_card, write_task_card
from ssacl.evaluation.figures import NUM_RESAMPLES


def zero_shot(
    checkpoint_url: str | Path,
    data_url: str | Path,
    out_folder: str | Path,
    prompts_path: str | Path,
    options: ContrastOptions | None = None,
    *,
    start: Callable[[int], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Score prompts against the labels of a split; writes the score card into `out_folder`, which a repeated run goes on in.

    Parameters
    ----------
    prompts_path
        See `load_prompts`.
    start, progress
        Called with the number of films to encode, and with the number done since the last call.

    Returns
    -------
    dict
        The card: `metrics` has `auc_mean` and `auc_FINDING`; None where the split has one class alone.

    Raises
    ------
    ConfigError
        The prompt file is damaged, or a finding is unknown or without prompts.
    DataError, SplitError
        There is no such data set or split, no film has labels, films were trained on, or `out_folder` holds another evaluation.
    CheckpointError, GenerationError, StorageError
        The checkpoint never contrasted films and texts, is damaged, or storage fails.
    """
    options, prompts = options or ContrastOptions(), load_prompts(prompts_path)
    run = run_contrast(checkpoint_url, data_url, out_folder, prompts, options, {"task": "zero-shot"}, start, progress)
    pairs = prompts.of(options.findings)
    names = tuple(pairs)
    rows_n = np.flatnonzero(run.embedded.labelled)
    if not len(rows_n):
        raise DataError(f"No film of the split '{options.split}' has labels to score against.")
    present_FT, absent_FT = (embed_prompts(run.loaded, pairs, side) for side in ("present", "absent"))
    scores_nF = run.embedded.image[rows_n] @ (present_FT - absent_FT).T
    columns = [FINDING_INDEX[name] for name in names]
    labels_nF = np.array([told_labels(status, run.settings["uncertain"]) for status in run.embedded.status[rows_n][:, columns]], np.int8)
    points, intervals = area_figures({"model": scores_nF}, labels_nF, names, run.embedded.patient[rows_n].tolist(), options.seed)
    figures = sorted(points["model"], key=lambda name: name != "auc_mean")
    rows = [{"figure": name, "model": points["model"][name], "baseline": 0.5, "baseline_name": "chance"} for name in figures]
    unlabelled = len(run.entries) - len(rows_n)
    settings = run.settings | {
        "policies": {
            "score": "cosine with the mean of the present prompts less that with the mean of the absent prompts",
            "intervals": f"95 % percentiles of {NUM_RESAMPLES} resamples of patients",
            "films without labels": f"left out: {unlabelled}",
        },
        "in_short": {
            "films with labels": len(rows_n),
            "uncertain counts as": run.settings["uncertain"],
            "training films": run.settings["training_films"]["what"],
        },
    }
    details = {"present": {name: int((labels_nF[:, column] == PRESENT).sum()) for column, name in enumerate(names)}}
    data = run.data | {"num_cases": len(rows_n)}
    card = make_task_card("zero-shot", run.loaded, data, settings, points["model"], intervals["model"], rows, details)
    write_task_card(card, run.folder)
    return card
