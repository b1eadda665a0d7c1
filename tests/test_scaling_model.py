"""The scaling model's formulae against cases worked out by hand."""

from dataclasses import replace

import pytest

from benchmarks.scaling_model import (
    Hardware,
    Workload,
    consistency_chunk_bytes,
    consistency_flops,
    gather_bytes,
    latency_s,
    memory_bytes,
    predict,
    ring,
    zero_bytes,
)

WORK = Workload(
    preset="by hand",
    stage="joint",
    num_parameters=300,
    num_used=200,
    num_trained=100,
    zero_stage=2,
    micro_batch_size=2,
    accumulation_steps=3,
    flops_per_image=5e9,
    activation_bytes_per_image=1000.0,
    leaf_width=10,
    text_width=4,
    grounds=False,
    num_divisible=300,
)
PLAIN = Hardware(
    peak_flops=1e12,
    mfu=0.5,
    memory_bytes_per_s=1e30,
    ranks_per_node=2,
    node_bytes_per_s=1000.0,
    card_bytes_per_s=300.0,
    cards_per_node=2,
    link_efficiency=0.5,
    node_hop_s=0.0,
    network_hop_s=0.0,
)


def _stage(number: int) -> Workload:
    return replace(WORK, zero_stage=number)


def test_a_ring_sends_all_but_ones_own_part():
    assert [ring(120, size) for size in (1, 2, 4)] == [0, 60, 90]


@pytest.mark.parametrize(
    ("stage", "sent"),
    [
        # On 4 ranks three quarters of 400 bytes of gradients (300) and of 800 bytes of weights in use (600) travel.
        (0, 2 * 300),
        (1, 300 + 300),
        (2, 3 * 300 + 300),
        (3, 3 * (600 + 600 + 300)),
    ],
)
def test_zero_volume_by_stage(stage, sent):
    assert zero_bytes(_stage(stage), 4) == sent
    assert zero_bytes(_stage(stage), 1) == 0


def test_gathered_rows():
    # 4 ranks x 2 rows of 4 bytes: images and texts, 4 wide, there once and back twice; texts again and 25 leaves of 10 for L_ac; 3 times.
    a_number = 4 * 8 * 3 / 4
    assert gather_bytes(WORK, 4) == 3 * a_number * (3 * (4 + 4) + 4 + 25 * 10)
    assert gather_bytes(replace(WORK, contrasts=False), 4) == 0
    with_regions = replace(WORK, grounds=True, sentences_per_report=5.0, regions_per_report=8.0)
    assert gather_bytes(with_regions, 4) - gather_bytes(WORK, 4) == 3 * a_number * 3 * 13 * 4


def test_latency():
    # Two nodes of two: around the ring 2 hops inside, 1 between; a sum goes 1 up inside and 1 between, and down again.
    slow = replace(PLAIN, node_hop_s=1.0, network_hop_s=10.0)
    assert latency_s(WORK, slow, 1) == 0
    assert latency_s(WORK, slow, 4) == (3 * 6 + 2) * (2 + 10) + 3 * 4 * 2 * (1 + 10)


def test_consistency_grows_with_the_global_batch_and_is_held_in_chunks():
    # 2 rows against 8, 25 x 25 leaves, 10 wide, two operations each.
    assert consistency_flops(2, 4, 10) == 2 * 2 * 8 * 625 * 10
    assert consistency_flops(32, 1024, 768) == 1024 * consistency_flops(32, 1, 768)
    assert consistency_chunk_bytes(2, 4) == 4 * 2 * 8 * 625
    assert consistency_chunk_bytes(32, 1024) == consistency_chunk_bytes(32, 512) == 4 * 2**22


def test_memory():
    # Between steps under ZeRO 2 on 4 ranks: 4 x 300 + (4 + 12) x 100 / 4; 16-bit copies of 200; 2 images.
    contrast = 4 * 8 * (25 * 10 + 6 * 4) + 4 * 2 * 8 * 9 + 4 * (4 * 2 * 8 * 625)
    assert memory_bytes(WORK, 4) == 1200 + 400 + 400 + 2000 + contrast
    # ZeRO 3 divides weights and their copies too.
    assert memory_bytes(_stage(3), 4) == 300 + 400 + 100 + 2000 + contrast


def test_a_step():
    one, two, four = (predict(WORK, PLAIN, size) for size in (1, 2, 4))
    # 6 images of 5 GFLOP at 500 GFLOP/s.
    assert one.compute_s == two.compute_s == pytest.approx(0.06)
    assert one.zero_s == one.gather_s == one.latency_s == 0
    assert one.largest_cost == "L_ac"
    # Half of 1,000 B/s inside a node; on two nodes half of two cards of 300.
    assert two.zero_s == pytest.approx(zero_bytes(WORK, 2) / 500)
    assert four.zero_s == pytest.approx(zero_bytes(WORK, 4) / 300)
    assert four.consistency_s == pytest.approx(3 * 3 * consistency_flops(2, 4, 10) / 5e11)
    assert four.images == 24
    assert four.images_per_s == pytest.approx(24 / (0.06 + four.consistency_s + four.zero_s + four.gather_s))
    assert four.largest_cost == "gathered rows"
