"""Decoding with the models of mamba_ssm: the original's functions, with a device's graphs where it has some."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mamba_ops.registry import generation
from mamba_ops.serving.capture import graphs_of


@dataclass
class InferenceParams:
    """What is kept between calls of a model: states by layer, and how many tokens came before."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begin anew, with the states' memory."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


@dataclass
class DecoderOutput:
    """Tokens `(batch, length)`, the prompt's first, and the logits that each of the others was chosen by."""

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None


class Streamer(Protocol):
    """What tokens are given to as they come, a streamer of Transformers say."""

    def put(self, value: Tensor) -> None:
        """Take tokens."""

    def end(self) -> None:
        """Take notice that there are no more."""


def modify_logit_for_repetition_penalty(
    logits: Tensor, prev_output_tokens: Tensor, repetition_penalty: float = 1.0
) -> Tensor:
    """Make tokens that were there less likely, in place."""
    if repetition_penalty == 1.0:
        return logits
    score = logits.gather(1, prev_output_tokens)
    score = torch.where(score < 0, score * repetition_penalty, score / repetition_penalty)
    return logits.scatter_(1, prev_output_tokens, score)


def modify_logits_for_min_p_filtering(logits: Tensor, min_p: float) -> None:
    """Set logits below `min_p` to -inf, in place; outside of 0 to 1 it is of no effect."""
    if 0 < min_p < 1:
        logits.masked_fill_(logits < min_p, -torch.inf)


def modify_logits_for_top_k_filtering(logits: Tensor, top_k: int) -> None:
    """Set all logits but the `top_k` largest of each row to -inf, in place."""
    logits.masked_fill_(logits < logits.topk(top_k, dim=-1).values[..., -1:], -torch.inf)


def modify_logits_for_top_p_filtering(logits: Tensor, top_p: float) -> None:
    """Set logits to -inf, in place, but those of the likeliest tokens whose probabilities sum to `top_p`."""
    if 0 < top_p < 1:
        ordered, order = logits.sort(dim=-1)
        rare = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        logits.masked_fill_(rare.scatter(-1, order, rare), -torch.inf)


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """Return a token for each row of `(batch, vocabulary)`.

    Args:
        logits: of the next token.
        top_k: how many tokens may be chosen; 1: the likeliest is, 0: all may.
        top_p: the likeliest tokens whose probabilities sum to this may be chosen; 0 and 1: all.
        min_p: tokens that are this part as likely as the likeliest may be chosen, with `top_k` 0; 0: all.
        temperature: what logits are divided by.
    """
    if not 0 <= top_p <= 1:
        raise ValueError(f"sample: top_p: got {top_p}, expected 0 to 1")
    if top_k == 1:
        return logits.argmax(dim=-1)
    chosen = None
    if top_k > 0:
        logits, chosen = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    elif min_p > 0:
        likely = logits.softmax(-1)
        logits = logits.masked_fill(likely < min_p * likely.amax(-1, keepdim=True), -torch.inf)
    logits = logits / temperature
    modify_logits_for_top_p_filtering(logits, top_p)
    token = torch.multinomial(logits.softmax(-1), 1)
    return (token if chosen is None else chosen.gather(-1, token)).squeeze(-1)


@torch.inference_mode()
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    output_scores: bool = False,
    streamer: Streamer | None = None,
) -> DecoderOutput:
    """Continue prompts `(batch, length)` of one length, up to `max_length` tokens, or until all rows end.

    Args:
        input_ids: the prompts.
        model: a `MambaLMHeadModel`, or what is called alike.
        max_length: of prompt and answer together.
        top_k, top_p, min_p, temperature: as for `sample`.
        repetition_penalty: as for `modify_logit_for_repetition_penalty`; of all tokens before, the prompt's too.
        eos_token_id: the token that ends a row.
        teacher_outputs: tokens `(batch, length)` to go on with instead of those that would be chosen.
        vocab_size: how many tokens may be chosen; None: all that the head knows.
        cg: whether steps are captured and replayed, on devices that have graphs; elsewhere of no effect.
        enable_timing: whether to print how long it took.
        output_scores: whether to keep the logits.
        streamer: what is given the tokens as they come.
    """
    watch = _Watch(input_ids.device) if enable_timing else None
    if streamer is not None:
        streamer.put(input_ids.cpu())
    batch, prompt = input_ids.shape
    taught = 0 if teacher_outputs is None else teacher_outputs.shape[1]
    if cg and graphs_of(input_ids.device) is not None:
        cache = update_graph_cache(model, getattr(model, "_decoding_cache", None), batch, prompt, max_length)
        model._decoding_cache = cache
        params = cache.inference_params
        params.reset(max_length, batch)
    else:
        cache, params = None, InferenceParams(max_seqlen=max_length, max_batch_size=batch)

    sequences, tokens, scores = input_ids, input_ids, []
    while True:
        decoding = params.seqlen_offset > 0
        positions = torch.full_like(tokens, params.seqlen_offset)
        if cache is not None and decoding:
            logits = cache.run(tokens, positions, params.seqlen_offset)
        else:
            places = positions if decoding else None
            logits = model(tokens, position_ids=places, inference_params=params, num_last_tokens=1).logits
        logits = logits.squeeze(1)[..., :vocab_size]
        if output_scores:
            scores.append(logits.clone())
        params.seqlen_offset += tokens.shape[1]
        if teacher_outputs is not None and taught > params.seqlen_offset:
            tokens = teacher_outputs[:, params.seqlen_offset].unsqueeze(1)
        else:
            logits = modify_logit_for_repetition_penalty(logits, sequences, repetition_penalty)
            tokens = sample(logits, top_k, top_p, min_p, temperature).unsqueeze(1)
        sequences = torch.cat((sequences, tokens), dim=1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        if params.seqlen_offset >= max_length - 1:
            break
        if eos_token_id is not None and bool((tokens == eos_token_id).all()):
            break
    if streamer is not None:
        streamer.end()
    if watch is not None:
        sys.stdout.write(f"prompt and decoding: {watch.milliseconds():.0f} ms\n")
    return DecoderOutput(sequences, tuple(scores))


class GenerationMixin:
    """Gives a model `generate`."""

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: Any = None, **kwargs: Any) -> Any:
        """Return new states of all layers, by index: the model's own method."""
        expected = "a model that has it"
        raise NotImplementedError(f"allocate_inference_cache: got a {type(self).__name__}, expected {expected}")

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return what `decode` does: the tokens alone, or with `return_dict_in_generate` all of it."""
        options: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "temperature": temperature}
        output = decode(input_ids, self, max_length, **options, output_scores=output_scores, **kwargs)
        if not output_scores:
            output.scores = None
        return output if return_dict_in_generate else output.sequences


@dataclass
class DecodingCGCache:
    """Captured steps of a model by batch size and number of tokens, and what they are for."""

    max_batch_size: int = 0
    max_seqlen: int = 0
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    callables: dict[tuple[int, int], Callable[..., Tensor]] = field(default_factory=dict)
    inference_params: Any = None
    graphs: Any = None
    generation: int = -1

    def run(self, input_ids: Tensor, position_ids: Tensor, seqlen: int) -> Tensor:
        """Replay the step for tokens of this shape; return its logits."""
        batch, count = input_ids.shape
        return self.callables[batch, count](input_ids, position_ids, seqlen)


@torch.inference_mode()
def update_graph_cache(
    model: Any,
    cache: DecodingCGCache | None,
    batch_size: int,
    seqlen_og: int,
    max_seqlen: int,
    decoding_seqlens: tuple[int, ...] = (1,),
    dtype: torch.dtype | None = None,
    n_warmups: int = 2,
) -> DecodingCGCache:
    """Return captured steps for these sizes: those of `cache` as far as they serve, and new ones.

    A swap of backends since, or larger sizes, make all of them new.
    """
    cache = DecodingCGCache() if cache is None else cache
    example = next(iter(model.parameters()))
    kind = (example.device, example.dtype if dtype is None else dtype)
    fits = batch_size <= cache.max_batch_size and max_seqlen <= cache.max_seqlen
    if kind != (cache.device, cache.dtype) or not fits or cache.generation != generation():
        cache = DecodingCGCache(batch_size, max_seqlen, *kind, generation=generation())
        cache.graphs = graphs_of(example.device)
        if cache.graphs is None:
            expected = "one that has graphs"
            raise ValueError(f"update_graph_cache: model: got parameters on {example.device}, expected {expected}")
        lengths = torch.full((batch_size,), seqlen_og, dtype=torch.int32, device=example.device)
        states = model.allocate_inference_cache(batch_size, max_seqlen, cache.dtype)
        cache.inference_params = InferenceParams(
            max_seqlen, batch_size, seqlen_og, key_value_memory_dict=states, lengths_per_sample=lengths
        )
    for count in decoding_seqlens:
        if (batch_size, count) not in cache.callables:
            cache.callables[batch_size, count] = _captured(model, cache, batch_size, count, n_warmups)
    cache.inference_params.seqlen_offset = 0
    return cache


@torch.no_grad()
def capture_graph(
    model: Any,
    inference_params: Any,
    batch_size: int,
    max_seqlen: int,
    decoding_seqlen: int = 1,
    mempool: object = None,
    n_warmups: int = 2,
) -> Callable[..., Tensor]:
    """Return a function of tokens, positions and the place of the first that replays a captured step of a model.

    Args:
        model: what is captured; on a device that has graphs.
        inference_params: its states, with `lengths_per_sample`.
        batch_size, decoding_seqlen: the shape of the tokens.
        max_seqlen: how many tokens the states have room for.
        mempool: of no effect: all graphs of a device share one pool.
        n_warmups: how often the step runs before it is captured, at least once.
    """
    example = next(iter(model.parameters()))
    graphs, before = graphs_of(example.device), inference_params.seqlen_offset
    if graphs is None:
        expected = "one that has graphs"
        raise ValueError(f"capture_graph: model: got parameters on {example.device}, expected {expected}")
    cache = DecodingCGCache(batch_size, max_seqlen, example.device, example.dtype)
    cache.inference_params, cache.graphs = inference_params, graphs
    run = _captured(model, cache, batch_size, decoding_seqlen, n_warmups)
    inference_params.seqlen_offset = before
    return run


def _captured(model: Any, cache: DecodingCGCache, batch: int, count: int, warmups: int) -> Callable[..., Tensor]:
    """Capture a step at the last place that there is; it reads its place from `lengths_per_sample`."""
    params = cache.inference_params
    tokens = torch.zeros(batch, count, dtype=torch.long, device=cache.device)
    positions = torch.zeros_like(tokens)
    params.seqlen_offset = cache.max_seqlen - count
    params.lengths_per_sample.fill_(params.seqlen_offset)

    def step() -> Tensor:
        result = model(tokens, position_ids=positions, inference_params=params, num_last_tokens=count)
        logits: Tensor = result.logits
        return logits

    for _ in range(max(warmups, 1)):
        step()
    logits: Tensor
    logits, replay = cache.graphs.record(step)

    def run(input_ids: Tensor, position_ids: Tensor, seqlen: int) -> Tensor:
        params.lengths_per_sample.fill_(seqlen)
        tokens.copy_(input_ids)
        positions.copy_(position_ids)
        replay()
        return logits.clone()

    return run


class _Watch:
    """Measures how long a device took."""

    def __init__(self, device: torch.device) -> None:
        self._module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._begin = self._now()

    def _now(self) -> float:
        if self._module is not None:
            self._module.synchronize()
        return time.perf_counter()

    def milliseconds(self) -> float:
        return (self._now() - self._begin) * 1000
