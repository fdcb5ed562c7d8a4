"""What a mixer of Transformers is called with, for the functions that it calls without handing that down.

A modeling file's functions are looked up by name, so they do not know who calls them. While `use_mamba_ops` binds a
file, its mixers' `forward` note here what they were given: where packed documents begin, and the state before. It is
noted by thread, in what Dynamo traces too, and anew where a checkpointed layer is computed once more. Documents reach
mixers by their own keywords, or, as some models drop these on the way, from the call of the model.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mamba_ops.compat.packing import begins_anew, cu_seqlens_of, remember
from mamba_ops.compat.transformers_attention import by_document, can_be_by_document

CACHES = ("cache", "cache_params", "past_key_values")  # what Transformers calls one, by version and family


class Mixing:
    """A call of a mixer.

    Attributes:
        length: tokens of a row.
        cu_seqlens, seq_idx: where packed documents begin; both None: every row is one.
    """

    def __init__(
        self, length: int, cu_seqlens: Tensor | None, seq_idx: Tensor | None, state: Callable[[], Tensor | None]
    ) -> None:
        """`state` reads the scan's state before, of a cache; None: there is none."""
        self.length, self.cu_seqlens, self.seq_idx, self._read_state = length, cu_seqlens, seq_idx, state
        self._scans = 0

    def packing(self, length: int) -> dict[str, Tensor | None]:
        """Return how the functions of `compat` are told of documents in rows that have so many tokens.

        There are more than `length` where a convolution gets what a cache holds before them; they are the first's.
        """
        before = length - self.length
        cu_seqlens, seq_idx = self.cu_seqlens, self.seq_idx
        if before and cu_seqlens is not None:
            cu_seqlens = torch.cat((cu_seqlens[:1], cu_seqlens[1:] + before))
        if before and seq_idx is not None:
            seq_idx = torch.cat((seq_idx[:, :1].expand(-1, before), seq_idx), dim=1)
        return {"cu_seqlens": cu_seqlens, "seq_idx": None if cu_seqlens is not None else seq_idx}

    def next_state(self) -> Tensor | None:
        """Return the state before of the mixer's next scan: mixers with several have one after the other."""
        state, scan = self._read_state(), self._scans
        self._scans += 1
        return state[:, scan] if state is not None and state.dim() == 4 else state


class Documents(NamedTuple):
    """Where packed documents begin, as a model was told."""

    cu_seqlens: Tensor | None
    seq_idx: Tensor | None


class Attention(NamedTuple):
    """What a model's attention is to know of documents.

    Attributes:
        positions: each token's place in its document.
        numbers: that of its document.
        documents: as the model was told.
        is_masked: whether there is a mask, too.
    """

    positions: Tensor
    numbers: Tensor
    documents: Documents
    is_masked: bool


class _Here(threading.local):
    def __init__(self) -> None:  # in every thread: Dynamo guards that what a graph sets was there, or was not
        self.mixing: Mixing | None = None
        self.documents: Documents | None = None
        self.attention: Attention | None = None
        self.is_inside = False


_here = _Here()


def current_mixing() -> Mixing | None:
    """Return the call of a mixer that is under way in this thread."""
    return _here.mixing


def noting(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a mixer's `forward` that notes what it is called with."""
    names = list(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        mixing = _mixing_of(self, given[names[0]], given)
        before, _here.mixing = _here.mixing, mixing
        try:
            return forward(self, *args, **kwargs)
        finally:
            _here.mixing = before

    return call


def _mixing_of(mixer: nn.Module, tokens: Tensor, given: dict[str, Any]) -> Mixing:
    length = tokens.shape[1]
    if length == 1:  # a step of decoding: its token follows what the cache holds
        return Mixing(length, None, None, _none)
    documents = _documents_of(given, tokens)
    if documents is None:
        documents = _documents_above(mixer)
    cu_seqlens, seq_idx = documents or (None, None)
    cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
    return Mixing(length, cu_seqlens, seq_idx, _none if cache is None else lambda: _state_in(cache, mixer))


def _none() -> None:
    return None


def _state_in(cache: Any, mixer: Any) -> Tensor | None:
    """Return the state that a cache holds for a mixer; before the first call there is none, or zeros."""
    if (read := getattr(cache, "get_recurrent_state", None)) is not None:
        state: Tensor | None = read(mixer.layer_idx)
        return state
    states = getattr(cache.layers[mixer.layer_idx], "recurrent_states", None)  # in Transformers 5.17
    return None if states is None else states[0]


def _documents_above(mixer: nn.Module) -> Documents | None:
    """Return the documents of the model's call; raise if a mixer that was told of some is computed outside of one."""
    documents = _here.documents
    if torch.compiler.is_compiling():
        return documents
    told = vars(mixer)
    if _here.is_inside or documents is not None:
        told["_mamba_ops_was_told"] = documents is not None
    elif told.get("_mamba_ops_was_told"):
        name, expected = type(mixer).__name__, "a call of its model, or of a layer that Transformers checkpoints"
        raise ValueError(
            f"{name}: seq_idx, cu_seq_lens_q, position_ids: got a call that does not say where documents begin, after "
            f"one that did, expected {expected}; checkpoint with model.gradient_checkpointing_enable()"
        )
    return documents


def _documents_of(given: dict[str, Any], tokens: Tensor | None) -> Documents | None:
    """Return which documents the arguments of a call tell of; of two that may disagree, what scans and attention read.

    That is `cu_seq_lens_q`, but for several rows, which it can't tell of.
    """
    cu_seqlens, seq_idx = given.get("cu_seq_lens_q"), given.get("seq_idx")
    if cu_seqlens is None and seq_idx is None:
        seq_idx = packed_positions(given)
    if cu_seqlens is not None and seq_idx is not None and tokens is not None:
        cu_seqlens, seq_idx = (cu_seqlens, None) if tokens.shape[0] == 1 else (None, seq_idx)
    return None if cu_seqlens is None and seq_idx is None else Documents(cu_seqlens, seq_idx)


def packed_positions(given: dict[str, Any]) -> Tensor | None:
    """Return the document of each token, if positions say that there are several; as Transformers' attention does.

    That is where there is neither mask nor cache. An eager call waits for the device.
    """
    positions = given.get("position_ids")
    if positions is None or given.get("attention_mask") is not None:
        return None
    if any(given.get(name) is not None for name in CACHES):
        return None
    if positions.dim() == 3:  # of several axes; the text's comes first where there is one
        if positions.shape[0] != 4:
            return None
        positions = positions[0]
    if positions.dim() != 2 or positions.shape[1] < 2:
        return None
    begins = pad(positions[:, 1:] - positions[:, :-1] != 1, (1, 0))
    if (tokens := _tokens_of(given)) is not None:
        begins = begins.expand(tokens.shape[0], -1)
    if torch.compiler.is_compiling():
        return begins.cumsum(1)
    return remember(begins.cumsum(1)) if bool(begins.any()) else None


def telling(forward: Callable[..., Any], is_innermost: bool, has_deaf_attention: bool = False) -> Callable[..., Any]:
    """Return a model's `forward` that sees to it that its mixers know of documents, and its attention where it can.

    Args:
        forward: of a model, or of a model around one.
        is_innermost: whether it is no model around one. Its layers are told too, as far as they take keywords.
        has_deaf_attention: whether it has attention that takes no masks which know of documents: they are refused.
    """
    parameters = inspect.signature(forward).parameters
    names = list(parameters)[1:]
    takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    @functools.wraps(forward)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        before = _here.documents, _here.attention, _here.is_inside
        documents = _documents_of(given, _tokens_of(given)) or before[0]
        attention = _attention_of(documents, given) if before[1] is None else before[1]
        if is_innermost and documents is not None:
            if has_deaf_attention:
                _refuse(self, _tokens_of(given), "its attention makes no mask by positions")
            if takes_more:
                told = {"cu_seq_lens_q": documents.cu_seqlens, "seq_idx": documents.seq_idx}
                kwargs |= {name: value for name, value in told.items() if value is not None}
            if attention is not None and "position_ids" in names and given.get("position_ids") is None:
                kwargs["position_ids"] = attention.positions
            if self.training:
                _carry(self)
        _here.documents, _here.attention, _here.is_inside = documents, attention, True
        try:
            return forward(self, *args, **kwargs)
        finally:
            _here.documents, _here.attention, _here.is_inside = before

    return call


def _attention_of(documents: Documents | None, given: dict[str, Any]) -> Attention | None:
    """Return what attention is to know in a call without a cache, where documents are known."""
    tokens, mask = _tokens_of(given), given.get("attention_mask")
    if documents is None or tokens is None or any(given.get(name) is not None for name in CACHES):
        return None
    length = tokens.shape[1]
    cu_seqlens, seq_idx = documents
    if cu_seqlens is not None and cu_seqlens.dim() != 1:
        raise ValueError(f"cu_seq_lens_q: got shape {tuple(cu_seqlens.shape)}, expected (n + 1,): where documents end")
    if seq_idx is not None and seq_idx.shape[1:] != (length,):
        raise ValueError(f"seq_idx: got shape {tuple(seq_idx.shape)}, expected (batch, {length}), as tokens have")
    places = torch.arange(length, device=tokens.device)
    if cu_seqlens is not None:
        numbers = torch.bucketize(places, cu_seqlens[1:].long(), right=True)[None]
    else:
        assert seq_idx is not None
        numbers = begins_anew(seq_idx).cumsum(1).expand(tokens.shape[0], -1)
    begins = torch.where(begins_anew(numbers), places, 0).cummax(1).values
    return Attention(places - begins, numbers, documents, mask is not None)


def _tokens_of(given: dict[str, Any]) -> Tensor | None:
    tokens = given.get("input_ids")
    return given.get("inputs_embeds", given.get("hidden_states")) if tokens is None else tokens


MASKS = ("create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask")


def hearing(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that makes the masks of a model's attention, and knows of its documents.

    Transformers' own goes by positions, which some models do not hand down; with a mask, or where a new cache was made
    before, by nothing.
    """
    names = list(inspect.signature(make).parameters)
    cache = next((name for name in CACHES if name in names), CACHES[-1])

    @functools.wraps(make)
    def call(*args: Any, **kwargs: Any) -> Any:
        if (attention := _here.attention) is None:
            return make(*args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        if attention.is_masked:
            return _apart(make(**given | {"allow_is_causal_skip": False}), attention.numbers)
        given = {name: value for name, value in given.items() if name not in CACHES}
        given |= {cache: None, "position_ids": attention.positions}
        if make.__name__ == MASKS[0] and _is_plain(given):
            tokens = next((given[name] for name in ("inputs_embeds", "input_embeds") if name in given), None)
            if tokens is not None and can_be_by_document(given["config"], tokens):
                ends = _ends_of(attention.documents, tokens.shape[0])
                if ends is not None:
                    return by_document(ends, *tokens.shape[:2])
        return make(**given)

    return call


def _ends_of(documents: Documents, batch: int) -> Tensor | None:
    """Return where the documents of all rows end, as the ops are told; None: a mask alone knows."""
    if documents.cu_seqlens is not None:
        return documents.cu_seqlens if batch == 1 else None
    if documents.seq_idx is None or documents.seq_idx.shape[0] != batch:
        return None
    return cu_seqlens_of(documents.seq_idx)


def _is_plain(given: dict[str, Any]) -> bool:
    """Return whether a causal mask is asked for, and nothing that changes it, as padding does that a model adds."""
    usual = {"config", "inputs_embeds", "input_embeds", "cache_position", "position_ids", *CACHES}
    return all(value is None for name, value in given.items() if name not in usual)


def _apart(mask: Any, numbers: Tensor) -> Any:
    """Return a mask `(batch, 1, length, length)` in which the documents of these numbers do not see each other.

    What is no such mask, for kernels that take none, stays as it is.
    """
    if not isinstance(mask, Tensor) or mask.shape[-2:] != 2 * numbers.shape[1:]:
        return mask
    is_same = (numbers.unsqueeze(2) == numbers.unsqueeze(1)).unsqueeze(1)
    return mask & is_same if mask.dtype == torch.bool else mask.masked_fill(~is_same, torch.finfo(mask.dtype).min)


def refusing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the `forward` of a layer that keeps states by code of its own, which takes no packed documents."""

    @functools.wraps(forward)
    def call(self: nn.Module, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _here.documents is not None:
            _refuse(self, tokens, "what it keeps of one, by its own code, would reach the next")
        return forward(self, tokens, *args, **kwargs)

    return call


def _refuse(module: nn.Module, tokens: Tensor | None, why: str) -> None:
    """Raise about documents in rows of several tokens. A graph does not know whether positions tell of some."""
    if tokens is not None and tokens.shape[1] == 1:
        return
    where = ", and in a graph no position_ids" if torch.compiler.is_compiling() else ""
    raise ValueError(f"{type(module).__name__}: got packed documents, expected one a row{where}: {why}")


def _carry(model: nn.Module) -> None:
    """Let the layers that Transformers checkpoints know of documents when backward computes them once more."""
    for module in model.modules():
        checkpoint = vars(module).get("_gradient_checkpointing_func")
        if checkpoint is not None and not hasattr(checkpoint, "carries_documents"):
            module._gradient_checkpointing_func = _Carrying(checkpoint)  # type: ignore[assignment]


class _Carrying:
    """What checkpoints layers, and tells them of documents when they are computed once more."""

    carries_documents = True

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self._checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        documents = _here.documents
        if documents is None:
            return self._checkpoint(function, *args, **kwargs)

        def told(*args: Any, **kwargs: Any) -> Any:
            before, _here.documents = _here.documents, documents
            try:
                return function(*args, **kwargs)
            finally:
                _here.documents = before

        return self._checkpoint(told, *args, **kwargs)
