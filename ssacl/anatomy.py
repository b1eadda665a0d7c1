"""The anatomy graph, the findings, and which anatomy a finding belongs to: the only place where these names stand.

Source: SS-ACL (arXiv 2509.25963), figures 2 and 3; CheXpert (arXiv 1901.07031) for the finding names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum

from ssacl.errors import ConfigError

_LUNG_PARTS = (
    "upper lung zone",
    "mid lung zone",
    "lower lung zone",
    "hilar structures",
    "apical zone",
    "costophrenic angle",
    "hemidiaphragm",
)

CHILDREN: dict[str, tuple[str, ...]] = {
    "chest": ("lungs", "mediastinum", "skeletal structures", "abdomen"),
    "lungs": ("right lung", "left lung"),
    "mediastinum": (
        "trachea",
        "upper mediastinum",
        "aortic arch",
        "superior vena cava",
        "cardiac silhouette",
        "carina",
    ),
    "skeletal structures": ("spine", "right clavicle", "left clavicle"),
    "right lung": tuple(f"right {part}" for part in _LUNG_PARTS),
    "left lung": tuple(f"left {part}" for part in _LUNG_PARTS),
    "cardiac silhouette": ("right atrium", "cavoatrial junction"),
}
"""Inner node -> its children, in the order in which they enter the anatomy reconstruction."""

NODES: tuple[str, ...] = (
    "chest",
    *CHILDREN["chest"],
    *CHILDREN["lungs"],
    *CHILDREN["right lung"],
    *CHILDREN["left lung"],
    *CHILDREN["mediastinum"],
    *CHILDREN["cardiac silhouette"],
    *CHILDREN["skeletal structures"],
)
"""The 32 nodes in the order of the released checkpoint's queries."""

INNER_NODES: tuple[str, ...] = tuple(node for node in NODES if node in CHILDREN)
"""The 7 nodes with children, parents before children."""


def leaves_below(node: str) -> tuple[str, ...]:
    """The leaves under `node` (itself, when it is one), depth first.

    Raises
    ------
    ConfigError
        `node` is not one of `NODES`.
    """
    if node not in NODE_INDEX:
        raise ConfigError(f"'{node}' is not an anatomy node; expected one of: {', '.join(NODES)}.")
    if node not in CHILDREN:
        return (node,)
    return tuple(leaf for child in CHILDREN[node] for leaf in leaves_below(child))


NODE_INDEX: dict[str, int] = {node: index for index, node in enumerate(NODES)}
LEAVES: tuple[str, ...] = leaves_below("chest")
"""The 25 leaves, depth first: the order of the released checkpoint's leaf queries."""
LEAF_INDEX: dict[str, int] = {leaf: index for index, leaf in enumerate(LEAVES)}
PARENT: dict[str, str] = {child: parent for parent, children in CHILDREN.items() for child in children}

FINDINGS: tuple[str, ...] = (
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
    "No Finding",
)
"""The 14 CheXpert findings; "No Finding" last."""
FINDING_INDEX: dict[str, int] = {finding: index for index, finding in enumerate(FINDINGS)}
NO_FINDING = "No Finding"

FINDING_GROUPS: dict[str, tuple[str, ...]] = {
    "Enlarged Cardiomediastinum": ("mediastinum",),
    "Cardiomegaly": ("mediastinum",),
    "Lung Opacity": ("lungs",),
    "Lung Lesion": ("lungs",),
    "Edema": ("mediastinum", "lungs"),
    "Consolidation": ("lungs",),
    "Pneumonia": ("lungs",),
    "Atelectasis": ("lungs",),
    "Pneumothorax": ("lungs", "abdomen"),
    "Pleural Effusion": ("lungs", "abdomen"),
    "Pleural Other": ("lungs",),
    "Fracture": ("skeletal structures", "abdomen"),
    "Support Devices": ("mediastinum", "skeletal structures", "abdomen"),
}
"""Finding -> anatomy groups (the paper's figure 3). "No Finding" has none: every leaf is kept."""


class FindingStatus(IntEnum):
    """What a report says about a finding. Stored as these integers in shards and batches."""

    ABSENT = 0
    PRESENT = 1
    UNCERTAIN = 2
    UNMENTIONED = 3


def anatomy_groups(findings: Iterable[str]) -> tuple[str, ...]:
    """Anatomy groups of the present `findings`, in graph order; empty for none or "No Finding" alone."""
    wanted = {group for finding in findings for group in FINDING_GROUPS.get(finding, ())}
    return tuple(node for node in NODES if node in wanted)


def leaf_mask(groups: Sequence[str]) -> list[bool]:
    """One flag per leaf (`LEAVES` order): is it below one of `groups`. No groups keeps every leaf."""
    if not groups:
        return [True] * len(LEAVES)
    kept = {leaf for group in groups for leaf in leaves_below(group)}
    return [leaf in kept for leaf in LEAVES]


def mirrored(name: str) -> str:
    """`name` with right and left swapped: "right lung" -> "left lung"; names without a side are unchanged."""
    first, _, rest = name.partition(" ")
    swapped = {"right": "left", "left": "right"}.get(first)
    # The right atrium is a chamber, not a side of the film: it has no left twin in the graph.
    if swapped is None or f"{swapped} {rest}" not in NODE_INDEX:
        return name
    return f"{swapped} {rest}"


TWIN_LEAVES: tuple[int, ...] = tuple(LEAF_INDEX[mirrored(leaf)] for leaf in LEAVES)
"""Per leaf, the index of its twin on the other side; its own where it has none."""
TWIN_NODES: tuple[int, ...] = tuple(NODE_INDEX[mirrored(node)] for node in NODES)
"""The same for nodes."""
SIDES = ("right", "left")
SIDED_LEAVES: dict[str, tuple[int, ...]] = {
    side: tuple(index for index, leaf in enumerate(LEAVES) if leaf.startswith(f"{side} ") and TWIN_LEAVES[index] != index) for side in SIDES
}
"""Side -> indices of the leaves that lie on it and have a twin on the other."""


def with_side(finding: str, right: bool, left: bool) -> str:
    """The finding's name as an entity of the prompt: "left Pleural Effusion" where it is on one side alone, else the bare name."""
    return f"{'right' if right else 'left'} {finding}" if right != left else finding
