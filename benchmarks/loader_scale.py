"""What the loader holds: over ten epochs, and over data sets of growing size. Each figure comes from a process of its own."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.loader_data import write_films, write_tiny
from ssacl.config import DataConfig, VisionConfig
from ssacl.data.collate import Collator
from ssacl.data.loader import StreamingLoader, open_split
from ssacl.data.s3_server import EmbeddedS3
from ssacl.data.split_index import SplitIndex
from ssacl.data.storage import open_storage
from ssacl.data.tokenization import Tokenizers, train_tokenizers

_BATCH, _SIDE_PX = 32, 96


def epochs_in_memory(server: EmbeddedS3, folder: Path, num_epochs: int) -> dict[str, Any]:
    """Resident memory after each of `num_epochs` epochs over 1,024 films, nothing kept between epochs."""
    write_films(open_storage("s3://ssacl/epochs"), 1024).save(folder / "tokenizers")
    rss = _alone(_rss_by_epoch, server.environment, str(folder / "tokenizers"), num_epochs)
    return {"samples": 1024, "rss_mib": rss, "growth_mib": round(rss[-1] - rss[1], 1), "growth_from_epoch": 2}


def growth(server: EmbeddedS3, sizes: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """Time to the first batch and memory, by number of (tiny, but real) samples."""
    figures = {}
    for size in sizes:
        storage = open_storage(f"s3://ssacl/tiny-{size}")
        write_tiny(storage, size)
        figures[str(size)] = _alone(_first_batch, server.environment, storage.url) | _alone(_index_memory, server.environment, storage.url)
    return figures


def tree_cpu_s() -> float:
    """CPU seconds so far of this process and all below it."""
    parents, used = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        # proc(5): ppid is field 4; utime, stime and those of children that ended are 14 to 17; this list begins at field 3.
        parents[int(folder.name)], used[int(folder.name)] = int(fields[1]), sum(int(field) for field in fields[11:15])
    mine = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= more
    return sum(used[pid] for pid in mine) / os.sysconf("SC_CLK_TCK")


def _alone(function: Any, environment: dict[str, str], *arguments: Any) -> Any:
    os.environ.update(environment)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _rss_by_epoch(tokenizers: str, num_epochs: int) -> list[float]:
    loader = _loader("s3://ssacl/epochs", Tokenizers.load(tokenizers))
    batches, rss = iter(loader), []
    for _ in range(num_epochs):
        for _ in itertools.islice(batches, loader.steps_per_epoch):
            pass
        rss.append(round(_rss_mib(), 1))
    return rss


def _first_batch(url: str) -> dict[str, float]:
    tokenizers = train_tokenizers(["No effusion."], 2000, 2000)
    before, started = _rss_mib(), time.perf_counter()
    loader = _loader(url, tokenizers)
    opened_s = time.perf_counter() - started
    batches = iter(loader)
    next(batches)
    first_s = time.perf_counter() - started
    for _ in itertools.islice(batches, loader.steps_per_epoch - 1 if len(loader) < 20_000 else 300):
        pass
    return {
        "opened_s": round(opened_s, 3),
        "first_batch_s": round(first_s, 3),
        "rss_growth_mib": round(_rss_mib() - before, 1),
    }


def _index_memory(url: str) -> dict[str, float]:
    tracemalloc.start()
    entries = open_split(open_storage(url), "train", purpose="training")
    objects, peak = tracemalloc.get_traced_memory()
    index = SplitIndex(entries)
    return {
        "held_bytes_per_sample": round(index.num_bytes / len(index), 1),
        "entry_objects_bytes_per_sample": round(objects / len(index)),
        "peak_bytes_per_sample": round(peak / len(index)),
    }


def _loader(url: str, tokenizers: Tokenizers) -> StreamingLoader:
    vision = VisionConfig(image_size_px=_SIDE_PX, patch_size_px=8)
    collator = Collator(DataConfig(cache_mb=0), vision, tokenizers, 0, training=True)
    return StreamingLoader(open_storage(url), "train", collator, micro_batch_size=_BATCH)


def _rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
