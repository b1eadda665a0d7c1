"""How many train workers a run may have, whether the cluster has room for them, and a count that follows the cluster's nodes.

Ray Train's elastic mode starts the group again with as many workers as fit. Added here: only counts over which the global batch can be
dealt out are taken, the nodes are looked at when it is decided (Ray's own view is up to 20 s old, and a start that counts on a lost node
waits for it), and the driver is told.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import ray
from ray import PlacementGroupID
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.exceptions import RayError
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import TrainAutoscalingCoordinatorClient
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from ssacl.config import Config
from ssacl.errors import ConfigError
from ssacl.training.stages import fit_batch

logger = logging.getLogger(__name__)

_NOBODY = b"\xff"
"""What the id of no actor consists of."""
_LOOK_S = 1.0
"""Pause between two looks for nodes while there are too few."""
_TELL_S = 30.0
"""Pause between two words about it."""
_ANSWER_S = 5.0
"""Longest time that Ray's keeper of reservations may take to answer."""


def worker_counts(config: Config) -> tuple[int, ...]:
    """The numbers of train workers that the run may have, ascending; one where `run.num_train_workers` is a number.

    Raises
    ------
    ConfigError
        The global batch is not fixed, or can be dealt out over none of them.
    """
    workers, engine = config.run.num_train_workers, config.engine
    if isinstance(workers, int):
        fit_batch(config, workers)
        return (workers,)
    if engine.global_batch_size == 0:
        raise ConfigError(
            "An elastic run.num_train_workers needs engine.global_batch_size: without it the samples of a step would follow the number "
            "of train workers, and the numbers of the run with them."
        )
    parts = {count: count * engine.accumulation_steps for count in range(workers[0], workers[1] + 1)}
    counts = tuple(count for count, number in parts.items() if engine.global_batch_size % number == 0)
    if not counts:
        raise ConfigError(
            f"engine.global_batch_size {engine.global_batch_size} cannot be dealt out evenly over any of {workers[0]} to {workers[1]} "
            f"train workers times engine.accumulation_steps {engine.accumulation_steps}. Change one of the three."
        )
    return counts


def resources_per_worker(config: Config) -> dict[str, float]:
    """What Ray sets aside for each train worker."""
    return {"CPU": config.run.cpus_per_train_worker, **({"GPU": config.run.gpus_per_train_worker} if config.run.use_gpu else {})}


def room_for_workers(config: Config) -> int:
    """How many train workers the nodes of the cluster have room for, were they empty."""
    each = resources_per_worker(config)
    return sum(min(_times(node.get(name, 0.0), amount) for name, amount in each.items() if amount > 0) for node in _nodes())


def _times(there: float, amount: float) -> int:
    """How often `amount` fits; the parts of a share lie on one piece, as on a GPU."""
    whole = there if amount >= 1 else 1.0
    return int(whole / amount + 1e-6) * int(there // whole if whole else 0)


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def require_room(config: Config, fewest: int) -> None:
    """Say at once what Ray would wait for without a word; a cluster that grows by itself has `run.node_wait_s` to do so.

    Raises
    ------
    ConfigError
        The nodes of the cluster have no room for the `fewest` train workers.
    """
    each, room = resources_per_worker(config), room_for_workers(config)
    if room < fewest and config.run.node_wait_s > 0:
        room = _ask_for_nodes(config, fewest)
    if room < fewest:
        nodes = _nodes()
        wanted = " and ".join(f"{amount:g} {name}" for name, amount in each.items())
        there = " and ".join(f"{sum(node.get(name, 0.0) for node in nodes):g} {name}" for name in each)
        raise ConfigError(
            f"{fewest} train workers with {wanted} each do not fit into the Ray cluster: its {len(nodes)} nodes have {there}, room for "
            f"{room}. Lower run.num_train_workers or run.cpus_per_train_worker, or add nodes; on a cluster that grows by itself give "
            "run.node_wait_s."
        )


def _ask_for_nodes(config: Config, count: int) -> int:
    """Have Ray's autoscaler make room for `count` train workers; gives the room that there is in the end."""
    logger.info("waiting up to %.0f s for the cluster to make room for %d train workers", config.run.node_wait_s, count)
    end = time.monotonic() + config.run.node_wait_s
    # What waits for nodes is what brings them.
    wanted = placement_group([resources_per_worker(config)] * count)
    try:
        while (room := room_for_workers(config)) < count and time.monotonic() < end:
            time.sleep(_LOOK_S)
    finally:
        remove_placement_group(wanted)
    return room


def free_left_room() -> None:
    """Free the placement groups of this driver's job whose creators, controllers of Ray Train, are dead.

    Ray ends the workers in them but keeps their CPUs for as long as the job lives, and its own cleaner asks the dashboard whether the
    controller lives, which a local Ray does not have.
    """
    job = ray.get_runtime_context().get_job_id()
    for content in ray._private.state.state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(content)
        made_by_driver = not group.creator_actor_id.strip(_NOBODY)
        if group.creator_job_id.hex() != job or made_by_driver or not group.creator_actor_dead or group.state == group.REMOVED:
            continue
        remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))


def cancel_reservation(run_id: str) -> None:
    """Take back what a controller that died has reserved; it would stand in its successor's way for minutes."""
    TrainAutoscalingCoordinatorClient(f"train-{run_id}").cancel_resource_request()


class FollowNodes(ElasticScalingPolicy):
    """As many of `counts` as the nodes have room for; `board` hears of each change."""

    def __init__(self, scaling_config: ScalingConfig, counts: tuple[int, ...], board: Any) -> None:
        super().__init__(scaling_config)
        self._counts, self._board = counts, board
        self._told_at = float("-inf")

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            if time.monotonic() - self._told_at > _TELL_S:
                self._told_at = time.monotonic()
                self._tell(f"waiting for nodes: at least {self._counts[0]} train workers must fit")
            # The controller asks again at once.
            time.sleep(_LOOK_S)
        return decision

    def _get_resize_decision(self, num_workers: int) -> ResizeDecision:
        self._tell(f"the group starts with {num_workers} train workers")
        return super()._get_resize_decision(num_workers)

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        possible = super()._count_possible_workers(reserved_resources)
        return max((count for count in self._counts if count <= possible), default=0)

    def _get_reserved_resources(self) -> Any:
        reserved = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
        try:
            return ray.get(reserved, timeout=_ANSWER_S)
        except (RayError, TimeoutError):
            return None

    def _tell(self, note: str) -> None:
        self._board.post.remote({"event": "workers", "note": note})
