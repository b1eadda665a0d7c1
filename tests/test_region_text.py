"""Region text and entities: against a slow reference and by hand."""

import math

import pytest
import torch

from ssacl.anatomy import FindingStatus
from ssacl.losses import region_text as words


def test_region_text_equals_a_slow_reference() -> None:
    rng = torch.Generator().manual_seed(0)
    region, text = torch.randn(3, 25, 16, generator=rng), torch.randn(6, 16, generator=rng)
    rows, findings = torch.arange(6) % 3, torch.randint(0, 3, (6,), generator=rng)
    leaves = torch.rand(6, 25, generator=rng) < 0.1
    leaves[1:, 3] = True
    leaves[0] = False
    told = [s for s in range(len(text)) if leaves[s].any()]
    assert len(told) == 5
    entries = sorted({(int(rows[s]), m, int(findings[s])) for s in told for m in range(25) if leaves[s, m]})
    cosine = torch.nn.functional.cosine_similarity
    logits = torch.stack([torch.stack([cosine(text[s], region[r, m], dim=0) for r, m, _ in entries]) for s in told]) / 0.1
    positive = [[bool(leaves[s, m]) and int(findings[s]) == f for _, m, f in entries] for s in told]
    rowwise = [logits.log_softmax(1)[i][torch.tensor(positive[i])].mean() for i in range(len(told))]
    columns = [logits.log_softmax(0)[:, j][torch.tensor([p[j] for p in positive])].mean() for j in range(len(entries))]
    expected = -0.5 * (sum(rowwise) / len(rowwise) + sum(columns) / len(columns))
    assert words.region_text(region, text, rows, leaves, findings).item() == pytest.approx(expected.item(), rel=1e-5)


def test_region_text_without_a_named_leaf_is_a_connected_zero() -> None:
    region, text = torch.randn(2, 25, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    none = torch.zeros(3, 25, dtype=torch.bool)
    loss = words.region_text(region, text, torch.tensor([0, 1, 1]), none, torch.tensor([1, 2, 3]))
    loss.backward()
    assert loss.item() == 0.0
    assert region.grad is not None
    assert not region.grad.any()
    empty = words.region_text(region, text[:0], torch.zeros(0, dtype=torch.long), none[:0], torch.zeros(0, dtype=torch.long))
    assert empty.item() == 0.0


def test_entities_by_hand() -> None:
    status = torch.full((2, 25, 14), int(FindingStatus.UNMENTIONED))
    status[0, 0, 0] = FindingStatus.PRESENT
    status[0, 0, 1] = FindingStatus.UNCERTAIN
    status[0, 1, 0] = FindingStatus.ABSENT
    logits = torch.zeros(2, 25, 14)
    logits[0, 0, 0], logits[0, 1, 0] = 1.0, 2.0
    softplus = torch.nn.functional.softplus
    ln2 = math.log(2)
    # Two mentioned leaves: weight 1 but for the positive (4) and the uncertain (0); 23 silent leaves: 0.3 each; row 1 has no report.
    total = 4 * softplus(torch.tensor(-1.0)) + softplus(torch.tensor(2.0)) + (12 + 13) * ln2 + 0.3 * 23 * 14 * ln2
    weight = 4 + 1 + 12 + 13 + 0.3 * 23 * 14
    assert words.entities(logits, status, torch.tensor([True, False])).item() == pytest.approx(total.item() / weight, rel=1e-5)
    assert words.entities(logits, status, torch.tensor([False, False])).item() == 0.0
