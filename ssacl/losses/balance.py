"""How the losses become one number: fixed weights, or weights learned by homoscedastic uncertainty (Kendall et al., arXiv 1705.07115)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

BALANCED = ("image_reconstruction", "global_contrastive", "language_model", "anatomy_reconstruction", "anatomical_consistency")
"""The losses whose weights may be learned: the published five."""


class Balance(nn.Module):
    """Weighted total of losses.

    With `learned`, each of the five published losses L of weight w counts w * (exp(-s) L + s), with a learned s that starts at 0.
    """

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(len(BALANCED))) if learned else None

    def forward(self, losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
        """Sum of `losses`, each times its weight, in float32. Every parameter of this module takes part, whatever the losses are."""
        terms = {name: weights[name] * value.float() for name, value in losses.items()}
        if self.log_variance is None:
            return torch.stack(list(terms.values())).sum()
        for index, name in enumerate(BALANCED):
            log_variance = self.log_variance[index].float()
            if name in terms:
                terms[name] = (-log_variance).exp() * terms[name] + weights[name] * log_variance
            else:
                terms[name] = 0.0 * log_variance
        return torch.stack(list(terms.values())).sum()
