"""The loader's compact index says what the entries said, in a tenth of their memory."""

import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from ssacl.data.shards import SampleEntry
from ssacl.data.split_index import SplitIndex

SIZE = st.integers(1, 2**31)


@st.composite
def entries(draw: st.DrawFn) -> list[SampleEntry]:
    made: list[SampleEntry] = []
    for shard in range(draw(st.integers(1, 3))):
        # Beyond 4 GiB: offsets take 64 bits.
        offset = draw(st.integers(0, 2**40))
        for _ in range(draw(st.integers(1, 4))):
            image_size, json_size, crc32 = draw(SIZE), draw(st.integers(2, 2**20)), draw(st.integers(0, 2**32 - 1))
            json_offset = offset + image_size + draw(st.integers(0, 1024))
            kind = draw(st.sampled_from(["jpg", "png"]))
            key = draw(st.text("0123456789abcdefé", min_size=1, max_size=32)) + str(len(made))
            made.append(SampleEntry(key, f"train-{shard:06d}.tar", "train", kind, offset, image_size, json_offset, json_size, crc32))
            offset = json_offset + json_size
    return made


@given(entries())
@settings(max_examples=60, deadline=None)
def test_entries_come_back_as_they_were(wanted: list[SampleEntry]) -> None:
    index = SplitIndex(wanted)
    assert [index[number] for number in range(len(index))] == wanted
    assert SplitIndex(wanted).fingerprint() == index.fingerprint()
    assert len(wanted) == 1 or SplitIndex(wanted[::-1]).fingerprint() != index.fingerprint()


def test_a_sample_takes_few_bytes() -> None:
    wanted = [
        SampleEntry(f"{number:032x}", f"train-{number // 500:06d}.tar", "train", "jpg", number, 5, number + 512, 7, number)
        for number in range(5000)
    ]
    tracemalloc.start()
    try:
        index = SplitIndex(wanted)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert index.num_bytes <= 61 * len(index)
    assert held < 70 * len(index)
