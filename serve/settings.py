"""Settings of the endpoint."""

from __future__ import annotations

import os
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve.service_settings import ServiceSettings
from ssacl.errors import ConfigError
from ssacl.inference.generator import GenerationOptions


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
    service: ServiceSettings = Field(ServiceSettings(), description="Access, audit and kept answers.")

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
