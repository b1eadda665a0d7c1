"""Time and memory of one training step on W ranks, as formulae; `benchmarks.scaling` feeds and calibrates them.

Letters: W ranks; P numbers in the model, U of them used by the stage, T trained; B rows of a micro batch, A = W x B; D width of the
leaves, E text width, M = 25 leaves; a micro batches a step. Volumes are bytes that one rank sends; weights and gradients are float32
(4 bytes), as in `ssacl.training.footprint`.

    all-reduce of n bytes on a ring      2 n (W - 1) / W
    reduce-scatter, or all-gather, to n  n (W - 1) / W
    ZeRO 0   all-reduce of 4T a step     ZeRO 1   reduce-scatter and all-gather of 4T a step
    ZeRO 2   a reduce-scatters of 4T and an all-gather of 4T a step
    ZeRO 3   a times: all-gather of 4U forward and again backward, reduce-scatter of 4T
    contrast per micro batch: all-gather of 4AE three times (images, texts, texts again for L_ac), all-reduce of 4AE twice in the backward
    pass, all-gather of 4AMD (leaves); grounding: regions and sentences as the contrast, all-gather and all-reduce each
    L_ac: 2 B A M^2 D operations forward; each chunk of its similarities is computed again and once more backward, so three times in all

Nothing is said to overlap. ZeRO 1 and 2 do not as we ask for them, and losses need what they gather; for ZeRO 3, whose gathers DeepSpeed
starts ahead, that is the worst case.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ssacl.anatomy import LEAVES
from ssacl.losses.published import _PAIRS_PER_CHUNK
from ssacl.training.footprint import rank_memory

_BYTES = 4
_LEAVES = len(LEAVES)
_LAC_PASSES, _LAC_TOUCHES = 3, 10
"""Times that L_ac's product is done; times that its similarities go through memory (product, norm, sums; forward, again, backward)."""
_CHUNK_TENSORS = 4
"""Similarities, their exponentials, gradients of both: what is held of one chunk of L_ac."""


@dataclass(frozen=True)
class Hardware:
    """What the formulae assume of a machine. Defaults: data sheets of the H100 SXM5 and of the 8-GPU machine built around it."""

    name: str = "H100 SXM5"
    peak_flops: float = 989e12
    """Dense bfloat16 (data sheet)."""
    mfu: float = 0.45
    """Share of it that a step's own work reaches (the goal for one GPU; assumed, not measured)."""
    memory_gib: float = 80.0
    memory_bytes_per_s: float = 3.35e12
    """HBM3 (data sheet)."""
    ranks_per_node: int = 8
    node_bytes_per_s: float = 450e9
    """NVLink 4, one direction (data sheet: 900 GB/s both)."""
    card_bytes_per_s: float = 50e9
    """One network card: 400 Gb/s (data sheet)."""
    cards_per_node: int = 8
    link_efficiency: float = 0.8
    """Share of a link's rate that a large collective reaches (assumed)."""
    node_hop_s: float = 3e-6
    network_hop_s: float = 10e-6
    """Latency of one hop inside a node, and between two (assumed)."""

    def bytes_per_s(self, world_size: int) -> float:
        """Rate at which one rank sends in a large collective: on a ring over all ranks, the slowest link decides."""
        rate = self.node_bytes_per_s
        if world_size > self.ranks_per_node:
            rate = min(rate, self.cards_per_node * self.card_bytes_per_s)
        return rate * self.link_efficiency

    def gather_latency_s(self, world_size: int) -> float:
        """Around a ring: W - 1 hops, of which one less than there are nodes cross the network."""
        nodes = math.ceil(world_size / self.ranks_per_node)
        return (nodes - 1) * self.network_hop_s + (world_size - nodes) * self.node_hop_s

    def sum_latency_s(self, world_size: int) -> float:
        """Up a tree and down again, inside the nodes and between them."""
        inside = min(world_size, self.ranks_per_node)
        return 2 * (math.log2(inside) * self.node_hop_s + math.log2(world_size / inside) * self.network_hop_s)


@dataclass(frozen=True)
class Workload:
    """One stage of a configuration, as the formulae see it."""

    preset: str
    stage: str
    num_parameters: int
    num_used: int
    """In the stage's passes: what ZeRO 3 has to gather."""
    num_trained: int
    zero_stage: int
    micro_batch_size: int
    accumulation_steps: int
    flops_per_image: float
    """Forward and backward, without what W adds; with what activation checkpointing computes again."""
    activation_bytes_per_image: float
    leaf_width: int
    text_width: int
    contrasts: bool = True
    """The stage compares rows across ranks."""
    grounds: bool = True
    """With region-text contrast over ranks."""
    sentences_per_report: float = 5.0
    regions_per_report: float = 8.0
    num_divisible: int = 0
    """In the language model, whose weights ZeRO 3 divides."""


@dataclass(frozen=True)
class Prediction:
    """One row: seconds of an optimizer step by cause, and bytes on a rank."""

    world_size: int
    compute_s: float
    consistency_s: float
    zero_s: float
    gather_s: float
    latency_s: float
    memory_bytes: float
    images: int

    @property
    def step_s(self) -> float:
        return self.compute_s + self.consistency_s + self.zero_s + self.gather_s + self.latency_s

    @property
    def images_per_s(self) -> float:
        return self.images / self.step_s

    @property
    def largest_cost(self) -> str:
        """What, beside the work itself, takes most of the step."""
        costs = {"ZeRO volume": self.zero_s, "gathered rows": self.gather_s, "L_ac": self.consistency_s, "latency": self.latency_s}
        name = max(costs, key=lambda cost: costs[cost])
        return name if costs[name] > 0 else "-"


def ring(num_bytes: float, world_size: int) -> float:
    """Bytes that a rank sends in an all-gather to, or a reduce-scatter of, `num_bytes`; an all-reduce is both."""
    return num_bytes * (world_size - 1) / world_size


def zero_bytes(work: Workload, world_size: int) -> float:
    """Of weights and gradients, an optimizer step."""
    trained, used = ring(_BYTES * work.num_trained, world_size), ring(_BYTES * work.num_used, world_size)
    if work.zero_stage <= 1:
        return 2 * trained
    if work.zero_stage == 2:
        return (work.accumulation_steps + 1) * trained
    return work.accumulation_steps * (2 * used + trained)


def gather_bytes(work: Workload, world_size: int) -> float:
    """Of rows for losses across ranks, an optimizer step."""
    if not work.contrasts:
        return 0.0
    rows = work.micro_batch_size * world_size
    # A gather with gradient is an all-gather forward and an all-reduce backward: three rings.
    with_gradient = 2 * work.text_width
    if work.grounds:
        with_gradient += (work.sentences_per_report + work.regions_per_report) * work.text_width
    plain = work.text_width + _LEAVES * work.leaf_width
    return work.accumulation_steps * ring(_BYTES * rows * (3 * with_gradient + plain), world_size)


def latency_s(work: Workload, hardware: Hardware, world_size: int) -> float:
    """What an optimizer step's messages wait for however small they are."""
    gathers, sums = (6, 4) if work.contrasts else (0, 1)
    if work.contrasts and work.grounds:
        # Counts and rows of four ragged gathers, the mean layout; their gradients and two shares.
        gathers, sums = gathers + 9, sums + 5
    # The optimizer's own: gradients apart, weights together.
    gathers = work.accumulation_steps * gathers + 2
    return gathers * hardware.gather_latency_s(world_size) + work.accumulation_steps * sums * hardware.sum_latency_s(world_size)


def consistency_flops(rows: int, world_size: int, leaf_width: int) -> float:
    """Of L_ac, one micro batch, forward."""
    return 2.0 * rows * (rows * world_size) * _LEAVES**2 * leaf_width


def consistency_chunk_bytes(rows: int, world_size: int) -> float:
    """Most similarities of L_ac that are held at once: all pairs, or one chunk of them."""
    return float(_BYTES * min(rows * rows * world_size * _LEAVES**2, _PAIRS_PER_CHUNK))


def memory_bytes(work: Workload, world_size: int) -> float:
    """On one rank while it computes: what ZeRO leaves, 16-bit copies of the weights, activations, gathered rows, one chunk of L_ac."""
    between = rank_memory(work.num_parameters, work.num_trained, work.zero_stage, world_size, num_divisible=work.num_divisible).device
    # Autocast keeps a 16-bit copy of the weights in use; under ZeRO 3 what is gathered at a time is a small part.
    copies = 2.0 * work.num_used / (world_size if work.zero_stage == 3 else 1)
    held = 0.0
    if work.contrasts:
        rows = work.micro_batch_size * world_size
        held = _BYTES * rows * (_LEAVES * work.leaf_width + 2 * 3 * work.text_width)
        # Four similarities [B, A] of L_cl with their gradients, the text's of L_ac.
        held += _BYTES * work.micro_batch_size * rows * 9
        held += _CHUNK_TENSORS * consistency_chunk_bytes(work.micro_batch_size, world_size)
    return between + copies + work.micro_batch_size * work.activation_bytes_per_image + held


def predict(work: Workload, hardware: Hardware, world_size: int) -> Prediction:
    """One optimizer step on `world_size` ranks, each with the preset's micro batch."""
    rate, rows = hardware.bytes_per_s(world_size), work.micro_batch_size
    consistency = 0.0
    if work.contrasts:
        flops = _LAC_PASSES * consistency_flops(rows, world_size, work.leaf_width)
        touched = _LAC_TOUCHES * _BYTES * rows * rows * world_size * _LEAVES**2
        consistency = work.accumulation_steps * (flops / (hardware.peak_flops * hardware.mfu) + touched / hardware.memory_bytes_per_s)
    images = rows * work.accumulation_steps
    return Prediction(
        world_size=world_size,
        compute_s=images * work.flops_per_image / (hardware.peak_flops * hardware.mfu),
        consistency_s=consistency,
        zero_s=zero_bytes(work, world_size) / rate,
        gather_s=gather_bytes(work, world_size) / rate,
        latency_s=latency_s(work, hardware, world_size),
        memory_bytes=memory_bytes(work, world_size),
        images=images * world_size,
    )
