"""What fla's layers and its users compute of packed sequences on the host's side of a kernel."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

F = TypeVar("F", bound=Callable[..., object])


def tensor_cache(function: F) -> F:
    """Return the function as it is: what is computed here costs less than to look it up."""
    return function


def prepare_lens(cu_seqlens: Tensor) -> Tensor:
    """Return the lengths `(n,)` of sequences that end at `cu_seqlens[1:]`."""
    return torch.diff(cu_seqlens)


def prepare_lens_from_mask(mask: Tensor) -> Tensor:
    """Return how many tokens of each row `(batch, length)` a mask keeps, int32."""
    return mask.sum(dim=-1, dtype=torch.int32)


def prepare_cu_seqlens_from_lens(lens: Tensor, dtype: torch.dtype | None = torch.int32) -> Tensor:
    """Return `(n + 1,)`: 0, and where sequences of these lengths end."""
    return pad(lens.cumsum(0, dtype=dtype), (1, 0))


def prepare_cu_seqlens_from_mask(mask: Tensor, dtype: torch.dtype | None = torch.int32) -> Tensor:
    """Return where rows end, of which a mask keeps some tokens, packed behind each other."""
    return prepare_cu_seqlens_from_lens(prepare_lens_from_mask(mask), dtype)


def _numbered(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return for counts [2, 3] the owners [0, 0, 1, 1, 1] and the places [0, 1, 0, 1, 2]; waits for the device."""
    owner = torch.repeat_interleave(torch.arange(counts.shape[0], device=counts.device), counts.long())
    begins = counts.long().cumsum(0) - counts.long()
    return owner, torch.arange(owner.shape[0], device=counts.device) - begins[owner]


def prepare_position_ids(cu_seqlens: Tensor, cu_seqlens_cpu: Tensor | None = None) -> Tensor:
    """Return each token's place in its sequence. Waits for the device, unless `cu_seqlens_cpu` is given."""
    source = cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
    return _numbered(prepare_lens(source))[1].to(cu_seqlens)


def prepare_sequence_ids(cu_seqlens: Tensor, cu_seqlens_cpu: Tensor | None = None) -> Tensor:
    """Return the sequence of each token, counted without empty ones. Waits as `prepare_position_ids` does."""
    return prepare_position_ids(cu_seqlens, cu_seqlens_cpu).eq(0).cumsum(0) - 1


def prepare_token_indices(cu_seqlens: Tensor, cu_seqlens_cpu: Tensor | None = None) -> Tensor:
    """Return `(tokens, 2)`: sequence and place. Waits as `prepare_position_ids` does."""
    places = prepare_position_ids(cu_seqlens, cu_seqlens_cpu)
    return torch.stack((prepare_sequence_ids(cu_seqlens, cu_seqlens_cpu), places), 1).to(cu_seqlens)


def prepare_chunk_indices(cu_seqlens: Tensor, chunk_size: int, cu_seqlens_cpu: Tensor | None = None) -> Tensor:
    """Return `(chunks, 2)`: sequence, and number in it. Waits as `prepare_position_ids` does."""
    lengths = prepare_lens(cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu)
    return torch.stack(_numbered((lengths + chunk_size - 1) // chunk_size), 1).to(cu_seqlens)


def prepare_chunk_offsets(cu_seqlens: Tensor, chunk_size: int) -> Tensor:
    """Return `(n + 1,)`: how many chunks there are before each sequence, and at all."""
    return pad((prepare_lens(cu_seqlens) + chunk_size - 1) // chunk_size, (1, 0)).cumsum(-1)
