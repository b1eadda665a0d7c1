"""The order of an epoch: a pure function of (seed, epoch), computed position by position, nothing held in memory.

Reading one sample at a time costs as much as decoding it, so neighbours in a shard are read together, as a block. They must not be
trained on together: neighbours are often films of one patient. The order is therefore dealt from many lanes in turn, like cards. Each lane
goes through blocks from all over the set, one sample a turn:

    position p -> lane p % num_lanes, turn p // num_lanes -> place in the lane -> block, offset in it -> sample

Blocks are permuted over the whole set, and where they begin moves from epoch to epoch, so that other neighbours share one. A global batch
of up to `num_lanes` samples takes at most one from each lane. A rank takes every W-th position: where W divides `num_lanes`, it has lanes
for itself, and reads no block that another rank reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

_ROUNDS = 6


class EpochOrder:
    """A permutation of range(n), fixed by (seed, epoch), in O(1) memory: `order[position]` is a sample's number.

    A Feistel network over the next power of four, with cycle walking (an output outside of range(n) is permuted again).
    """

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        self.n = n
        self._half = max(1, ((max(n, 2) - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        self._keys = _keys(seed, epoch, "order", _ROUNDS)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.n:
            raise IndexError(position)
        value = self._permute(position)
        while value >= self.n:
            value = self._permute(value)
        return value

    def _permute(self, value: int) -> int:
        left, right = value >> self._half, value & self._mask
        for key in self._keys:
            # splitmix64's finaliser: every input bit reaches every output bit.
            mixed = (right + key) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ ((mixed ^ (mixed >> 31)) & self._mask)
        return (left << self._half) | right


class LaneOrder:
    """A permutation of range(n) that leaves neighbours close enough to be read together; see the module.

    Parameters
    ----------
    num_lanes
        Blocks that are open at a time, over all ranks; at most n.
    block_size
        Samples per block, at most. A small set has smaller blocks, down to 1 (a permutation of single samples), so that each lane has
        at least one.
    """

    def __init__(self, n: int, seed: int, epoch: int, num_lanes: int, block_size: int) -> None:
        self.n = n
        self.num_lanes = max(1, min(num_lanes, n))
        self.block_size = max(1, min(block_size, n // self.num_lanes))
        # What is left over after whole blocks stays behind them; the turn of the whole set makes it another rest in each epoch.
        self._blocks = EpochOrder(n // self.block_size, seed, epoch)
        self._turn = _keys(seed, epoch, "turn", 1)[0] % max(n, 1)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, position: int) -> int:
        block, offset = divmod(self._place(position), self.block_size)
        if block < len(self._blocks):
            block = self._blocks[block]
        return (block * self.block_size + offset + self._turn) % self.n

    def same_block(self, position: int, end: int) -> Iterator[int]:
        """Later positions before `end`, in order, that deal from the block which `position` deals from, in the same lane."""
        block = self._place(position) // self.block_size
        for later in range(position + self.num_lanes, min(end, self.n), self.num_lanes):
            if self._place(later) // self.block_size != block:
                return
            yield later

    def _place(self, position: int) -> int:
        if not 0 <= position < self.n:
            raise IndexError(position)
        turn, lane = divmod(position, self.num_lanes)
        length, longer = divmod(self.n, self.num_lanes)
        start = lane * length + min(lane, longer)
        # Lanes begin at different offsets of a block, so that reading is even over time.
        return start + (turn + lane * self.block_size // self.num_lanes) % (length + (lane < longer))


def _keys(seed: int, epoch: int, purpose: str, count: int) -> list[int]:
    digest = hashlib.blake2b(f"{seed}|{epoch}|{purpose}".encode(), digest_size=8 * count).digest()
    return [int.from_bytes(digest[8 * index : 8 * index + 8], "little") for index in range(count)]
