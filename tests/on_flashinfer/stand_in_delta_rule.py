"""The stand-in's functions of the gated delta rule and of KDA (see stand_in.py)."""

import torch
from torch import Tensor

from tests.on_flashinfer.checks import INDICES, aligned, calls, has_shape


def gated_delta_rule_decode_pretranspose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float | None = None,
    output: Tensor | None = None,
    use_qk_l2norm: bool = True,
    initial_state: Tensor | None = None,
    initial_state_indices: Tensor | None = None,
    output_state_indices: Tensor | None = None,
    intermediate_states_buffer: Tensor | None = None,
    disable_state_update: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    calls.append(dict(locals()))
    assert state is intermediate_states_buffer is None
    assert initial_state is not None
    assert initial_state_indices is not None
    assert output is not None
    assert not disable_state_update
    assert backend == "flashinfer"
    batch, length, heads, k_dim = q.shape
    v_heads, v_dim = v.shape[2:]
    assert v_heads % heads == 0
    assert (k_dim, v_dim) == (128, 128)
    has_shape(k, batch, length, heads, k_dim)
    for tensor in (q, k, v, a, b, output):
        assert tensor.dtype == torch.bfloat16
        assert tensor.is_contiguous()
    for gate in (a, b):
        has_shape(gate, batch, length, v_heads)
    for weight in (A_log, dt_bias):
        assert weight.dtype == torch.float32
        assert weight.is_contiguous()
        has_shape(weight, v_heads)
    has_shape(output, batch, length, v_heads, v_dim)
    pool = initial_state.shape[0]
    assert initial_state.dtype in (torch.float32, torch.bfloat16)
    has_shape(initial_state, pool, v_heads, v_dim, k_dim, strides=(None, v_dim * k_dim, k_dim, 1))
    aligned(initial_state, 1, to=32)
    for table in (initial_state_indices, output_state_indices):
        if table is not None:
            assert table.dtype in INDICES
            assert table.is_contiguous()
            has_shape(table, batch)
    spare = initial_state.dtype == torch.bfloat16  # whose kernel takes slot 0 for a negative slot; the other skips it
    for row, read in enumerate(initial_state_indices.tolist()):
        if read < 0 and not spare:
            output[row] = 0 if length == 1 else output[row]
            continue
        write = read if output_state_indices is None else int(output_state_indices[row])
        assert max(read, write) < pool
        s = initial_state[max(read, 0)].float().clone()
        for t in range(length):
            step = a[row, t].float() + dt_bias
            step = torch.where(step <= 20, torch.log(1 + torch.exp(step)), step)
            decay, much = torch.exp(-torch.exp(A_log) * step), 1 / (1 + torch.exp(-b[row, t].float()))
            _delta_step(s, q[row, t], k[row, t], v[row, t], decay, much, output[row, t], scale, use_qk_l2norm)
        if write >= 0 or spare or length == 1:
            initial_state[max(write, 0)] = s.to(initial_state.dtype)
    return output, initial_state


def _delta_step(
    s: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    much: Tensor,
    output: Tensor,
    scale: float | None,
    normalise: bool,
) -> None:
    """One token; `s` (heads of v, v_dim, k_dim) is advanced in place."""
    q, k = q.float(), k.float()
    if normalise:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    of_one = v.shape[0] // q.shape[0]
    for h in range(v.shape[0]):
        key, query = k[h // of_one], q[h // of_one]
        s[h] *= decay[h]
        s[h] += torch.outer((v[h].float() - s[h] @ key) * much[h], key)
        output[h] = (s[h] @ query).to(output.dtype)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    output: Tensor | None = None,
    output_state: Tensor | None = None,
    state_checkpoints: Tensor | None = None,
    checkpoint_cu_starts: Tensor | None = None,
    checkpoint_every_n_tokens: int = 0,
    use_cp: str | bool = "auto",
    state_indices: Tensor | None = None,
    _cp_chunk_len: int | None = None,
    backend: str = "auto",
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    calls.append(dict(locals()))
    assert g is not None
    assert beta is not None
    assert initial_state is not None
    assert cu_seqlens is not None
    assert output is not None
    assert output_state is not None
    assert output_final_state
    assert state_indices is None
    assert (use_cp, backend, checkpoint_every_n_tokens) == (False, "flashinfer", 0)
    assert scale != 0  # which it would take for None
    total, heads, dim = q.shape
    v_heads, rows = v.shape[1], cu_seqlens.shape[0] - 1
    assert rows > 0
    assert dim == v.shape[2] == 128
    assert v_heads % heads == 0
    has_shape(k, total, heads, dim)
    has_shape(v, total, v_heads, dim)
    has_shape(output, total, v_heads, dim)
    for tensor in (q, k, v, output, g, beta, cu_seqlens, initial_state, output_state):
        assert tensor.is_contiguous()
    for tensor in (q, k, v, output):
        assert tensor.dtype == torch.bfloat16
        aligned(tensor, 0)
    for gate in (g, beta):
        assert gate.dtype == torch.float32
        has_shape(gate, total, v_heads)
    for s in (initial_state, output_state):
        assert s.dtype == torch.float32
        has_shape(s, rows, v_heads, dim, dim)
    assert cu_seqlens.dtype in INDICES
    for row in range(rows):
        s = initial_state[row].clone()
        for t in range(int(cu_seqlens[row]), int(cu_seqlens[row + 1])):
            _delta_step(s, q[t], k[t], v[t], g[t], beta[t], output[t], scale, use_qk_l2norm_in_kernel)
        output_state[row] = s
    return output, output_state


# ---- Kimi Delta Attention --------------------------------------------------------------------------------------------


def recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = True,
    use_gate_in_kernel: bool = False,
    lower_bound: float | None = None,
    cu_seqlens: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    num_spec_tokens: int | None = None,
    num_accepted_tokens: Tensor | None = None,
    output: Tensor | None = None,
    initial_state_source: Tensor | None = None,
    initial_state_indices: Tensor | None = None,
    beta_is_logit: bool = False,
    seq_order: Tensor | None = None,
    prefill_workspace: object = None,
    state_checkpoints: Tensor | None = None,
    checkpoint_cu_starts: Tensor | None = None,
    checkpoint_every_n_tokens: int = 0,
    checkpoint_state_indices: Tensor | None = None,
    *,
    disable_state_update: bool = False,
    correction_cache: Tensor | None = None,
    kg_cache: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The vendor's decode with packed rows: of one token each, or, with num_spec_tokens, of one more than that."""
    calls.append(dict(locals()))
    assert backend == "cute-dsl"
    assert num_accepted_tokens is seq_order is prefill_workspace is state_checkpoints is None
    assert checkpoint_cu_starts is checkpoint_state_indices is correction_cache is kg_cache is None
    assert not output_final_state
    assert not disable_state_update
    assert not checkpoint_every_n_tokens
    assert initial_state is not None
    assert cu_seqlens is not None
    assert ssm_state_indices is not None
    assert output is not None
    assert (initial_state_source is None) == (initial_state_indices is None)
    length = 1 if num_spec_tokens is None else 1 + num_spec_tokens
    assert num_spec_tokens is None or num_spec_tokens > 0
    rows = cu_seqlens.shape[0] - 1
    _, total, heads, dim = q.shape
    v_heads = v.shape[2]
    assert total == rows * length > 0  # the vendor would write to a tensor of its own
    assert dim in (64, 128)
    assert v_heads % heads == 0
    for tensor, count in ((q, heads), (k, heads), (v, v_heads), (g, v_heads), (output, v_heads)):
        has_shape(tensor, 1, total, count, dim)
    has_shape(beta, 1, total, v_heads)
    for tensor in (q, k, v, g, beta, output, initial_state):
        assert tensor.dtype == torch.bfloat16
    for tensor in (q, k, v, g, beta, output, cu_seqlens, ssm_state_indices):
        assert tensor.is_contiguous()
        aligned(tensor, 0)
    for table in (cu_seqlens, ssm_state_indices):
        assert table.dtype == torch.int32
    assert cu_seqlens.tolist() == list(range(0, total + 1, length))
    has_shape(ssm_state_indices, *((rows,) if length == 1 else (rows, length)))
    pool = initial_state.shape[0]
    has_shape(initial_state, pool, v_heads, dim, dim, strides=(None, dim * dim, dim, 1))
    aligned(initial_state, 1)
    if initial_state_source is not None:
        has_shape(initial_state_source, pool, v_heads, dim, dim, strides=(None, dim * dim, dim, 1))
        assert initial_state_source.dtype == torch.bfloat16
    if initial_state_indices is not None:
        has_shape(initial_state_indices, rows, strides=(1,))
        assert initial_state_indices.dtype == torch.int32
    if use_gate_in_kernel:
        assert beta_is_logit
        assert A_log is not None
        assert dt_bias is not None
        has_shape(A_log, heads)
        has_shape(dt_bias, heads * dim)
        for weight in (A_log, dt_bias):
            assert weight.dtype == torch.float32
            assert weight.is_contiguous()
            aligned(weight, 0)
        assert lower_bound is None or lower_bound < 0
    else:
        assert A_log is dt_bias is lower_bound is None
        assert not beta_is_logit

    def log_decay(token: int) -> Tensor:
        raw = g[0, token].float()
        if A_log is None or dt_bias is None:
            return raw
        of_value = torch.arange(v_heads) // (v_heads // heads)  # A_log and dt_bias are of heads of q
        raw, rate = raw + dt_bias.view(heads, dim)[of_value], torch.exp(A_log)[of_value].unsqueeze(1)
        if lower_bound is not None:
            return lower_bound * torch.sigmoid(rate * raw)
        return -rate * torch.where(raw > 20, raw, torch.log1p(torch.exp(raw)))

    targets = ssm_state_indices.view(rows, length).tolist()
    for row in range(rows):
        read = targets[row][0] if initial_state_indices is None else int(initial_state_indices[row])
        source = initial_state if initial_state_source is None else initial_state_source
        s = source[max(read, 0)].float().clone()
        for token, target in enumerate(targets[row], row * length):
            assert target < pool
            if target < 0:  # neither is the token read, nor the state carried on
                output[0, token] = 0
                continue
            much = beta[0, token].float()
            much = torch.sigmoid(much) if beta_is_logit else much
            decay = torch.exp(log_decay(token)).unsqueeze(1)  # of every column
            out, normalise = output[0, token], use_qk_l2norm_in_kernel
            _delta_step(s, q[0, token], k[0, token], v[0, token], decay, much, out, scale, normalise)
            initial_state[target] = s.to(torch.bfloat16)
    return output, None


def cudnn_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = True,
    use_gate_in_kernel: bool = False,
    lower_bound: float | None = None,
    cu_seqlens: Tensor | None = None,
    beta_is_logit: bool = False,
    output: Tensor | None = None,
    output_state: Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor | None]:
    calls.append(dict(locals()))
    assert A_log is dt_bias is lower_bound is None
    assert not use_gate_in_kernel
    assert not beta_is_logit
    assert output_final_state
    assert initial_state is not None
    assert output_state is not None
    assert initial_state.data_ptr() != output_state.data_ptr()
    assert cu_seqlens is not None
    assert output is not None
    total, heads, dim = q.shape
    v_heads, rows = v.shape[1], cu_seqlens.shape[0] - 1
    assert rows > 0
    assert dim == 128
    assert v_heads % heads == 0
    for tensor, count in ((k, heads), (v, v_heads), (g, v_heads), (output, v_heads)):
        has_shape(tensor, total, count, dim)
    has_shape(beta, total, v_heads)
    for tensor in (q, k, v, g, beta, output, cu_seqlens, initial_state, output_state):
        assert tensor.is_contiguous()
        aligned(tensor, 0)
    for tensor in (q, k, v, output):
        assert tensor.dtype == torch.bfloat16
    for tensor in (g, beta):
        assert tensor.dtype == torch.float32
    for s in (initial_state, output_state):
        assert s.dtype == torch.float32
        has_shape(s, rows, v_heads, dim, dim)
    assert cu_seqlens.dtype in INDICES
    for row in range(rows):
        s = initial_state[row].clone()
        for t in range(int(cu_seqlens[row]), int(cu_seqlens[row + 1])):
            decay = torch.exp(g[t]).unsqueeze(1)
            _delta_step(s, q[t], k[t], v[t], decay, beta[t], output[t], scale, use_qk_l2norm_in_kernel)
        output_state[row] = s
    return output, output_state
