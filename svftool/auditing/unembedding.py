"""Which tokens a direction of the residual stream stands for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svftool.auditing.directional import Token, Tokens
from svftool.checkpoints import TensorInfo, is_vocabulary, output_heads

NEAREST = 5
"""Tokens at either end of a direction."""

_BLOCK = 1 << 22


def unembedding_of(infos: Mapping[str, TensorInfo]) -> str | None:
    """Return the name of the matrix that turns the residual stream into scores of tokens.

    Parameters
    ----------
    infos : mapping of str to TensorInfo
        All tensors of a checkpoint.

    Returns
    -------
    str or None
        An output head of the shape of the token embedding; else the embedding, which is then tied;
        None where there is no token embedding.
    """
    tables = [info for info in infos.values() if is_vocabulary(info)]
    if not tables:
        return None
    tokens = max(tables, key=lambda info: info.shape[0])
    heads = output_heads(infos.values())
    shaped = (name for name in infos if name in heads and infos[name].shape == tokens.shape)
    return next(shaped, tokens.name)


@dataclass(frozen=True)
class Unembedding:
    """Rows of scores, one a token.

    Attributes
    ----------
    weight : (tokens, d) Tensor
    texts : sequence of str, or None
        The tokens; None where no tokenizer is there.
    """

    weight: Tensor
    texts: Sequence[str] | None = None

    def nearest(self, directions: Tensor, count: int = NEAREST) -> list[Tokens]:
        """Find the tokens whose rows point along each direction, and against it.

        Parameters
        ----------
        directions : (q, d) Tensor
            Of unit length.
        count : int
            Tokens at either end.

        Notes
        -----
        By the cosine with the rows, of which the mean is taken off first: what is added to the
        scores of all tokens alike changes no probability.
        """
        ends: list[tuple[Tensor, Tensor]] = []
        mean = self._mean()
        found = (self._cosines(directions.double(), mean, rows) for rows in self._slices())
        best: Tensor | None = None
        for start, cosines in found:
            ids = torch.arange(start, start + cosines.shape[1]).expand_as(cosines)
            best = _kept(best, torch.stack((cosines, ids.double())), count)
        assert best is not None
        for values, ids in zip(best[0], best[1], strict=True):
            order = values.argsort(descending=True)
            ends.append((values[order], ids[order]))
        most = min(count, len(self.weight))
        return [
            Tokens(
                self._tokens(values[:most], ids[:most]),
                self._tokens(values.flip(0)[:most], ids.flip(0)[:most]),
            )
            for values, ids in ends
        ]

    def _slices(self) -> Iterator[slice]:
        step = max(1, _BLOCK // max(1, self.weight.shape[1]))
        for start in range(0, len(self.weight), step):
            yield slice(start, start + step)

    def _mean(self) -> Tensor:
        parts = (self.weight[rows].double().sum(dim=0) for rows in self._slices())
        return torch.stack(list(parts)).sum(dim=0) / len(self.weight)

    def _cosines(self, directions: Tensor, mean: Tensor, rows: slice) -> tuple[int, Tensor]:
        block = self.weight[rows].double() - mean
        return rows.start, directions @ torch.nn.functional.normalize(block, dim=1).mT

    def _tokens(self, cosines: Tensor, ids: Tensor) -> tuple[Token, ...]:
        return tuple(
            Token(int(i), self._text(int(i)), float(cosine))
            for cosine, i in zip(cosines.tolist(), ids.tolist(), strict=True)
        )

    def _text(self, index: int) -> str | None:
        known = self.texts is not None and index < len(self.texts)
        return self.texts[index] if known and self.texts is not None else None


def _kept(best: Tensor | None, fresh: Tensor, count: int) -> Tensor:
    """Keep the `count` largest and smallest of each row, (2, q, N) of values and their ids."""
    both = fresh if best is None else torch.cat((best, fresh), dim=2)
    if both.shape[2] <= 2 * count:
        return both
    order = both[0].argsort(dim=1)
    chosen = torch.cat((order[:, :count], order[:, -count:]), dim=1)
    return torch.stack([side.gather(1, chosen) for side in both])
