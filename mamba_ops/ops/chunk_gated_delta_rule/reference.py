"""The plain-torch kernel of chunk_gated_delta_rule: its reference, which runs on any device."""

import torch
from torch import Tensor

from mamba_ops.ops._common.decay import log_decay_between
from mamba_ops.ops._common.delta_rule_reference import read_chunks
from mamba_ops.ops.chunk_gated_delta_rule.op import Arguments


class HeadDecays:
    """What a chunk's tokens keep of each other where a head decays as a whole; see `Decays`."""

    def __init__(self, log_decay: Tensor, per_key: int) -> None:
        self.per_key = per_key
        self.between = torch.exp(log_decay_between(log_decay))
        self.since = torch.exp(log_decay.cumsum(2)).unsqueeze(3)
        self.left = self.between[:, :, -1].unsqueeze(3)

    def products(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the decayed products of keys with those before them, and of queries with keys."""
        of_keys, of_queries = ((x @ keys.mT).repeat_interleave(self.per_key, 1) for x in (keys, queries))
        return (of_keys * self.between).tril(-1), of_queries * self.between

    def gradients(
        self, queries: Tensor, keys: Tensor, grad_of_keys: Tensor, grad_of_queries: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and the logs of decays, given those of both products."""
        key_products, query_products = self.products(queries, keys)
        queries, keys = (x.repeat_interleave(self.per_key, 1) for x in (queries, keys))
        by_queries, by_keys = grad_of_queries * self.between, grad_of_keys * self.between
        pairs = grad_of_queries * query_products + grad_of_keys * key_products
        # over tokens from each one on, and those before it
        grad_decay = pairs.flip(2).cumsum(2).flip(2).tril(-1).sum(3, keepdim=True)
        return by_queries @ keys, by_queries.mT @ queries + (by_keys + by_keys.mT) @ keys, grad_decay


def chunk_gated_delta_rule(call: Arguments) -> None:
    read_chunks(call, HeadDecays)
