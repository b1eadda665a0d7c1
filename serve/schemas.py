"""What the endpoint takes and gives: settings, response models, RFC 9457 problems."""

from __future__ import annotations

import os
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ssacl.errors import ConfigError
from ssacl.inference.generator import GenerationOptions

PROBLEM_TYPE = "application/problem+json"


class ServeSettings(BaseModel):
    """Everything that shapes the endpoint; unknown keys fail."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint_url: str = Field(description="Model folder, or s3:// prefix of one.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="0 takes a free one.")
    min_replicas: int = Field(1, ge=1, description="Model replicas kept when idle.")
    max_replicas: int = Field(1, ge=1, description="Model replicas under load.")
    num_ingress_replicas: int = Field(1, ge=1, description="Replicas that read pictures and answer.")
    cpus_per_replica: float = Field(1.0, ge=0, description="Ray CPUs reserved by a model replica.")
    gpus_per_replica: float = Field(0.0, ge=0, description="Ray GPUs reserved by a model replica; more than 0 runs it on CUDA.")
    num_threads: int = Field(
        default_factory=lambda: max(1, (os.cpu_count() or 2) // 2), ge=1, description="Torch threads of a model replica."
    )
    max_batch_size: int = Field(4, ge=1, description="Pictures that a model replica reads at once.")
    batch_wait_s: float = Field(0.02, ge=0, description="Longest wait for a batch to fill.")
    max_queued_requests: int = Field(64, ge=1, description="Requests that wait for a model replica; beyond it 503.")
    max_upload_bytes: int = Field(64 * 2**20, ge=1024, description="Longest request body.")
    max_files: int = Field(8, ge=1, description="Most images in one request.")
    request_timeout_s: float = Field(180.0, gt=0, description="Longest time from request to answer.")
    generation: GenerationOptions = GenerationOptions()

    @classmethod
    def parse(cls, tree: ServeSettings | dict[str, Any]) -> ServeSettings:
        """Settings from a plain tree (a Serve config file's args).

        Raises
        ------
        ConfigError
            A key is unknown or a value is out of range.
        """
        if isinstance(tree, ServeSettings):
            return tree
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError("; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())) from error


class BoxModel(BaseModel):
    """Original pixels, x right, y down, half-open."""

    x0: float
    y0: float
    x1: float
    y1: float


class FindingModel(BaseModel):
    name: str
    probability: float = Field(ge=0, le=1)
    threshold: float
    present: bool


class SentenceModel(BaseModel):
    text: str
    anatomy: list[str] = Field(description="Anatomy nodes that the sentence speaks of; empty: the whole chest.")
    finding: str | None
    status: str = Field(description="present, absent, uncertain or unmentioned.")
    confidence: float = Field(ge=0, le=1, description="Mean token probability of the language model.")
    box: BoxModel | None
    evidence: list[list[float]] | None = Field(None, description="Map over map_frame, sums to 1; left out with maps=false.")


class UnusedImage(BaseModel):
    index: int = Field(description="Place of the image in the request, from 0.")
    reason: str = Field(description='"another" (a different image was read), or why this one was refused.')
    detail: str


class ReportResponse(BaseModel):
    """One draft report. Preliminary and unverified, always."""

    request_id: str
    image_index: int = Field(description="Which image of the request was read.")
    unused: list[UnusedImage]
    status: str = "preliminary"
    disclaimer: str
    text: str
    sentences: list[SentenceModel]
    findings: list[FindingModel]
    anatomy_groups: list[str]
    anatomy_maps: list[list[list[float]]] | None = Field(None, description="One map per anatomy node; left out with maps=false.")
    map_frame: BoxModel = Field(description="Original pixels that a map's square covers; beyond the image where it was padded.")
    image_width_px: int
    image_height_px: int
    image_ref: str = Field(description="Content hash of the picture.")
    model_version: str
    provenance: dict[str, Any] = {}


class ModelsResponse(BaseModel):
    models: list[dict[str, Any]]


class HealthResponse(BaseModel):
    status: str


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str


class ProblemError(Exception):
    """Ends a request with a problem+json answer. `detail` must hold nothing of the upload."""

    def __init__(self, status: int, kind: str, title: str, detail: str, retry_after_s: int | None = None) -> None:
        super().__init__(title)
        self.status, self.kind, self.title, self.detail, self.retry_after_s = status, kind, title, detail, retry_after_s

    def body(self, request_id: str) -> dict[str, Any]:
        """The problem as a plain tree."""
        kind = f"urn:ssacl:problem:{self.kind}"
        return Problem(type=kind, title=self.title, status=self.status, detail=self.detail, request_id=request_id).model_dump()
