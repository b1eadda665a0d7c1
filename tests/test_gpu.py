"""A GPU that is asked for and not there is told in one line."""

from __future__ import annotations

import pytest
import torch

from ssacl.errors import ClusterError
from ssacl.gpu import require_gpu


@pytest.mark.parametrize(("cuda", "why"), [(None, "has no CUDA in it"), ("13.0", "finds no driver and no device")])
def test_what_is_missing_and_what_to_do(cuda: str | None, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ClusterError, match=why) as told:
        require_gpu()
    assert "run.use_gpu=false" in str(told.value)


def test_one_that_is_there_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    require_gpu()
