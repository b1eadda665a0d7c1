"""`Losses`: what one forward pass returns, with what was weighted by what."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """Scalar losses of one pass on one rank; their mean over ranks is the global loss. A loss that the stage does not compute is None."""

    total: Tensor
    image_reconstruction: Tensor | None = None
    global_contrastive: Tensor | None = None
    language_model: Tensor | None = None
    anatomy_reconstruction: Tensor | None = None
    anatomical_consistency: Tensor | None = None
    findings: Tensor | None = None
    grounding: dict[str, Tensor] = field(default_factory=dict)
    """Terms of METHOD section 8 by the names of their weights, unweighted."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each loss in `total`, by its name in `named`; the ramp is included."""

    def named(self) -> dict[str, Tensor]:
        """Every loss that was computed, by name; grounding terms as "grounding/NAME"."""
        names = (
            "image_reconstruction",
            "global_contrastive",
            "language_model",
            "anatomy_reconstruction",
            "anatomical_consistency",
            "findings",
        )
        own = {name: value for name in names if (value := getattr(self, name)) is not None}
        return {**own, **{f"grounding/{name}": value for name, value in self.grounding.items()}}
