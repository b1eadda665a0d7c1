"""Memory that one rank holds between two steps, by ZeRO stage: pure arithmetic, no tensors.

The engines keep weights in float32 (`engine.precision` is the arithmetic of matrix products), so a number costs 4 bytes as a weight, 4 as a
gradient and 8 as AdamW's two moments. Under ZeRO the optimizer works on a copy of the trained weights, 4 more. With P numbers in the
model, L of them in the language model, T trained, and W ranks:

    stage 0   4P + 4T + 8T                          everything whole on every rank
    stage 1   4P + 4T + 12T / W                     moments and their weights divided
    stage 2   4P + 4T / W + 12T / W                 gradients too
    stage 3   4P / W + 4(P - L) + 4T / W + 12T / W  weights too; outside the language model a whole copy stays

`engine.offload` cpu moves the last term (ZeRO 1 to 3) to the machine's memory. Left out: activations, buckets of communication, and the
16-bit copies that autocast makes for one forward pass; the first steps' memory, in the live line, has them.
"""

from __future__ import annotations

from dataclasses import dataclass

_WEIGHT, _GRADIENT, _MOMENTS, _COPY = 4, 4, 8, 4
"""Bytes a number."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank; `host` is what offloading put into the machine's memory."""

    weights: float
    gradients: float
    optimizer: float
    host: float

    @property
    def device(self) -> float:
        return self.weights + self.gradients + self.optimizer


def rank_memory(
    num_parameters: int, num_trained: int, zero_stage: int, world_size: int, offload: bool = False, num_divisible: int = 0
) -> RankMemory:
    """The formula above.

    Parameters
    ----------
    num_parameters, num_trained : numbers (not tensors) in the model, and those that the optimizer changes.
    zero_stage : 0 to 3.
    offload : optimizer states to the machine's memory; without effect in stage 0.
    num_divisible : numbers in the language model, whose weights stage 3 divides.
    """
    weights = float(_WEIGHT * num_parameters)
    if zero_stage >= 3:
        weights = _WEIGHT * (num_parameters / world_size + num_parameters - num_divisible)
    gradients = _GRADIENT * num_trained / (world_size if zero_stage >= 2 else 1)
    optimizer = (_MOMENTS + _COPY) * num_trained / world_size if zero_stage >= 1 else float(_MOMENTS * num_trained)
    if offload and zero_stage >= 1:
        return RankMemory(weights, gradients, 0.0, optimizer)
    return RankMemory(weights, gradients, optimizer, 0.0)
