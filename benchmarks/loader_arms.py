"""Ways to the same batches: our loader from S3, the same bytes from memory, and webdataset's pipeline on the same shards.

Every arm makes batches with the same collator, without end, by the same number of threads or processes.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import boto3
import torch
import webdataset as wds
from botocore.config import Config
from torch.utils.data import DataLoader, Dataset

from ssacl.config import DataConfig
from ssacl.data.collate import Collator
from ssacl.data.loader import StreamingLoader
from ssacl.data.records import Batch
from ssacl.data.s3_server import EmbeddedS3
from ssacl.data.shards import ShardIndex, decode_sample
from ssacl.data.storage import Storage

Encoded = tuple[str, bytes, bytes]
"""Key, picture and JSON of a sample, as they lie in a shard."""
BUFFER = 1000
"""Samples of webdataset's shuffle buffer."""


def ours(storage: Storage, collator: Collator, num: int, batch: int, **data: Any) -> Iterator[Batch]:
    """The streaming loader, nothing kept between epochs."""
    own = Collator(DataConfig(cache_mb=0, **data), collator.vision, collator.tokenizers, collator.seed, True)
    own._texts = collator._texts
    return iter(StreamingLoader(storage, "train", own, micro_batch_size=batch, num_threads=num))


def memory_threads(samples: Sequence[Encoded], collator: Collator, num: int, batch: int) -> Iterator[Batch]:
    """Threads that decode samples which lie in memory."""
    with ThreadPoolExecutor(num) as pool:
        flying: deque[Future[Batch]] = deque()
        for start in itertools.cycle(range(0, len(samples) - batch + 1, batch)):
            flying.append(pool.submit(_decoded, collator, samples[start : start + batch]))
            if len(flying) > 2 * num:
                yield flying.popleft().result()


def _decoded(collator: Collator, samples: Sequence[Encoded]) -> Batch:
    return collator([decode_sample(*sample) for sample in samples], 0)


class _InMemory(Dataset[Batch]):
    def __init__(self, samples: Sequence[Encoded], collator: Collator, batch: int) -> None:
        self.samples, self.collator, self.batch = samples, collator, batch

    def __getitem__(self, number: int) -> Batch:
        start = number * self.batch % (len(self.samples) - self.batch + 1)
        return _decoded(self.collator, self.samples[start : start + self.batch])


def memory_processes(samples: Sequence[Encoded], collator: Collator, num: int, batch: int) -> Iterator[Batch]:
    """torch's DataLoader over samples that lie in its processes' memory."""
    return iter(DataLoader(_InMemory(samples, collator, batch), sampler=itertools.count(), **_options(num)))


def webdataset(server: EmbeddedS3, storage: Storage, collator: Collator, num: int, batch: int) -> Iterator[Batch]:
    """webdataset as its documentation has it: shards by signed URL through curl, a shuffle buffer, DataLoader processes."""
    keys = {"aws_access_key_id": server.access_key, "aws_secret_access_key": server.secret_key, "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=server.endpoint_url, config=Config(signature_version="s3v4"), **keys)
    bucket, _, prefix = storage.url.removeprefix("s3://").partition("/")
    names = [f"{prefix}/{shard.name}" for shard in ShardIndex.load(storage).shards]
    urls = [client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": name}, ExpiresIn=36000) for name in names]

    def row(item: dict[str, Any]) -> Any:
        return collator.row(decode_sample(item["__key__"], item["jpg"], item["json"]), 0)

    shards = wds.WebDataset([f"pipe:curl -s '{url}'" for url in urls], shardshuffle=len(urls), nodesplitter=None, empty_check=False)
    pipeline = shards.repeat().shuffle(BUFFER).map(row).batched(batch, collation_fn=collator.join, partial=False)
    return iter(DataLoader(pipeline, **_options(num)))


def _options(num: int) -> dict[str, Any]:
    # Forked: what the arm is given is in every process at once.
    context = multiprocessing.get_context("fork")
    return {"batch_size": None, "num_workers": num, "multiprocessing_context": context, "worker_init_fn": _one_thread, "prefetch_factor": 2}


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
