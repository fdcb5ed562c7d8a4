"""Tokens in chunks of vLLM's, which may be shorter than the chunk size anywhere; and where their last states go."""

import torch
from torch import Tensor

from mamba_ops.ops._common.checking import count_of, one_device, shape_is, slot_table, tensor_rank
from mamba_ops.ops._common.values import slots_in_cache
from mamba_ops.registry import bad_argument, is_plain
from mamba_ops.registry.errors import in_call_of


def check_final_states(cache: Tensor, sizes: tuple[int, ...], slots: Tensor, n: int) -> None:
    """Raise, before anything is written, if the last states of n sequences can't be stored in a cache afterwards."""
    function = "mamba_chunk_scan_combined_varlen"
    try:
        shape_is("final_states_out", cache, (count_of(cache), *sizes), hint="(slots, heads, dim, dstate)")
        tensor_rank("final_state_indices", slots, {1: "(n,)"})
        slot_table("final_state_indices", slots, rows=n)
        one_device(slots.device, "final_state_indices", final_states_out=cache)
        if is_plain(cache) != is_plain(slots):
            got, expected = f"a {type(cache).__name__}", f"a {type(slots).__name__}, as final_state_indices is"
            raise bad_argument("final_states_out", got=got, expected=expected)
        if slots.device.type == "cpu":  # elsewhere looking would wait
            slots_in_cache("final_state_indices", slots[:n], slots[:n] >= 0, cache, "final_states_out")
    except ValueError as error:
        raise in_call_of(function, error) from None


class Chunks:
    """Tokens with every chunk padded to its full size: a step size of zero leaves the state as it is."""

    def __init__(self, cu_chunk_seqlens: Tensor, tokens: int, size: int) -> None:
        starts, ends = cu_chunk_seqlens[:-1].long(), cu_chunk_seqlens[1:].long()
        self.tokens = starts.shape[0] * size
        index = starts.unsqueeze(1) + torch.arange(size, device=starts.device)
        self._inside = (index < ends.unsqueeze(1)).flatten()
        self._index = index.flatten().clamp(max=max(tokens - 1, 0))
        token = torch.arange(tokens, device=starts.device)
        chunk = (torch.searchsorted(cu_chunk_seqlens, token, right=True) - 1).clamp(max=max(starts.shape[0] - 1, 0))
        self._owned = token < cu_chunk_seqlens[-1]
        self._padded_index = (chunk * size + token - starts[chunk]).clamp(max=max(self.tokens - 1, 0))

    def padded(self, tensor: Tensor) -> Tensor:
        """Return an activation `(tokens, ...)` in the padded layout."""
        return torch.where(self._inside.view(-1, *[1] * (tensor.dim() - 1)), tensor[self._index], 0)

    def unpad(self, padded: Tensor, out: Tensor) -> None:
        """Write what was computed on padded tokens to `out`; tokens outside all chunks stay as they are."""
        if self.tokens and out.numel():
            out.copy_(torch.where(self._owned.view(-1, 1, 1), padded[self._padded_index], out))
