"""How text is searched for: options of a request, and the error of its time limit."""

from __future__ import annotations

import time
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ssacl.errors import GenerationError


class TimeLimitError(GenerationError):
    """The time limit of `GenerationOptions` was reached before the report was finished."""


class GenerationOptions(BaseModel):
    """How text is searched for. The defaults are ours; `GenerationOptions.release()` gives the release's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_beams: int = Field(default=3, ge=1, le=16)
    repetition_penalty: float = Field(default=1.0, ge=1.0, le=10.0, description="Above 1, tokens already written become less likely.")
    length_penalty: float = Field(default=1.0, ge=-10.0, le=10.0, description="Exponent of the length that beam scores are divided by.")
    early_stopping: bool | Literal["never"] = Field(
        default=True,
        description="true: end with as many finished beams as there are beams; false: when no open one is likely to do better; never: when "
        "none can.",
    )
    max_new_tokens: int = Field(default=120, ge=1, le=1024)
    min_new_tokens: int = Field(default=1, ge=0, le=1024)
    entities: bool = Field(default=True, description="The prompt names the findings that the head sees; without, the film alone speaks.")
    deterministic: bool = Field(default=False, description="Only deterministic kernels; slower on a GPU.")
    time_limit_s: float | None = Field(default=None, gt=0, description="For one call of `generate`; reaching it is an error.")
    max_batch_size: int = Field(default=8, ge=1, description="Images encoded and decoded together.")

    @classmethod
    def release(cls) -> GenerationOptions:
        """Settings of the published release."""
        return cls(num_beams=3, repetition_penalty=2.0, length_penalty=2.0, max_new_tokens=100, min_new_tokens=80)


def check_deadline(deadline: float | None) -> None:
    """Raise the TimeLimitError of a `time.monotonic()` value that has passed: a report is never cut in the middle of a sentence."""
    if deadline is not None and time.monotonic() > deadline:
        raise TimeLimitError(
            "The time limit was reached before the report was finished: raise time_limit_s, or lower num_beams or max_new_tokens."
        )
