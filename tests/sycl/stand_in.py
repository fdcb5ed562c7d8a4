"""A stand-in for `torch.ops._xpu_C.gdn_attention` of vllm_xpu_kernels, on CPU tensors.

It is not the vendor's kernel: it has its schema, in the two forms that were released, holds every argument to what is
documented of shapes, dtypes and layouts, and computes in a loop of its own. So it shows that the adapter says the right
thing to an op of that description; that the vendor's op is of that description, hardware alone can show.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mamba_ops.registry.dispatcher import dispatcher

_HEAD = """gdn_attention(Tensor(a!) core_attn_out, Tensor(b!) z, Tensor projected_states_qkvz,
 Tensor projected_states_ba, int num_k_heads, int num_v_heads, int head_k_dim, int head_v_dim, Tensor(c!) conv_state,
 Tensor(d!) ssm_state, Tensor conv_weights, Tensor? conv_bias, str activation, Tensor A_log, Tensor dt_bias,
 int num_prefills, int num_decodes, """
_TAIL = "int num_actual_tokens, int tp_size, bool reorder_input) -> ()"
SCHEMAS = {
    "old": _HEAD
    + """Tensor? has_initial_state, Tensor non_spec_query_start_loc, Tensor non_spec_state_indices_tensor, """
    + _TAIL,
    "new": _HEAD
    + """int num_spec_decodes, Tensor? has_initial_state, Tensor? non_spec_query_start_loc,
 Tensor? non_spec_token_indx, Tensor? non_spec_state_indices_tensor, Tensor? spec_query_start_loc,
 Tensor? spec_token_indx, Tensor? spec_state_indices_tensor, Tensor? num_accepted_tokens, """
    + _TAIL,
}
calls: list[dict[str, Any]] = []


@contextmanager
def installed(form: str) -> Iterator[list[dict[str, Any]]]:
    """Register the op in one of its forms; yield the list of the calls that it gets."""
    library = torch.library.Library("_xpu_C", "FRAGMENT")
    library.define(SCHEMAS[form].replace("\n", ""))
    names = [argument.name for argument in torch.ops._xpu_C.gdn_attention.default._schema.arguments]

    def run(*args: Any) -> None:
        arguments = dict(zip(names, args, strict=True))
        calls.append(arguments)
        _attention(**arguments)

    library.impl("gdn_attention", run, "CPU")
    calls.clear()
    dispatcher.changed()  # what was decided with another form of the package, or without it, holds no longer
    try:
        yield calls
    finally:
        library._destroy()
        dispatcher.changed()


def _is(tensor: Tensor, dtype: torch.dtype, *shape: int, dense: bool = True) -> None:
    assert tensor.dtype == dtype, (tensor.dtype, dtype)
    assert tuple(tensor.shape) == shape, (tensor.shape, shape)
    assert tensor.device.type == "cpu"
    assert not dense or tensor.is_contiguous()


def _attention(
    core_attn_out: Tensor,
    z: Tensor,
    projected_states_qkvz: Tensor,
    projected_states_ba: Tensor,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weights: Tensor,
    conv_bias: Tensor | None,
    activation: str,
    A_log: Tensor,
    dt_bias: Tensor,
    num_prefills: int,
    num_decodes: int,
    has_initial_state: Tensor | None,
    non_spec_query_start_loc: Tensor | None,
    non_spec_state_indices_tensor: Tensor | None,
    num_actual_tokens: int,
    tp_size: int,
    reorder_input: bool,
    num_spec_decodes: int = 0,
    non_spec_token_indx: Tensor | None = None,
    spec_query_start_loc: Tensor | None = None,
    spec_token_indx: Tensor | None = None,
    spec_state_indices_tensor: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
) -> None:
    K, HK, HV, V, total = head_k_dim, num_k_heads // tp_size, num_v_heads // tp_size, head_v_dim, num_actual_tokens
    ratio, kind = HV // HK, projected_states_qkvz.dtype
    most, width = projected_states_qkvz.shape[0], conv_weights.shape[1]
    dim = 2 * HK * K + HV * V
    assert kind in (torch.float16, torch.bfloat16)
    assert activation in ("silu", "swish")
    assert HV % HK == 0
    assert HV % 4 == 0
    assert K in (32, 64, 128, 256)
    assert V % 32 == 0
    assert 1 <= width <= 5
    assert 0 < total <= most
    for tensor in (core_attn_out, z):
        _is(tensor, kind, most, HV, V)
    _is(projected_states_qkvz, kind, most, dim + HV * V)
    _is(projected_states_ba, kind, most, 2 * HV)
    _is(conv_state, kind, conv_state.shape[0], width - 1, dim, dense=False)
    _is(conv_state[:1], kind, 1, width - 1, dim)
    assert ssm_state.shape[1:] == (HV, V, K)
    assert ssm_state[:1].is_contiguous()
    _is(conv_weights, kind, dim, width)
    if conv_bias is not None:
        _is(conv_bias, kind, dim)
    _is(A_log, torch.float32, HV)
    _is(dt_bias, kind, HV)
    slots = conv_state.shape[0]

    def token(at: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is convolved, gate, b and a of a token."""
        row, ba = projected_states_qkvz[at], projected_states_ba[at].float()
        if reorder_input:
            return row[:dim], row[dim:].view(HV, V), ba[:HV], ba[HV:]
        heads, gates = row.view(HK, -1), ba.view(HK, 2, ratio)
        q, k, v = heads[:, :K], heads[:, K : 2 * K], heads[:, 2 * K : 2 * K + ratio * V]
        gate = heads[:, 2 * K + ratio * V :].reshape(HV, V)
        mixed = torch.cat([q.reshape(-1), k.reshape(-1), v.reshape(-1)])
        return mixed, gate, gates[:, 0].reshape(-1), gates[:, 1].reshape(-1)

    def advance(at: int, window: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Compute one token; return the window and the state behind it."""
        mixed, gate, b, a = token(at)
        z[at] = gate
        window = torch.cat([window, mixed.unsqueeze(0)])
        total = torch.einsum("td,dt->d", window.float(), conv_weights.float())
        total = total if conv_bias is None else total + conv_bias.float()
        mixed = (total / (1 + torch.exp(-total))).to(kind).float()
        q, k, v = mixed[: HK * K].view(HK, K), mixed[HK * K : 2 * HK * K].view(HK, K), mixed[2 * HK * K :].view(HV, V)
        q, k = (x / (x.pow(2).sum(1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        step = a + dt_bias.float()
        step = torch.where(step < 20, torch.log(1 + torch.exp(step)), step)
        decay, much = torch.exp(-torch.exp(A_log) * step), 1 / (1 + torch.exp(-b))
        state = state.clone()
        for h in range(HV):
            key, query = k[h // ratio], q[h // ratio] * K**-0.5
            state[h] *= decay[h]
            state[h] += torch.outer((v[h] - state[h] @ key) * much[h], key)
            core_attn_out[at, h] = (state[h] @ query).to(kind)
        return window[1:], state

    rows = num_prefills + num_decodes
    seen = 0
    if rows:
        assert non_spec_query_start_loc is not None
        assert non_spec_state_indices_tensor is not None
        _is(non_spec_query_start_loc, torch.int32, rows + 1)
        _is(non_spec_state_indices_tensor, torch.int32, rows)
        assert int(non_spec_query_start_loc[0]) == 0
        if has_initial_state is not None:
            _is(has_initial_state, torch.bool, rows)
        if num_spec_decodes:
            assert non_spec_token_indx is not None
            _is(non_spec_token_indx, torch.int32, int(non_spec_query_start_loc[-1]))
        ends = non_spec_query_start_loc.tolist()
        for i, slot in enumerate(non_spec_state_indices_tensor.tolist()):
            assert 0 <= slot < slots  # the vendor would read and write outside the cache
            window, state = conv_state[slot], ssm_state[slot].float()
            if has_initial_state is not None and not has_initial_state[i]:
                window, state = torch.zeros_like(window), torch.zeros_like(state)
            for at in range(ends[i], ends[i + 1]):
                at = at if non_spec_token_indx is None else int(non_spec_token_indx[at])
                window, state = advance(at, window, state)
                seen += 1
            conv_state[slot], ssm_state[slot] = window.clone(), state.to(ssm_state.dtype)
    if num_spec_decodes:
        assert spec_query_start_loc is not None
        assert spec_token_indx is not None
        assert spec_state_indices_tensor is not None
        assert num_accepted_tokens is not None
        columns = spec_state_indices_tensor.shape[1]
        _is(spec_query_start_loc, torch.int32, num_spec_decodes + 1)
        _is(spec_token_indx, torch.int32, num_spec_decodes * columns)
        _is(spec_state_indices_tensor, torch.int32, num_spec_decodes, columns)
        _is(num_accepted_tokens, torch.int32, num_spec_decodes)
        assert spec_query_start_loc.tolist() == [columns * i for i in range(num_spec_decodes + 1)]
        for i, table in enumerate(spec_state_indices_tensor.tolist()):
            assert all(0 <= slot < slots for slot in table)
            start = table[max(int(num_accepted_tokens[i]) - 1, 0)]
            window, state = conv_state[start].clone(), ssm_state[start].float()
            for t, slot in enumerate(table):
                window, state = advance(int(spec_token_indx[i * columns + t]), window, state)
                conv_state[slot], ssm_state[slot] = window, state.to(ssm_state.dtype)
                seen += 1
    assert seen == total
