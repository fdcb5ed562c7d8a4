"""Attention of a bound model over packed documents: each document by itself, without a mask of all pairs of tokens.

Transformers keeps documents apart by a mask `(batch, 1, length, length)`, so that a row costs what one document of its
length would, and more, as the fastest kernels of attention take no mask. `ByDocument` stands for such a mask. It is
filled when somebody asks for its numbers; torch's attention, to which Transformers hands it down, does not.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from mamba_ops.registry import runs_at_once

_WIDEST = 256  # channels of a head that kernels of flash attention take
_NO_BACKWARD = range(193, 225)  # which have one on some GPUs alone
_DTYPES = (torch.float16, torch.bfloat16)


class ByDocument(Tensor):
    """A causal mask that keeps documents apart, bool `(batch, 1, length, length)`, of which one number is in memory.

    Made by `by_document`. `scaled_dot_product_attention` with it attends document by document where the device has a
    kernel for that, or is a CPU. For any other function that it is given to, it becomes the mask that it stands for,
    and stays that: what is written into its numbers holds. So it does in a graph, of a layer that is compiled alone.
    """

    _ends: Tensor  # int32 (n + 1,), of all rows' tokens
    _filled: Tensor | None

    def filled(self) -> Tensor:
        """Return the mask with all its numbers."""
        if self._filled is not None:
            return self._filled
        batch, _, length, _ = self.shape
        places = torch.arange(batch * length, dtype=torch.int32, device=self._ends.device)
        number = torch.bucketize(places, self._ends[1:], right=True).view(batch, length)
        whole = (number.unsqueeze(2) == number.unsqueeze(1)).tril().unsqueeze(1)
        if not torch.compiler.is_compiling():
            self._filled = whole
        return whole

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        is_traced = torch.compiler.is_dynamo_compiling()
        if func is F.scaled_dot_product_attention and not is_traced:
            called = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False))
            out = _attended(**called | given)
            if out is not None:
                return out
        elif func in _DESCRIBING or (not is_traced and _is_made_an_input()):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **given)
        filled = functools.partial(tree_map, lambda value: value.filled() if isinstance(value, cls) else value)
        return func(*filled(tuple(args)), **filled(given))


_DESCRIBING = {  # what is known without the numbers
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.get_device),
    *(Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, torch.is_complex),
}


def _is_made_an_input() -> bool:
    """Return whether a compiler asks what a tensor is: its guards are on what is in memory."""
    return TracingContext.try_get() is not None


def by_document(cu_seqlens: Tensor, batch: int, length: int) -> Tensor:
    """Return a mask that is filled when its numbers are asked for.

    Args:
        cu_seqlens: int32 or int64 `(n + 1,)` of the tokens of all rows, each of which begins a document; those after
            the last are one, too.
        batch, length: of the rows.
    """
    tokens = batch * length
    # A kernel reads where these point: they are kept in order, and within the rows.
    inner = cu_seqlens[1:].clamp(0, tokens).cummax(0).values
    ends = torch.cat((inner.new_zeros(1), inner, inner.new_full((1,), tokens))).int()
    # What reads memory past torch finds that no token is seen, not that all are.
    one = torch.zeros((), dtype=torch.bool, device=cu_seqlens.device)
    mask = Tensor._make_subclass(ByDocument, one.expand(batch, 1, length, length))
    mask._ends, mask._filled = ends, None
    return mask


def can_be_by_document(config: Any, tokens: Tensor) -> bool:
    """Return whether a call's attention is torch's own and causal, on a device where documents can be told apart."""
    is_sdpa = getattr(config, "_attn_implementation", None) == "sdpa" and getattr(config, "is_causal", True)
    has_kernel = tokens.device.type == "cpu" or (tokens.is_cuda and _varlen() is not None)
    return is_sdpa and has_kernel and runs_at_once(tokens)


@functools.cache
def _varlen() -> Callable[..., Any] | None:
    """Return torch's attention over packed sequences, in the form that this file calls, or None.

    ROCm's refuses some GPUs, and keeps numbers of all documents at the length of the rows: it is not called.
    """
    if torch.version.hip is not None:
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"scale", "window_size"} <= set(inspect.signature(varlen_attn).parameters) else None


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Return what each document attends to, all `(batch, heads, length, dim)`; None: no kernel here does that."""
    if (
        type(attn_mask) is not ByDocument
        or attn_mask._filled is not None
        or is_causal
        or not query.dim() == key.dim() == value.dim() == 4
    ):
        return None
    batch, length = attn_mask.shape[0], attn_mask.shape[-1]
    if any((t.shape[0], t.shape[2]) != (batch, length) for t in (query, key, value)):
        return None
    ends = attn_mask._ends
    dense = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]  # (tokens, heads, dim)
    if _is_cpu(query):
        lengths = [length for length in ends.diff().tolist() if length] or [0]
        of_documents = [t.transpose(0, 1).unsqueeze(0).split(lengths, 2) for t in dense]
        options: Any = {"dropout_p": dropout_p, "is_causal": True, "scale": scale, "enable_gqa": enable_gqa}
        parts = [F.scaled_dot_product_attention(*of_one, **options) for of_one in zip(*of_documents, strict=True)]
        out = torch.cat(parts, 2)[0].transpose(0, 1)
    elif _fits_varlen(query, key, value) and not dropout_p and not enable_gqa:
        varlen = _varlen()
        assert varlen is not None
        out = varlen(*dense, ends, ends, length, length, scale=scale, window_size=(-1, 0))
    else:
        return None
    return cast(Tensor, out.unflatten(0, (batch, length)).transpose(1, 2))


def _is_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _fits_varlen(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether torch's flash attention takes them: heads of a multiple of 8, on GPUs from sm_80 on."""
    dim = query.shape[-1]
    is_one_kind = query.dtype == key.dtype == value.dtype and query.shape == key.shape == value.shape
    fits = is_one_kind and query.dtype in _DTYPES and dim <= _WIDEST and dim % 8 == 0 and dim not in _NO_BACKWARD
    return fits and torch.get_device_module(query.device).get_device_capability(query.device) >= (8, 0)
