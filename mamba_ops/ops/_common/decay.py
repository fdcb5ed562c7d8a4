"""Decays in references."""

import torch
from torch import Tensor


def finite_rates(rates: Tensor) -> Tensor:
    """Return rates of which a step of 0 makes a decay of 1: -1e30 stands for -inf."""
    return rates.clamp(min=-1e30)


def limited(values: Tensor, least: float, most: float) -> Tensor:
    """Return values within limits. At a limit itself the gradient passes, where that of torch.clamp is zero from torch
    2.14 on: a step of exactly 0 has one.
    """
    return torch.where(values < least, least, torch.where(values > most, most, values))


def log_decay_between(log_decay: Tensor) -> Tensor:
    """Return the logarithm of the decay from token j to token i, `(..., i, j)`, -inf where j comes after i.

    Each is a sum of its own tokens' logarithms, `(..., tokens)`, as in `segsum` of mamba_ssm's minimal SSD. The
    difference of two sums since the first token has the error of those sums, which under strong decay are large; with
    -inf among them it is NaN.
    """
    *lead, size = log_decay.shape
    pairs = torch.ones(size, size, dtype=torch.bool, device=log_decay.device)
    of_later = log_decay.unsqueeze(-2).expand(*lead, size, size).masked_fill(pairs.tril(), 0)  # (..., j, i)
    return of_later.cumsum_(-1).masked_fill_(pairs.tril(-1), -torch.inf).mT
