"""Do the maps lie on the anatomy? Pointing, IoU, centroid correlation and landmark error per node, beside baselines.

Shape letters: n cases, K nodes (32 unless told), g grid side, S mask side in pixels. Maps and masks cover the same square. Masks are
truth: only evaluation may hold them. A mask without a pixel (the anatomy is out of the picture, or was not drawn) leaves its case out
of that node's scores; a node without any case has the score None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssacl.anatomy import INNER_NODES, LEAVES, NODE_INDEX, NODES, mirrored
from ssacl.errors import DataError
from ssacl.inference.maps import SMOOTHING_CELLS
from ssacl.scores.map_measures import Maps, Masks, Measured, Threshold, iou_at, measure

RELATIVE_GRID: tuple[float, ...] = tuple(i / 20 for i in range(1, 20))
AREA_GRID: tuple[float, ...] = (0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.11, 0.15, 0.2, 0.27, 0.35, 0.45, 0.6)


CUTS = (*(Threshold("relative", value) for value in RELATIVE_GRID), *(Threshold("area", value) for value in AREA_GRID))
"""Where a map may be cut; the best one is chosen on validation."""


def node_group(node: str) -> str:
    """Nodes that share one IoU threshold: right and left twins; every other node has its own."""
    return node.partition(" ")[2] if mirrored(node) != node else node


@dataclass(frozen=True)
class NodeScores:
    """One anatomy node over the cases that show it. None: no case, or (correlation) fewer than 3 cases or no variation."""

    num_cases: int
    pointing: float | None
    """Share of cases whose smoothed map's maximum is in the mask or within 16 px of it at 224 px."""
    iou: float | None
    """Mean intersection over union at the threshold chosen on validation."""
    correlation_x: float | None
    """Over cases, of the map's centroid with the mask's; a map that never moves has none, and counts as 0 in means."""
    correlation_y: float | None
    landmark: float | None
    """Mean distance of the two centroids, half-widths of the square."""
    threshold: Threshold


@dataclass(frozen=True)
class GroundingScores:
    """Scores per node, and means over the leaves, over the inner nodes and over all nodes."""

    num_cases: int
    nodes: dict[str, NodeScores]

    def mean(self, field: str, nodes: Sequence[str] = NODES) -> float | None:
        """Unweighted mean of a `NodeScores` field over those of `nodes` that have cases; None when there is none.

        A correlation that does not exist because the map never moves counts as 0.
        """
        seen = [self.nodes[node] for node in nodes if node in self.nodes and self.nodes[node].num_cases]
        values = [getattr(scores, field) for scores in seen]
        if field.startswith("correlation"):
            values = [0.0 if value is None else value for value in values]
        values = [value for value in values if value is not None]
        return float(np.mean(values)) if values else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON tree: `means` (all, leaves, inner nodes), `right_lung` and `left_lung` pointing and IoU, `nodes`."""
        fields = ("pointing", "iou", "correlation_x", "correlation_y", "landmark")
        groups: dict[str, Sequence[str]] = {"all": NODES, "leaves": LEAVES, "inner_nodes": INNER_NODES}
        return {
            "num_cases": self.num_cases,
            "means": {name: {field: _rounded(self.mean(field, nodes)) for field in fields} for name, nodes in groups.items()},
            "nodes": {node: {key: _rounded(value) for key, value in asdict(scores).items()} for node, scores in self.nodes.items()},
        }


def grounding_scores(
    maps: Maps,
    masks: Masks,
    threshold: Mapping[str, Threshold],
    *,
    nodes: Sequence[str] = NODES,
    sigma_cells: float = SMOOTHING_CELLS,
) -> GroundingScores:
    """Score maps against true masks.

    Parameters
    ----------
    maps
        [n, K, g, g] non-negative attention, not smoothed.
    masks
        [n, K, S, S] bool.
    threshold
        Per node, from `choose_threshold` on validation cases with the same kind of map.
    nodes
        The K node names.
    sigma_cells
        Smoothing before maximum and threshold; 0 for maps that need none (the average mask).

    Raises
    ------
    DataError
        Shapes do not fit, there is no case, a map is not finite or negative, or a node has no threshold.
    """
    _check(maps, masks, nodes)
    missing = [node for node in nodes if node not in threshold]
    if missing:
        raise DataError(f"No threshold for {len(missing)} nodes (first: '{missing[0]}'); choose them on validation cases of all nodes.")
    measured = measure(maps, masks, sigma_cells)
    ious = np.stack([iou_at(measured, column, threshold[node]) for column, node in enumerate(nodes)], axis=1)
    by_node = {node: _node_scores(measured, ious, column, threshold[node]) for column, node in enumerate(nodes)}
    return GroundingScores(num_cases=len(maps), nodes=by_node)


def choose_threshold(
    maps: Maps, masks: Masks, *, nodes: Sequence[str] = NODES, sigma_cells: float = SMOOTHING_CELLS
) -> dict[str, Threshold]:
    """Per node group the cut with the best mean IoU over validation cases; see `grounding_scores` for shapes and errors.

    A group that no case shows gets half the maximum.
    """
    _check(maps, masks, nodes)
    measured = measure(maps, masks, sigma_cells)
    columns: dict[str, list[int]] = {}
    for column, node in enumerate(nodes):
        columns.setdefault(node_group(node), []).append(column)
    chosen: dict[str, Threshold] = {}
    for group in columns.values():
        best, best_iou = Threshold("relative", 0.5), -1.0
        shown = np.concatenate([measured.shown[:, column] for column in group])
        for candidate in CUTS if shown.any() else ():
            iou = float(np.concatenate([iou_at(measured, column, candidate) for column in group])[shown].mean())
            if iou > best_iou:
                best, best_iou = candidate, iou
        chosen.update({nodes[column]: best for column in group})
    return chosen


def average_mask_maps(masks: Masks, num_cases: int) -> NDArray[np.float32]:
    """Baseline [num_cases, K, S, S]: the mean true mask of other cases, the same for every case. A strong one when poses vary little.

    A node that no case shows gets a uniform map.
    """
    mean = masks.mean(axis=0, dtype=np.float64).astype(np.float32)
    mean[~mean.any(axis=(1, 2))] = 1.0
    return np.broadcast_to(mean, (num_cases, *mean.shape))


def centre_maps(num_cases: int, grid: int, num_nodes: int = len(NODES)) -> NDArray[np.float32]:
    """Baseline [num_cases, K, g, g]: a Gaussian of half a half-width in the middle of the picture, for every node."""
    ticks = (np.arange(grid) * 2 + 1) / grid - 1
    bell = np.exp(-(ticks[:, None] ** 2 + ticks[None] ** 2) / (2 * 0.5**2)).astype(np.float32)
    return np.broadcast_to(bell, (num_cases, num_nodes, grid, grid))


def random_maps(num_cases: int, grid: int, seed: int = 0, num_nodes: int = len(NODES)) -> NDArray[np.float32]:
    """Baseline [num_cases, K, g, g]: independent uniform noise."""
    return np.random.default_rng(seed).random((num_cases, num_nodes, grid, grid), dtype=np.float32)


def scores_with_baselines(
    maps: Maps,
    masks: Masks,
    validation_maps: Maps,
    validation_masks: Masks,
    *,
    nodes: Sequence[str] = NODES,
    sigma_cells: float = SMOOTHING_CELLS,
    seed: int = 0,
) -> dict[str, GroundingScores]:
    """Scores of `model`, `average_mask` (of the validation cases), `centre` and `random`, each cut at its own validation threshold.

    `sigma_cells` smooths the model's maps: 0 for `DraftReport.anatomy_maps`, which are smooth already. See `grounding_scores`.
    """
    _check(maps, masks, nodes)
    grid, num_cases, num_fit, num_nodes = maps.shape[-1], len(maps), len(validation_maps), len(nodes)
    pairs: dict[str, tuple[Maps, Maps, float]] = {
        "model": (validation_maps, maps, sigma_cells),
        "average_mask": (average_mask_maps(validation_masks, num_fit), average_mask_maps(validation_masks, num_cases), 0.0),
        "centre": (centre_maps(num_fit, grid, num_nodes), centre_maps(num_cases, grid, num_nodes), 0.0),
        "random": (random_maps(num_fit, grid, seed, num_nodes), random_maps(num_cases, grid, seed + 1, num_nodes), SMOOTHING_CELLS),
    }
    scores = {}
    for name, (fit_maps, test_maps, sigma) in pairs.items():
        threshold = choose_threshold(fit_maps, validation_masks, nodes=nodes, sigma_cells=sigma)
        scores[name] = grounding_scores(test_maps, masks, threshold, nodes=nodes, sigma_cells=sigma)
    return scores


def summary_rows(scores: Mapping[str, GroundingScores]) -> list[dict[str, Any]]:
    """A table: one row per system with pointing and IoU of the lungs and of the leaves, and centroid correlations."""
    rows = []
    for name, each in scores.items():
        row: dict[str, Any] = {"maps": name}
        for label, nodes in (("right_lung", ["right lung"]), ("left_lung", ["left lung"]), ("leaves", LEAVES), ("all", NODES)):
            row[f"{label}_pointing"] = _rounded(each.mean("pointing", nodes))
            row[f"{label}_iou"] = _rounded(each.mean("iou", nodes))
        row["correlation_x"] = _rounded(each.mean("correlation_x", LEAVES))
        row["correlation_y"] = _rounded(each.mean("correlation_y", LEAVES))
        rows.append(row)
    return rows


def _node_scores(measured: Measured, ious: NDArray[np.float64], column: int, threshold: Threshold) -> NodeScores:
    shown = measured.shown[:, column]
    if not shown.any():
        return NodeScores(0, None, None, None, None, None, threshold)
    found, truth = measured.map_centroid[shown, column], measured.mask_centroid[shown, column]
    return NodeScores(
        num_cases=int(shown.sum()),
        pointing=float(measured.hit[shown, column].mean()),
        iou=float(ious[shown, column].mean()),
        correlation_x=_correlation(found[:, 0], truth[:, 0]),
        correlation_y=_correlation(found[:, 1], truth[:, 1]),
        landmark=float(np.linalg.norm(found - truth, axis=1).mean()),
        threshold=threshold,
    )


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    if len(a) < 3 or a.std() < 1e-6 or b.std() < 1e-6:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _check(maps: Maps, masks: Masks, nodes: Sequence[str]) -> None:
    unknown = [node for node in nodes if node not in NODE_INDEX]
    if unknown:
        raise DataError(f"'{unknown[0]}' is not an anatomy node; names are in ssacl.anatomy.NODES.")
    expected = (len(maps), len(nodes))
    if maps.ndim != 4 or maps.shape[:2] != expected or maps.shape[2] != maps.shape[3]:
        raise DataError(f"Maps have shape {maps.shape}; expected [cases, {len(nodes)} nodes, grid, grid].")
    if masks.ndim != 4 or masks.shape[:2] != expected or masks.shape[2] != masks.shape[3] or masks.dtype != np.bool_:
        raise DataError(f"Masks are {masks.dtype} of shape {masks.shape}; expected bool [{len(maps)}, {len(nodes)}, side, side].")
    if len(maps) == 0:
        raise DataError("There is no case to score; check that the split holds cases with truth.")
    if not np.isfinite(maps).all() or maps.min() < 0:
        raise DataError("Maps hold values that are not finite or negative: the checkpoint is damaged, or these are not attention maps.")
