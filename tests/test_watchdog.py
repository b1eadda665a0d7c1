"""Work that never ends: the process says which, and ends with a status of its own."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from ssacl.training.watchdog import EXIT_HUNG, Watchdog

ROOT = Path(__file__).parents[1]
RANK = """
import logging, os, time
import torch, torch.distributed as dist
from ssacl.training.watchdog import Watchdog
logging.basicConfig()
dist.init_process_group("gloo")
number = torch.ones(1)
dist.all_reduce(number)
watchdog = Watchdog(2.0, lambda text: print("told", text, flush=True))
if dist.get_rank() == 1:
    while True:
        time.sleep(60)
watchdog.watch("step 2 of stage 'joint'")
dist.all_reduce(number)
"""


def start_rank(rank: int, port: int) -> "subprocess.Popen[str]":
    group = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK]
    return subprocess.Popen(command, env=os.environ | group, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def test_a_rank_that_sleeps_for_ever_ends_the_one_that_waits_for_it() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [start_rank(rank, port) for rank in range(2)]
    try:
        out, err = ranks[0].communicate(timeout=120)
        assert ranks[1].poll() is None
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[0].returncode == EXIT_HUNG
    assert "TrainingError: step 2 of stage 'joint' did not end within run.hang_limit_s 2" in err
    assert "all_reduce" in err, "the stack shows where"
    assert out.startswith("told TrainingError: step 2")


def test_work_that_ends_in_time_is_left_alone() -> None:
    told: list[str] = []
    watchdog = Watchdog(0.5, told.append)
    for number in range(8):
        watchdog.watch(f"step {number}")
        time.sleep(0.1)
    watchdog.rest()
    time.sleep(0.7)
    watchdog.close()
    assert told == []


def test_without_a_limit_nothing_is_watched() -> None:
    num_threads = threading.active_count()
    watchdog = Watchdog(0.0, lambda text: None)
    watchdog.watch("step 1")
    assert threading.active_count() == num_threads
    watchdog.close()
