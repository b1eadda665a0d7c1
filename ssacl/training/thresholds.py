"""Per-finding probability thresholds, chosen on validation by F1."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ssacl.anatomy import FINDINGS, FindingStatus
from ssacl.data.loader import StreamingLoader
from ssacl.models.ssacl import SSACL
from ssacl.training.resume import gather_objects

FALLBACK_THRESHOLD = 0.5
MIN_POSITIVES = 3
"""With fewer positive validation studies a chosen threshold would be chance."""


def choose_thresholds(probabilities: NDArray[np.float64], status: NDArray[np.int64], uncertain: str) -> dict[str, float]:
    """The threshold of the highest F1 for each finding; the middle of the gap to the next lower probability.

    Parameters
    ----------
    probabilities : [n, 14] in 0..1.
    status : [n, 14] FindingStatus; unmentioned counts as absent.
    uncertain : "present", "absent" or "ignore" (`DataConfig.uncertain`).
    """
    chosen = {}
    for index, finding in enumerate(FINDINGS):
        column = status[:, index]
        kept = np.ones(len(column), dtype=bool) if uncertain != "ignore" else column != FindingStatus.UNCERTAIN
        positive = column == FindingStatus.PRESENT
        if uncertain == "present":
            positive |= column == FindingStatus.UNCERTAIN
        chosen[finding] = best_f1_threshold(probabilities[kept, index], positive[kept])
    return chosen


def best_f1_threshold(probability: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """Threshold t of the best F1 of `probability >= t`; `FALLBACK_THRESHOLD` with fewer than `MIN_POSITIVES` positives.

    Parameters
    ----------
    probability : [n]; positive : [n] bool.
    """
    if positive.sum() < MIN_POSITIVES:
        return FALLBACK_THRESHOLD
    order = np.argsort(-probability, kind="stable")
    ranked, hits = probability[order], np.cumsum(positive[order])
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + positive.sum())
    # Equal probabilities fall on the same side: only the last of a run is a possible cut.
    cuttable = np.append(ranked[:-1] > ranked[1:], True)
    best = int(np.argmax(np.where(cuttable, f1, -1.0)))
    below = ranked[best + 1] if best + 1 < len(ranked) else 0.0
    return float((ranked[best] + below) / 2)


@torch.no_grad()
def validation_thresholds(model: SSACL, loader: StreamingLoader, uncertain: str, device: torch.device) -> dict[str, float]:
    """`choose_thresholds` over one epoch of all ranks' `loader`s; none where no film has labels. Called by all ranks."""
    batches = iter(loader)
    model.eval()
    rows: dict[str, tuple[Any, Any]] = {}
    for _ in range(loader.steps_per_epoch):
        batch = next(batches)
        probability = model.findings_read(model.encode(batch.image.to(device))).image_BF.sigmoid().cpu().double().numpy()
        for row, key in enumerate(batch.keys):
            if bool(batch.has_labels[row]):
                rows[key] = (probability[row], batch.labels[row].numpy())
    merged = {key: value for part in gather_objects(rows) for key, value in part.items()}
    if not merged:
        return {}
    ordered = [merged[key] for key in sorted(merged)]
    return choose_thresholds(np.stack([p for p, _ in ordered]), np.stack([s for _, s in ordered]), uncertain)
