"""Settings of the endpoint, and of the models on it, which may change while it runs."""

from __future__ import annotations

import os
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from serve.service_settings import ServiceSettings
from ssacl.errors import ConfigError
from ssacl.inference.generator import GenerationOptions
from ssacl.inference.precision import Precision

_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


class _Parsed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def parse(cls, tree: Self | dict[str, Any]) -> Self:
        """Settings from a plain tree (a Serve config file's `args` or `user_config`).

        Raises
        ------
        ConfigError
            A key is unknown or a value is out of range.
        """
        if isinstance(tree, cls):
            return tree
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError("; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())) from error


class ModelSettings(_Parsed):
    """What a model replica loads and how it writes: `user_config` of the deployment `model`; a change starts no replica anew."""

    checkpoint_url: str = Field(description="Model folder, s3:// prefix of one, or REGISTRY@CHANNEL, which is followed.")
    more_models: dict[_Name, str] = Field(default={}, max_length=8, description="Name -> further models, asked for with ?model=NAME.")
    follow_s: float = Field(30.0, gt=0, description="How often channels are read, and models that could not be loaded are tried again.")
    precision: Precision = Field("fp32", description="fp32, bf16, or int8 (CPU).")
    max_batch_size: int = Field(4, ge=1, le=256, description="Pictures that a model replica reads at once.")
    batch_wait_s: float = Field(0.02, ge=0, le=10, description="Longest wait for a batch to fill.")
    generation: GenerationOptions = GenerationOptions()


class ServeSettings(ModelSettings):
    """Everything that shapes the endpoint; unknown keys fail."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="0 takes a free one.")
    min_replicas: int = Field(1, ge=1, description="Model replicas kept when idle.")
    max_replicas: int = Field(1, ge=1, description="Model replicas under load.")
    target_ongoing_requests: float | None = Field(
        None,
        gt=0,
        description="Requests under way for each model replica beyond which replicas are added; none: max_batch_size, or a quarter of it "
        "with a latency target.",
    )
    upscale_delay_s: float = Field(10.0, ge=0, description="How long load must last before replicas are added.")
    downscale_delay_s: float = Field(300.0, ge=0, description="How long idleness must last before they are taken away.")
    num_ingress_replicas: int = Field(1, ge=1, description="Replicas that read pictures and answer.")
    cpus_per_replica: float = Field(1.0, ge=0, description="Ray CPUs reserved by a model replica.")
    gpus_per_replica: float = Field(0.0, ge=0, description="Ray GPUs reserved by a model replica; more than 0 runs it on CUDA.")
    num_threads: int = Field(
        default_factory=lambda: max(1, (os.cpu_count() or 2) // 2), ge=1, description="Torch threads of a model replica."
    )
    max_queued_requests: int = Field(64, ge=1, description="Requests that wait for a model replica; beyond it 503.")
    latency_target_s: float | None = Field(
        None, gt=0, description="How long an accepted report should take at most: as many are let in as keep it, the others get 503."
    )
    max_upload_bytes: int = Field(64 * 2**20, ge=1024, description="Longest request body.")
    max_files: int = Field(8, ge=1, description="Most images in one request.")
    request_timeout_s: float = Field(180.0, gt=0, description="Longest time from request to answer.")
    drain_s: float = Field(60.0, ge=1, description="How long a replica that is taken away may finish what it has.")
    service: ServiceSettings = Field(ServiceSettings(), description="Access, audit and kept answers.")

    @property
    def scale_above(self) -> float:
        """Requests under way for each model replica beyond which replicas are added."""
        if self.target_ongoing_requests is not None:
            return self.target_ongoing_requests
        # What is refused is not under way: admission would hide from Serve that replicas are missing.
        return self.max_batch_size if self.latency_target_s is None else max(1.0, self.max_batch_size / 4)

    def of_the_models(self) -> dict[str, Any]:
        """The part that is `ModelSettings`, as a plain tree."""
        return self.model_dump(mode="json", include=set(ModelSettings.model_fields))
