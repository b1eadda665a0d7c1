"""The cheap dropout drops as torch's does, and the plain attention is transformers' own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from ssacl.models.dropout import PLAIN_ATTENTION, Dropout, dropout, use_cheap_dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_share_scale_and_gradient(share: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(301, 1001, dtype=dtype, requires_grad=True)
    y = dropout(x, share, True)
    y.sum().backward()
    kept = y != 0
    # Five standard deviations of a binomial share.
    assert float(kept.float().mean()) == pytest.approx(1 - share, abs=5 * (share * (1 - share) / x.numel()) ** 0.5)
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / (1 - share)))
    assert torch.equal(x.grad, y.detach())
    # No pattern along rows or columns: the four decisions of a draw are independent.
    lagged = (kept[:, 4:] & kept[:, :-4]).float().mean(), (kept[:, 1:] & kept[:, :-1]).float().mean(), (kept[1:] & kept[:-1]).float().mean()
    assert [float(value) for value in lagged] == pytest.approx([(1 - share) ** 2] * 3, abs=0.006)


def test_draws_follow_the_generator_and_rest_in_evaluation() -> None:
    x = torch.ones(1000)
    torch.manual_seed(3)
    first, second = dropout(x, 0.3, True), dropout(x, 0.3, True)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.3, True), first)
    assert not torch.equal(first, second)
    assert dropout(x, 0.3, False) is x
    assert dropout(x, 0.0, True) is x
    assert not bool(dropout(x, 1.0, True).any())
    assert dropout(x[:0], 0.3, True).shape == (0,)


def test_every_dropout_of_a_model_is_replaced_and_attention_is_the_same() -> None:
    torch.manual_seed(0)
    config = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 30, "n_positions": 20}
    plain = GPT2LMHeadModel(GPT2Config(**config, attn_implementation=PLAIN_ATTENTION))
    eager = GPT2LMHeadModel(GPT2Config(**config, attn_implementation="eager"))
    eager.load_state_dict(plain.state_dict())
    use_cheap_dropout(plain)
    kinds = {type(module) for module in plain.modules() if isinstance(module, nn.Dropout)}
    assert kinds == {Dropout}
    ids = torch.randint(0, 30, (3, 12))
    mask = torch.arange(12) >= torch.tensor([[0], [3], [6]])
    mine = plain.eval()(ids, attention_mask=mask.long()).logits
    theirs = eager.eval()(ids, attention_mask=mask.long()).logits
    torch.testing.assert_close(mine[mask], theirs[mask], rtol=1e-4, atol=1e-5)
    plain.train()
    assert not torch.equal(plain(ids).logits, plain(ids).logits)
