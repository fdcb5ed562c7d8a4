"""Tokens in chunks of vLLM's, which may be shorter than the chunk size anywhere."""

import torch
from torch import Tensor


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
