"""Response models of the HTTP interface."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from serve.problems import Problem


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
    reason: str = Field(description='"another" (a newer image was read), "duplicate", or why this one was refused.')
    detail: str


class FilmModel(BaseModel):
    """The picture that was read, as it is to be seen: air dark, upright, square pixels."""

    png_base64: str = Field(description="8-bit grey PNG; the longer side has at most 2048 pixels.")
    width_px: int
    height_px: int


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
    film: FilmModel | None = Field(None, description="Given with film=true.")
    image_ref: str = Field(description="Content hash of the picture.")
    model_version: str
    provenance: dict[str, Any] = {}


class JobResponse(BaseModel):
    """A report asked for with Prefer: respond-async, while there is no answer."""

    id: str
    status: Literal["running", "failed"]
    problem: Problem | None = Field(None, description="Why there will be none.")


class ModelsResponse(BaseModel):
    models: list[dict[str, Any]]


class HealthResponse(BaseModel):
    status: str
