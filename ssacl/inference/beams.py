"""Which tokens a beam search takes: scores in, tokens and their parents out; knows no model.

The rules are those of transformers' `generate`, so that the same scores give the same tokens: with several beams, penalties are laid on log
probabilities and summed; with one, on logits, of which the largest is taken.

Shape letters: B images, K beams, V vocabulary, C candidates, T new tokens.
"""

# ruff: noqa: N815 (fields carry shape letters)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssacl.inference.options import GenerationOptions

_NOTHING = -1e9
"""Score of what must not be chosen. Finite, as there: -inf is what `min_new_tokens` gives."""


@dataclass(frozen=True)
class Written:
    """One report's tokens, as far as they were written, and each one's probability given all before it, penalties left out."""

    tokens: list[int]
    probabilities: list[float]


@dataclass(frozen=True)
class Choice:
    """One step of the search: the beam that each beam goes on from, and its next token."""

    parents_BK: Tensor
    tokens_BK: Tensor

    def keep(self, rows: Tensor) -> Choice:
        return Choice(self.parents_BK[rows], self.tokens_BK[rows])


class Beams:
    """The state of a search of several images.

    Parameters
    ----------
    num_images
        B.
    options
        Beams, penalties and when to stop.
    stops
        Tokens that end a report.
    max_new_tokens
        T, at most that of the options.
    device
        Where the scores are.
    """

    def __init__(
        self, num_images: int, options: GenerationOptions, stops: Sequence[int], max_new_tokens: int, device: torch.device
    ) -> None:
        self._options, self._max_new = options, max_new_tokens
        self._stops = torch.tensor(list(stops), dtype=torch.long, device=device)
        num_beams = options.num_beams
        shape = (num_images, num_beams)
        self._length = 0
        self._tokens = torch.zeros(*shape, max_new_tokens, dtype=torch.long, device=device)
        self._chosen = torch.zeros(*shape, max_new_tokens, device=device)
        self._scores = torch.full(shape, _NOTHING, device=device)
        # All beams are alike at first: only one of them may be continued.
        self._scores[:, 0] = 0.0
        self._ended_scores = torch.full(shape, _NOTHING, device=device)
        self._is_ended = torch.zeros(shape, dtype=torch.bool, device=device)
        self._ended_tokens, self._ended_chosen = torch.zeros_like(self._tokens), torch.zeros_like(self._chosen)
        self._ended_lengths = torch.zeros(shape, dtype=torch.long, device=device)
        self.done_B = torch.zeros(num_images, dtype=torch.bool, device=device)
        """Images whose search is over."""

    def advance(self, logits_BKV: Tensor) -> Choice:
        """Take the next tokens by the logits of every beam; at the first step those of one beam, [B, 1, V]."""
        logits = logits_BKV.float()
        choice = self._greedy(logits) if self._options.num_beams == 1 else self._search(logits)
        self._length += 1
        return choice

    def best(self, row: int) -> Written:
        """The best report of an image whose search is over."""
        length = int(self._ended_lengths[row, 0])
        return Written(self._ended_tokens[row, 0, :length].tolist(), self._ended_chosen[row, 0, :length].exp().tolist())

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the images, in this order."""
        for name in ("_tokens", "_chosen", "_scores", "_ended_scores", "_is_ended", "_ended_tokens", "_ended_chosen", "_ended_lengths"):
            setattr(self, name, getattr(self, name)[rows])
        self.done_B = self.done_B[rows]

    def _penalised(self, scores_BKV: Tensor) -> Tensor:
        options = self._options
        early = self._length < min(options.min_new_tokens, self._max_new)
        if options.repetition_penalty == 1.0 and not early:
            return scores_BKV
        scores = scores_BKV.clone()
        if options.repetition_penalty != 1.0 and self._length:
            written = self._tokens[:, : scores.shape[1], : self._length]
            own = scores.gather(2, written)
            scores.scatter_(2, written, torch.where(own < 0, own * options.repetition_penalty, own / options.repetition_penalty))
        if early:
            scores[:, :, self._stops] = -torch.inf
        return scores

    def _hits(self, tokens: Tensor) -> Tensor:
        """Which candidates end a report: a stop, or no room for more."""
        if self._length + 1 >= self._max_new:
            return torch.ones_like(tokens, dtype=torch.bool)
        return (tokens[..., None] == self._stops).any(-1)

    def _greedy(self, logits: Tensor) -> Choice:
        tokens_B1 = self._penalised(logits)[:, 0].argmax(-1, keepdim=True)
        own = logits[:, 0].log_softmax(-1).gather(1, tokens_B1)
        self._tokens[:, :, self._length], self._chosen[:, :, self._length] = tokens_B1, own
        self.done_B = self._hits(tokens_B1)[:, 0]
        if bool(self.done_B.any()):
            self._ended_tokens, self._ended_chosen = self._tokens, self._chosen
            self._ended_lengths = torch.full_like(self._ended_lengths, self._length + 1)
        return Choice(torch.zeros_like(tokens_B1), tokens_B1)

    def _search(self, logits: Tensor) -> Choice:
        num_beams, vocab_size = self._options.num_beams, logits.shape[2]
        log_probs = logits.log_softmax(-1)
        scores = (self._penalised(log_probs) + self._scores[:, : logits.shape[1], None]).flatten(1)
        # So many that, whatever ends here, as many as there are beams can go on.
        num_candidates = max(2, 1 + len(self._stops)) * num_beams
        scores_BC, index_BC = scores.topk(min(num_candidates, scores.shape[1]))
        parents_BC, tokens_BC = index_BC // vocab_size, index_BC % vocab_size
        own_BC = log_probs.flatten(1).gather(1, index_BC)
        hits_BC = self._hits(tokens_BC)
        self._end(scores_BC, parents_BC, tokens_BC, own_BC, hits_BC)

        self._scores, next_BK = (scores_BC + hits_BC * _NOTHING).topk(num_beams)
        choice = Choice(parents_BC.gather(1, next_BK), tokens_BC.gather(1, next_BK))
        self._tokens, self._chosen = (_rows(each, choice.parents_BK) for each in (self._tokens, self._chosen))
        self._tokens[:, :, self._length] = choice.tokens_BK
        self._chosen[:, :, self._length] = own_BC.gather(1, next_BK)
        self.done_B = self._over() | hits_BC.all(1)
        return choice

    def _end(self, scores_BC: Tensor, parents_BC: Tensor, tokens_BC: Tensor, own_BC: Tensor, hits_BC: Tensor) -> None:
        """Put reports that end here, if among the best, beside those that have ended."""
        num_beams = self._options.num_beams
        ends = hits_BC.clone()
        ends[:, num_beams:] = False
        if not bool(ends.any()):
            return
        scores = scores_BC / (self._length + 1) ** self._options.length_penalty + ~ends * _NOTHING
        best, index = torch.cat([self._ended_scores, scores], 1).topk(num_beams)
        tokens, chosen = _rows(self._tokens, parents_BC), _rows(self._chosen, parents_BC)
        tokens[:, :, self._length], chosen[:, :, self._length] = tokens_BC, own_BC
        lengths = torch.full_like(tokens_BC, self._length + 1)
        self._ended_scores = best
        self._ended_tokens = _rows(torch.cat([self._ended_tokens, tokens], 1), index)
        self._ended_chosen = _rows(torch.cat([self._ended_chosen, chosen], 1), index)
        self._ended_lengths = torch.cat([self._ended_lengths, lengths], 1).gather(1, index)
        self._is_ended = torch.cat([self._is_ended, ends], 1).gather(1, index)

    def _over(self) -> Tensor:
        """[B]: nothing that is open would be better than what has ended, or enough has ended."""
        options = self._options
        length = self._max_new if options.early_stopping == "never" and options.length_penalty > 0 else self._length + 1
        hoped = self._scores[:, :1] / length**options.length_penalty
        worst = torch.where(self._is_ended, self._ended_scores.amin(1, keepdim=True), _NOTHING)
        over = ~(hoped > worst).any(1)
        enough = self._is_ended.all(1) & (options.early_stopping is True)
        either: Tensor = over | enough
        return either


def _rows(values_BKT: Tensor, index_BC: Tensor) -> Tensor:
    gathered: Tensor = values_BKT.gather(1, index_BC[..., None].expand(-1, -1, values_BKT.shape[2]))
    return gathered
