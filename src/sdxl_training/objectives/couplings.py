"""Which noise belongs to which picture of a global batch.

A coupling is a permutation of the batch's noises. Pictures and captions stay where they are, and the noises of a batch
stay what they are; only their partners change.

Shape legend: G samples of the global batch, C channels, H x W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Coupling = Callable[[Tensor, Tensor, Sequence[Sequence[str]]], Tensor]
"""(x0_GCHW, eps_GCHW, tags of each caption) -> permutation_G: sample i gets noise permutation_G[i]."""


@dataclass(frozen=True)
class OptimalTransport:
    """Minibatch optimal transport (Pooladian et al. 2023; Tong et al. 2023): the exact assignment of least cost.

    The cost is |x0 - eps|^2. The paths of a batch cross less. The noise of a batch is unchanged as a whole; but given
    a caption it is no longer standard normal, which guidance and sampling assume (Cheng & Schwing 2025).
    """

    def __call__(self, x0_GCHW: Tensor, eps_GCHW: Tensor, tags: Sequence[Sequence[str]]) -> Tensor:
        """Return the permutation; the Hungarian method, O(G^3)."""
        return _assign(_squared_distances(x0_GCHW, eps_GCHW))


@dataclass(frozen=True)
class ConditionalTransport:
    """Optimal transport that prefers to exchange noise between like captions (after C2OT, Cheng & Schwing 2025).

    The cost of giving sample i the noise that was drawn for sample j grows by `strength` standard deviations of the
    distances, times the share of tags in which the two captions differ. 0 is optimal transport, a large strength
    exchanges noise between equal captions only. The paper uses a distance of text embeddings; tags are known before
    the encoders run.
    """

    strength: float

    def __call__(self, x0_GCHW: Tensor, eps_GCHW: Tensor, tags: Sequence[Sequence[str]]) -> Tensor:
        """Return the permutation."""
        cost_GG = _squared_distances(x0_GCHW, eps_GCHW)
        return _assign(cost_GG + self.strength * cost_GG.std(correction=0) * _tag_distances(tags))


def _squared_distances(x0_GCHW: Tensor, eps_GCHW: Tensor) -> Tensor:
    """Return -2 <x0_i, eps_j>, which differs from |x0_i - eps_j|^2 by what no assignment can change."""
    return -2.0 * (x0_GCHW.flatten(1) @ eps_GCHW.flatten(1).T).double()


def _tag_distances(tags: Sequence[Sequence[str]]) -> Tensor:
    """Return 1 - |common| / |either| (Jaccard) for each pair of captions; two empty captions are alike."""
    sets = [frozenset(of_one) for of_one in tags]
    distances = [[1 - len(one & other) / len(one | other) if one | other else 0.0 for other in sets] for one in sets]
    return torch.tensor(distances, dtype=torch.float64)


def _assign(cost_GG: Tensor) -> Tensor:
    _, columns = linear_sum_assignment(cost_GG.numpy())
    return torch.from_numpy(numpy.asarray(columns, dtype=numpy.int64))
