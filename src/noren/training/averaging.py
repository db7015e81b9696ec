"""The mean of several clients' adapters, tensor by tensor.

theta = sum_m w_m theta_m / sum_m w_m (federated averaging, McMahan et al. 2017, arXiv 1602.05629). LoRA's factors A
and B are averaged each by itself: the product of the averages is not the average of the products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from noren.errors import ProtocolError


def average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted mean of adapters with the same names and shapes; if all weights are 0, the plain mean.

    Summed in fp64 in the order given. Raises ProtocolError if they differ in what they hold.
    """
    total = sum(weights)
    shares = [weight / total for weight in weights] if total else [1 / len(weights)] * len(weights)
    out: dict[str, Tensor] = {}
    for name, first in states[0].items():
        if any(state.keys() != states[0].keys() or state[name].shape != first.shape for state in states):
            raise ProtocolError("the group's clients have other adapters; give all the same [adapter] and plan")
        mean = torch.zeros_like(first, dtype=torch.float64)
        for state, share in zip(states, shares, strict=True):
            mean += state[name].double() * share
        out[name] = mean.to(first.dtype)
    return out
