"""What fla's layers and its users compute of packed sequences on the host's side of a kernel."""

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from mamba_ops.compat.arguments import whole
from mamba_ops.registry import answering

F = TypeVar("F", bound=Callable[..., object])


def tensor_cache(function: F) -> F:
    """Return the function as it is: what is computed here costs less than to look it up."""
    return function


@answering
def prepare_lens(cu_seqlens: Tensor) -> Tensor:
    """Return the lengths `(n,)` of sequences that end at `cu_seqlens[1:]`."""
    return torch.diff(cu_seqlens)


@answering
def prepare_lens_from_mask(mask: Tensor) -> Tensor:
    """Return how many tokens of each row `(batch, length)` a mask keeps, int32."""
    return mask.sum(dim=-1, dtype=torch.int32)


@answering
def prepare_cu_seqlens_from_lens(lens: Tensor, dtype: torch.dtype | None = torch.int32) -> Tensor:
    """Return `(n + 1,)`: 0, and where sequences of these lengths end."""
    return pad(lens.cumsum(0, dtype=dtype), (1, 0))


@answering
def prepare_cu_seqlens_from_mask(mask: Tensor, dtype: torch.dtype | None = torch.int32) -> Tensor:
    """Return where rows end, of which a mask keeps some tokens, packed behind each other."""
    return prepare_cu_seqlens_from_lens(prepare_lens_from_mask(mask), dtype)


def _numbered(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return for counts [2, 3] the owners [0, 0, 1, 1, 1] and the places [0, 1, 0, 1, 2]; waits for the device."""
    owner = torch.repeat_interleave(torch.arange(counts.shape[0], device=counts.device), counts.long())
    begins = counts.long().cumsum(0) - counts.long()
    return owner, torch.arange(owner.shape[0], device=counts.device) - begins[owner]


@answering
def prepare_position_ids(cu_seqlens: Tensor, cu_seqlens_cpu: Tensor | None = None) -> Tensor:
    """Return each token's place in its sequence. Waits for the device, unless `cu_seqlens_cpu` is given."""
    source = cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
    return _numbered(prepare_lens(source))[1].to(cu_seqlens)


@answering
def prepare_sequence_ids(cu_seqlens: Tensor, cu_seqlens_cpu: Tensor | None = None) -> Tensor:
    """Return the sequence of each token, counted without empty ones. Waits as `prepare_position_ids` does."""
    return prepare_position_ids(cu_seqlens, cu_seqlens_cpu).eq(0).cumsum(0) - 1


@answering
def prepare_token_indices(cu_seqlens: Tensor, cu_seqlens_cpu: Tensor | None = None) -> Tensor:
    """Return `(tokens, 2)`: sequence and place. Waits as `prepare_position_ids` does."""
    places = prepare_position_ids(cu_seqlens, cu_seqlens_cpu)
    return torch.stack((prepare_sequence_ids(cu_seqlens, cu_seqlens_cpu), places), 1).to(cu_seqlens)


@answering
def prepare_chunk_indices(cu_seqlens: Tensor, chunk_size: int, cu_seqlens_cpu: Tensor | None = None) -> Tensor:
    """Return `(chunks, 2)`: sequence, and number in it. Waits as `prepare_position_ids` does."""
    whole("prepare_chunk_indices", chunk_size=chunk_size)
    lengths = prepare_lens(cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu)
    return torch.stack(_numbered((lengths + chunk_size - 1) // chunk_size), 1).to(cu_seqlens)


@answering
def prepare_chunk_offsets(cu_seqlens: Tensor, chunk_size: int) -> Tensor:
    """Return `(n + 1,)`: how many chunks there are before each sequence, and at all."""
    whole("prepare_chunk_offsets", chunk_size=chunk_size)
    return pad((prepare_lens(cu_seqlens) + chunk_size - 1) // chunk_size, (1, 0)).cumsum(-1)


@answering
def prepare_chunk_indices_static(cu_seqlens: Tensor, chunk_size: int, nt_max: int) -> tuple[Tensor, Tensor]:
    """Return what `prepare_chunk_indices` and `prepare_chunk_offsets` do, of a fixed shape; nothing waits.

    The first is `(nt_max, 2)`; rows beyond the last chunk are -1 and 0.
    """
    whole("prepare_chunk_indices_static", nt_max=nt_max)
    offsets = prepare_chunk_offsets(cu_seqlens, chunk_size)
    slots = torch.arange(nt_max, device=cu_seqlens.device, dtype=offsets.dtype)
    owner = torch.searchsorted(offsets, slots, right=True) - 1
    is_real = slots < offsets[-1]
    rows = torch.stack((owner.where(is_real, -1), (slots - offsets[owner]).where(is_real, 0)), 1)
    return rows.to(cu_seqlens), offsets.to(cu_seqlens)


@answering
def get_max_num_splits(cu_seqlens: Tensor, chunk_size: int, cu_seqlens_cpu: Tensor | None = None) -> int:
    """Return how many chunks the longest sequence has. Waits as `prepare_position_ids` does."""
    whole("get_max_num_splits", chunk_size=chunk_size)
    longest = int(prepare_lens(cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu).max())
    return -(-longest // chunk_size)


@answering
def prepare_split_cu_seqlens(
    batch_size: int | None = None,
    seq_len: int | None = None,
    split_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype | None = torch.int32,
    device: torch.device | str | None = "cpu",
) -> Tensor:
    """Return where pieces of at most `split_size` tokens end, of rows or of packed sequences; waits for the device.

    Args:
        batch_size, seq_len: of rows behind each other, without `cu_seqlens`.
        split_size: tokens per piece.
        cu_seqlens: of packed sequences.
        dtype, device: of the result.
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
    elif batch_size is not None and seq_len is not None:
        bounds = [row * seq_len for row in range(batch_size + 1)]
    else:
        expected = "a tensor, or batch_size and seq_len"
        raise TypeError(f"prepare_split_cu_seqlens: cu_seqlens: got None, expected {expected}")
    whole("prepare_split_cu_seqlens", split_size=split_size)
    assert split_size is not None
    begins = [at for begin, end in itertools.pairwise(bounds) for at in range(begin, end, split_size)]
    return torch.tensor([*begins, bounds[-1]], dtype=dtype, device=device)


def _kept(cu_seqlens: Tensor, length: int, padding_side: str) -> Tensor:
    """Return which places of padded rows `(n, length)` have tokens."""
    if padding_side not in ("left", "right"):
        raise ValueError(f"pack_sequence: padding_side: got {padding_side!r}, expected 'left' or 'right'")
    places, lengths = torch.arange(length, device=cu_seqlens.device), prepare_lens(cu_seqlens).unsqueeze(1)
    return places < lengths if padding_side == "right" else places >= length - lengths


@answering
def pack_sequence(x: Tensor, cu_seqlens: Tensor, padding_side: str = "left") -> Tensor:
    """Return the tokens `(tokens, ...)` of padded rows `(n, length, ...)`; waits for the device. Differentiable."""
    return x[_kept(cu_seqlens, x.shape[1], padding_side)]


@answering
def unpack_sequence(
    x: Tensor, cu_seqlens: Tensor, padding_side: str = "left", desired_shape: Sequence[int] | None = None
) -> Tensor:
    """Return packed tokens `(tokens, ...)` as rows padded with zeros; waits for the device. Differentiable.

    Args:
        x: the tokens.
        cu_seqlens: `(n + 1,)`.
        padding_side: "left" or "right".
        desired_shape: of the result; None: `(n, longest, ...)`.
    """
    if desired_shape is None:
        desired_shape = (cu_seqlens.shape[0] - 1, int(prepare_lens(cu_seqlens).max()), *x.shape[1:])
    kept = _kept(cu_seqlens, desired_shape[1], padding_side)
    return x.new_zeros(desired_shape).index_put((kept,), x)
