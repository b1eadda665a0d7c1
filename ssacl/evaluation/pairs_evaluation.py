"""`ssacl evaluate reports`: a file of report pairs of any system, or a checkpoint's drafts, scored and written up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssacl.data.labeler import Uncertain
from ssacl.data.loader import open_split
from ssacl.data.storage import open_storage
from ssacl.evaluation.cases import EvaluationFolder
from ssacl.evaluation.meteor import meteor_score, need_java
from ssacl.evaluation.page import ShownCase, write_page
from ssacl.evaluation.pairs import PairsFile, check_pairs, check_split
from ssacl.evaluation.predictions import Runner, Work
from ssacl.evaluation.report_scores import SHOWN_KINDS, report_figures, score_pairs, shown_pairs, write_radeval
from ssacl.evaluation.scorecard import make_card, make_pairs_card, write_card
from ssacl.evaluation.study_set import SplitEvaluation
from ssacl.inference.files import write_whole
from ssacl.inference.generator import GenerationOptions
from ssacl.scores.clinical import LABELER, load_chexbert


def evaluate_pairs(
    pairs_path: str | Path,
    out_folder: str | Path,
    *,
    data_url: str | None = None,
    split: str | None = None,
    uncertain: Uncertain = "present",
    seed: int = 0,
    chexbert_folder: str | Path | None = None,
    meteor: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Score a file of pairs; writes scorecard.json, scorecard.html, radeval.json and the cases. Run again, it does only what is missing.

    Parameters
    ----------
    pairs_path
        See `ssacl.evaluation.pairs`.
    out_folder
        Made if absent.
    data_url
        Data set whose `split` the ids must be: its sample keys.
    split
        What the card says of the pairs; checked only against a data set.
    uncertain
        What an uncertain finding counts as, on both sides.
    seed
        Of the bootstrap.
    chexbert_folder
        Reads the findings by the CheXbert in this folder too.
    meteor
        METEOR too; needs Java.
    progress
        Called with the number of pairs scored since the last call.

    Raises
    ------
    DataError
        Lines are no pairs, `out_folder` holds another evaluation, or METEOR is wanted and there is no Java.
    SplitError
        The pairs are not those of the split.
    CheckpointError
        There is no CheXbert in its folder.
    StorageError
        The disk is full or refuses.
    """
    if meteor:
        need_java()
    pairs = check_pairs(pairs_path)
    data_sha256 = check_split(pairs, data_url, split or "test") if data_url is not None else None
    data = {
        "sha256": pairs.sha256,
        "split": split or ("test" if data_url else None),
        "num_cases": len(pairs),
        "data_set_sha256": data_sha256,
    }
    chexbert = load_chexbert(chexbert_folder)
    name = None if chexbert is None else chexbert.name
    folder = EvaluationFolder(out_folder, {"data": data})
    cases = score_pairs(pairs, folder, chexbert, progress)
    figures = report_figures(cases, uncertain, seed)
    if meteor:
        figures["metrics"]["meteor"] = meteor_score(pairs.read())
    card = make_pairs_card({"data": data, "uncertain": uncertain, "labeler": LABELER, "chexbert": name, "seed": seed}, figures)
    write_radeval(pairs, folder.path)
    write_page(card, _shown(pairs, card["shown"], {}), folder.path)
    # Last: with the card the evaluation is whole.
    write_card(card, folder.path)
    return card


def write_up(
    evaluation: SplitEvaluation,
    data_url: str,
    runner: Runner,
    *,
    chexbert_folder: str | Path | None = None,
    meteor: bool = False,
) -> dict[str, Any]:
    """Score the drafts of a checkpoint's evaluation, which kept them in a folder, and write the same files there, and pairs.jsonl.

    Raises
    ------
    SSACLError
        As `evaluate_pairs`, or the checkpoint cannot draw its evidence.
    """
    folder, answers = evaluation.folder, evaluation.predictions
    assert folder is not None, "evaluate_split was given no folder"
    chexbert = load_chexbert(chexbert_folder)
    lines = [
        json.dumps({"id": key, "prediction": report, "reference": reference})
        for key, report, reference in zip(answers.keys, answers.reports, answers.references, strict=True)
        if reference
    ]
    if not lines:
        card = make_card(evaluation)
        write_page(card, [], folder.path)
        write_card(card, folder.path)
        return card
    write_whole(folder.path / "pairs.jsonl", "".join(f"{line}\n" for line in lines).encode())
    pairs = check_pairs(folder.path / "pairs.jsonl")
    figures = report_figures(score_pairs(pairs, folder, chexbert), evaluation.identity["uncertain"], evaluation.identity["seed"])
    if meteor:
        figures["metrics"]["meteor"] = meteor_score(pairs.read())
    card = make_card(evaluation, figures)
    write_radeval(pairs, folder.path)
    write_page(card, _shown(pairs, card["shown"], _sheets(evaluation, data_url, runner, card["shown"])), folder.path)
    write_card(card, folder.path)
    return card


def _sheets(evaluation: SplitEvaluation, data_url: str, runner: Runner, shown: dict[str, Any]) -> dict[str, bytes]:
    """Evidence of the cases that are shown, drawn anew: maps of all drafts are not kept."""
    wanted = {identifier for kind in SHOWN_KINDS for identifier in shown[kind]}
    entries = [
        entry
        for entry in open_split(open_storage(data_url), evaluation.identity["data"]["split"], purpose="evaluation")
        if entry.key in wanted
    ]
    options = GenerationOptions.model_validate(evaluation.identity["generation"])
    return dict(zip((entry.key for entry in entries), runner.sheets(Work(tuple(entries), options)), strict=True))


def _shown(pairs: PairsFile, shown: dict[str, Any], sheets: dict[str, bytes]) -> list[ShownCase]:
    texts = shown_pairs(pairs, shown)
    return [
        ShownCase(kind, identifier, texts[identifier].prediction, texts[identifier].reference, sheets.get(identifier))
        for kind in SHOWN_KINDS
        for identifier in shown[kind]
    ]
