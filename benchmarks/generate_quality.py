"""What fewer bits cost on a trained model: token agreement with fp32, and findings F1 of reports and head."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from benchmarks.generation_options import films_of
from ssacl.inference.generator import ReportGenerator
from ssacl.inference.options import GenerationOptions
from ssacl.inference.precision import Precision
from ssacl.inference.report import DraftReport
from ssacl.scores.clinical import report_f1
from ssacl.training.checkpoint import load_model_folder, local_folder

_BATCH = 8


def precision_quality(checkpoint: str, data_url: str, limit: int, precisions: Sequence[Precision]) -> dict[str, Any]:
    """Figures of each precision on the first films of the validation split, with the default search.

    Raises
    ------
    SSACLError
        The checkpoint, the data set or a film cannot be read.
    """
    with local_folder(checkpoint) as folder:
        return _figures(folder, data_url, limit, precisions)


def _figures(folder: Path, data_url: str, limit: int, precisions: Sequence[Precision]) -> dict[str, Any]:
    config = load_model_folder(folder).config
    pictures, references = films_of(data_url, config, limit)
    options = GenerationOptions(max_batch_size=_BATCH)
    figures: dict[str, Any] = {}
    exact: list[DraftReport] = []
    for precision in precisions:
        generator = ReportGenerator.load(folder, precision=precision)
        started = time.perf_counter()
        drafts = generator.generate(pictures, options)
        seconds = time.perf_counter() - started
        exact = exact or drafts
        pairs = list(zip(drafts, exact, strict=True))
        figures[precision] = {
            "findings_f1_micro_14": round(
                float(report_f1([draft.text for draft in drafts], references, config.data.uncertain).micro["14"].f1 or 0.0), 4
            ),
            "identical_reports": round(statistics.mean(own.text == other.text for own, other in pairs), 4),
            "word_agreement": round(
                statistics.mean(SequenceMatcher(None, own.text.split(), other.text.split()).ratio() for own, other in pairs), 4
            ),
            "same_findings_of_head": round(
                statistics.mean(
                    one.present == two.present for own, other in pairs for one, two in zip(own.findings, other.findings, strict=True)
                ),
                4,
            ),
            "reports_per_s": round(len(pictures) / seconds, 3),
        }
    return {"films": len(pictures), "split": "val", "rows": figures}
