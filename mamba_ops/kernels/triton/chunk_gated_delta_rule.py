"""The gated delta rule over whole sequences, chunk by chunk, in five launches.

What the tokens of a chunk write depends on what those before them wrote: a triangular system. `_systems`, `_inverses`
and `_solutions` have all chunks at once and find what each would write with nothing before it, and how much of a state
before it that takes off. `_states` walks over the chunks of a row, with some columns of one head's state in registers.
`_outputs` then has all chunks at once again: what a token reads of the state before its chunk, and of the tokens of its
chunk.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_ops.kernels.triton.common import by_token, chunk_at, chunks_of, dense, on_device_of

CHUNK = 64
_PART: tl.constexpr = tl.constexpr(16)  # of a chunk: systems of so many tokens are solved token by token

# What varies from call to call: Triton would compile anew for some values. The launcher's ALIGNED says what is needed.
_NUMBERS = """length rows tokens null_slot slots_stride write_stride q_stride k_stride v_stride g_stride beta_stride
    output_stride slot_stride head_stride value_stride key_stride""".split()
_POINTERS = """q k v g beta cu_seqlens state slots write_slots has_initial_state output""".split()


@triton.jit
def _tile(pointer, i, i_stride, j, ALIGNED: tl.constexpr):
    # pointers to the entries j of rows i; where ALIGNED, rows start at multiples of 16 bytes
    pointers = pointer + i.to(tl.int64)[:, None] * i_stride + j[None, :]
    if ALIGNED:
        pointers = tl.multiple_of(pointers, (1, 16))
    return pointers


@triton.jit
def _source(row, slots, slots_stride, null_slot):
    # where a row's state is, -1 for nobody
    source = row.to(tl.int64)
    if slots is not None:
        source = tl.load(slots + source * slots_stride).to(tl.int64)
        source = tl.where((source < 0) | (source == null_slot), -1, source)
    return source


@triton.jit
def _normalised(x, L2NORM: tl.constexpr):
    x = x.to(tl.float32)
    if L2NORM:
        x /= tl.sqrt(tl.sum(x * x, axis=1) + 1e-6)[:, None]
    return x


@triton.jit
def _diagonal(systems, CHUNK: tl.constexpr):
    # the inverses of the parts on the diagonal, all at once, row by row: (parts, row, column)
    part = tl.arange(0, CHUNK // _PART)[:, None, None]
    row = tl.arange(0, _PART)[None, :, None]
    column = tl.arange(0, _PART)[None, None, :]
    inverse = -tl.load(systems + part * (_PART * CHUNK + _PART) + row * CHUNK + column)
    for i in range(2, _PART):
        own = tl.sum(tl.where(row == i, inverse, 0.0), axis=1)
        own += tl.sum(own[:, :, None] * inverse, axis=1)
        inverse = tl.where(row == i, own[:, None, :], inverse)
    return inverse + (row == column).to(tl.float32)


@triton.jit
def _of_diagonal(inverse, number, CHUNK: tl.constexpr):
    part = tl.arange(0, CHUNK // _PART)[:, None, None]
    return tl.sum(tl.where(part == number, inverse, 0.0), axis=0)


@triton.jit
def _product(a, b, EXACT: tl.constexpr):
    # in float32; where the result is rounded to fewer bits anyway, on matrix units, from three products of parts
    return tl.dot(a, b, input_precision="ieee" if EXACT else "tf32x3")


@triton.jit
def _part(tensor, i, j, CHUNK: tl.constexpr):
    # pointers to one part of a chunk's matrix
    part = tl.arange(0, _PART)
    return tensor + (part + i * _PART)[:, None] * CHUNK + (part + j * _PART)[None, :]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_NUMBERS + _POINTERS)
def _systems(
    k,
    g,
    beta,
    cu_seqlens,
    slots,
    totals,  # out: (v_heads, tokens), the sum of g since the chunk began
    keys,  # out: (tokens, k_heads, k_dim), normalised
    systems,  # out: (chunks, v_heads, CHUNK, CHUNK): what a token takes off for what an earlier one wrote
    k_stride,  # this and the next two: from token to token
    g_stride,
    beta_stride,
    slots_stride,
    length,  # tokens of every row; None: cu_seqlens
    rows,
    tokens,
    null_slot,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    L2NORM: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    OF_ONE: tl.constexpr = V_HEADS // K_HEADS
    chunk = tl.program_id(0) // K_HEADS
    k_head = tl.program_id(0) % K_HEADS
    row, low, high, _, _ = chunk_at(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if row >= rows:
        return
    if _source(row, slots, slots_stride, null_slot) < 0:
        return
    key = tl.arange(0, BLOCK_K)
    place = tl.arange(0, CHUNK)
    t = low + place
    there = t < high
    in_keys = there[:, None] & (key < K_DIM)[None, :]
    x = tl.load(_tile(k + k_head * K_DIM, t, k_stride, key, ALIGNED), in_keys, other=0.0)
    x = _normalised(x, L2NORM).to(keys.dtype.element_ty)
    tl.store(_tile(keys + k_head * K_DIM, t, K_HEADS * K_DIM, key, ALIGNED), x, in_keys)
    products = tl.dot(x, tl.trans(x), input_precision="ieee")

    before = place[:, None] > place[None, :]
    for number in range(OF_ONE):
        head = k_head * OF_ONE + number
        much = tl.load(beta + head + t.to(tl.int64) * beta_stride, there, other=0.0).to(tl.float32)
        total = tl.cumsum(tl.load(g + head + t.to(tl.int64) * g_stride, there, other=0.0).to(tl.float32), 0)
        tl.store(totals + head.to(tl.int64) * tokens + t, total, there)
        between = tl.exp(tl.where(before, total[:, None] - total[None, :], float("-inf")))
        of_chunk = systems + (chunk.to(tl.int64) * V_HEADS + head) * (CHUNK * CHUNK)
        tl.store(of_chunk + place[:, None] * CHUNK + place[None, :], products * much[:, None] * between)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_NUMBERS + _POINTERS)
def _inverses(
    cu_seqlens,
    slots,
    systems,
    inverses,  # out: (chunks, v_heads, CHUNK, CHUNK), of 1 + systems; what is above the diagonal is not written
    slots_stride,
    length,
    rows,
    null_slot,
    V_HEADS: tl.constexpr,
    EXACT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    row, _, _, _, _ = chunk_at(program // V_HEADS, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if row >= rows:
        return
    if _source(row, slots, slots_stride, null_slot) < 0:
        return
    systems += program.to(tl.int64) * (CHUNK * CHUNK)
    inverses += program.to(tl.int64) * (CHUNK * CHUNK)
    operand = inverses.dtype.element_ty

    # First the parts on the diagonal, then below them: a row of parts follows from those above it.
    diagonal = _diagonal(systems, CHUNK)
    x00 = _of_diagonal(diagonal, 0, CHUNK)
    x11 = _of_diagonal(diagonal, 1, CHUNK)
    x22 = _of_diagonal(diagonal, 2, CHUNK)
    x33 = _of_diagonal(diagonal, 3, CHUNK)
    a10 = tl.load(_part(systems, 1, 0, CHUNK))
    a20 = tl.load(_part(systems, 2, 0, CHUNK))
    a21 = tl.load(_part(systems, 2, 1, CHUNK))
    a30 = tl.load(_part(systems, 3, 0, CHUNK))
    a31 = tl.load(_part(systems, 3, 1, CHUNK))
    a32 = tl.load(_part(systems, 3, 2, CHUNK))
    x10 = -_product(x11, _product(a10, x00, EXACT), EXACT)
    x21 = -_product(x22, _product(a21, x11, EXACT), EXACT)
    x32 = -_product(x33, _product(a32, x22, EXACT), EXACT)
    x20 = -_product(x22, _product(a20, x00, EXACT) + _product(a21, x10, EXACT), EXACT)
    x31 = -_product(x33, _product(a31, x11, EXACT) + _product(a32, x21, EXACT), EXACT)
    y = _product(a30, x00, EXACT) + _product(a31, x10, EXACT) + _product(a32, x20, EXACT)
    x30 = -_product(x33, y, EXACT)
    tl.store(_part(inverses, 0, 0, CHUNK), x00.to(operand))
    tl.store(_part(inverses, 1, 0, CHUNK), x10.to(operand))
    tl.store(_part(inverses, 1, 1, CHUNK), x11.to(operand))
    tl.store(_part(inverses, 2, 0, CHUNK), x20.to(operand))
    tl.store(_part(inverses, 2, 1, CHUNK), x21.to(operand))
    tl.store(_part(inverses, 2, 2, CHUNK), x22.to(operand))
    tl.store(_part(inverses, 3, 0, CHUNK), x30.to(operand))
    tl.store(_part(inverses, 3, 1, CHUNK), x31.to(operand))
    tl.store(_part(inverses, 3, 2, CHUNK), x32.to(operand))
    tl.store(_part(inverses, 3, 3, CHUNK), x33.to(operand))


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_NUMBERS + _POINTERS)
def _solutions(
    v,
    beta,
    cu_seqlens,
    slots,
    totals,
    keys,
    inverses,
    alone,  # out: (tokens, v_heads, v_dim), what is written with nothing before the chunk
    through,  # out: (tokens, v_heads, k_dim), how much of the state before the chunk that takes off
    v_stride,
    beta_stride,
    slots_stride,
    length,
    rows,
    tokens,
    null_slot,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    program = tl.program_id(0)
    head = program % V_HEADS
    row, low, high, _, _ = chunk_at(program // V_HEADS, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if row >= rows:
        return
    if _source(row, slots, slots_stride, null_slot) < 0:
        return
    key = tl.arange(0, BLOCK_K)
    value = tl.arange(0, BLOCK_V)
    place = tl.arange(0, CHUNK)
    t = low + place
    there = t < high
    in_keys = there[:, None] & (key < K_DIM)[None, :]
    in_values = there[:, None] & (value < V_DIM)[None, :]
    operand = alone.dtype.element_ty

    inverses += program.to(tl.int64) * (CHUNK * CHUNK)
    inverse = tl.load(_tile(inverses, place, CHUNK, place, True), place[:, None] >= place[None, :], other=0.0)
    much = tl.load(beta + head + t.to(tl.int64) * beta_stride, there, other=0.0).to(tl.float32)
    total = tl.load(totals + head.to(tl.int64) * tokens + t, there, other=0.0)
    x = tl.load(_tile(v + head * V_DIM, t, v_stride, value, ALIGNED), in_values, other=0.0)
    x = tl.dot(inverse, (x * much[:, None]).to(operand), input_precision="ieee")
    tl.store(_tile(alone + head * V_DIM, t, V_HEADS * V_DIM, value, ALIGNED), x, in_values)
    of_key = keys + head // (V_HEADS // K_HEADS) * K_DIM
    x = tl.load(_tile(of_key, t, K_HEADS * K_DIM, key, ALIGNED), in_keys, other=0.0)
    x = tl.dot(inverse, (x * (much * tl.exp(total))[:, None]).to(operand), input_precision="ieee")
    tl.store(_tile(through + head * K_DIM, t, V_HEADS * K_DIM, key, ALIGNED), x, in_keys)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_NUMBERS + _POINTERS)
def _states(
    cu_seqlens,
    state,
    slots,
    write_slots,
    has_initial_state,
    totals,
    keys,
    written,  # in: what chunks write with nothing before them; out: what they write
    through,
    befores,  # out: (chunks, v_heads, k_dim, v_dim), the state before a chunk
    slots_stride,
    write_stride,
    slot_stride,
    head_stride,
    value_stride,
    key_stride,
    length,
    tokens,
    null_slot,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    BLOCKS: tl.constexpr = (V_DIM + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = program // (BLOCKS * V_HEADS)
    head = program // BLOCKS % V_HEADS
    value = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_K)
    in_value = (value < V_DIM)[None, :]
    in_key = (key < K_DIM)[None, :]
    in_state = (key < K_DIM)[:, None] & in_value

    source = _source(row, slots, slots_stride, null_slot)
    if source < 0:
        return
    first, chunks, begin, count = chunks_of(row, cu_seqlens, length, CHUNK, BLOCK_ROWS)
    s = tl.zeros([BLOCK_K, BLOCK], tl.float32)
    if state is not None:
        of_state = key.to(tl.int64)[:, None] * key_stride + value.to(tl.int64)[None, :] * value_stride
        of_state += head.to(tl.int64) * head_stride
        if has_initial_state is not None:
            carried = tl.load(has_initial_state + row) != 0
            s = tl.load(state + source * slot_stride + of_state, in_state & carried, other=0.0).to(tl.float32)

    operand = befores.dtype.element_ty
    totals += head.to(tl.int64) * tokens
    keys += head // (V_HEADS // K_HEADS) * K_DIM
    through += head * K_DIM
    written += head * V_DIM
    before = befores + (first.to(tl.int64) * V_HEADS + head) * (K_DIM * V_DIM) + key[:, None] * V_DIM + value[None, :]
    for number in range(chunks):
        tl.store(before, s, in_state)
        before += V_HEADS * K_DIM * V_DIM
        low = begin + number * CHUNK
        high = tl.minimum(low + CHUNK, begin + count)
        t = low + tl.arange(0, CHUNK)
        there = (t < high)[:, None]
        k = tl.load(_tile(keys, t, K_HEADS * K_DIM, key, ALIGNED), there & in_key, other=0.0)
        w = tl.load(_tile(through, t, V_HEADS * K_DIM, key, ALIGNED), there & in_key, other=0.0)
        place = _tile(written, t, V_HEADS * V_DIM, value, ALIGNED)
        u = tl.load(place, there & in_value, other=0.0).to(tl.float32)
        total = tl.load(totals + t, t < high, other=0.0)
        end = tl.load(totals + high - 1)
        new = (u - tl.dot(w, s.to(operand), input_precision="ieee")).to(operand)
        tl.store(place, new, there & in_value)
        kept = tl.where(t < high, tl.exp(end - total), 0.0)
        new = (new * kept[:, None]).to(operand)
        s = tl.dot(tl.trans(k), new, s * tl.exp(end), input_precision="ieee")

    if state is not None:
        target = source
        stored = count > 0
        if write_slots is not None:
            target = tl.load(write_slots + row.to(tl.int64) * write_stride).to(tl.int64)
            stored = (stored | (target != source)) & (target >= 0)
            if null_slot is not None:
                stored = stored & (target != null_slot)
        tl.store(state + target * slot_stride + of_state, s, in_state & stored)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_NUMBERS + _POINTERS)
def _outputs(
    q,
    cu_seqlens,
    slots,
    output,
    totals,
    keys,
    written,
    befores,
    scale,
    q_stride,
    output_stride,
    slots_stride,
    length,
    rows,
    tokens,
    null_slot,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    L2NORM: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    BLOCKS: tl.constexpr = (V_DIM + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    chunk = program // (BLOCKS * V_HEADS)
    head = program // BLOCKS % V_HEADS
    k_head = head // (V_HEADS // K_HEADS)
    value = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_K)
    in_value = (value < V_DIM)[None, :]
    in_key = (key < K_DIM)[None, :]
    row, low, high, _, _ = chunk_at(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if row >= rows:
        return
    t = low + tl.arange(0, CHUNK)
    there = (t < high)[:, None]
    place = _tile(output + head * V_DIM, t, output_stride, value, ALIGNED)
    if _source(row, slots, slots_stride, null_slot) < 0:
        tl.store(place, tl.zeros([CHUNK, BLOCK], tl.float32), there & in_value)
        return

    operand = befores.dtype.element_ty
    query = tl.load(_tile(q + k_head * K_DIM, t, q_stride, key, ALIGNED), there & in_key, other=0.0)
    query = _normalised(query, L2NORM).to(operand)
    k = tl.load(_tile(keys + k_head * K_DIM, t, K_HEADS * K_DIM, key, ALIGNED), there & in_key, other=0.0)
    new = tl.load(_tile(written + head * V_DIM, t, V_HEADS * V_DIM, value, ALIGNED), there & in_value, other=0.0)
    befores += (chunk.to(tl.int64) * V_HEADS + head) * (K_DIM * V_DIM)
    s = tl.load(_tile(befores, key, V_DIM, value, ALIGNED), (key < K_DIM)[:, None] & in_value, other=0.0)
    total = tl.load(totals + head.to(tl.int64) * tokens + t, t < high, other=0.0)
    y = tl.dot(query, s, input_precision="ieee") * tl.exp(total)[:, None]
    between = tl.where((t[:, None] >= t[None, :]) & there, total[:, None] - total[None, :], float("-inf"))
    weights = tl.dot(query, tl.trans(k), input_precision="ieee") * tl.exp(between)
    y = tl.dot(weights.to(operand), new, y, input_precision="ieee")
    tl.store(place, y * scale, there & in_value)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    slots: Tensor | None,
    write_slots: Tensor | None,
    has_initial_state: Tensor | None,
    qk_l2norm: bool,
    null_slot: int,
    output: Tensor,
) -> None:
    """Write `output` and the last states; shapes and meaning are the op's, and are not checked again.

    What matrix units are given is rounded to the dtype of q, k and v: the normalised q and k, the inverse of a chunk's
    system and what it is applied to, what tokens write, and the state before a chunk; float32 stays float32, which is
    slow. Every token of an activation must be dense: others are copied first, and an output that is not is written
    through a copy.
    """
    batched = cu_seqlens is None
    rows = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    length = v.shape[1] if batched else None
    (k_heads, k_dim), (v_heads, v_dim) = q.shape[-2:], v.shape[-2:]
    tokens = v.numel() // (v_heads * v_dim)
    moves = write_slots is not None and state is not None
    if rows == 0 or (tokens == 0 and not moves):
        return
    chunks = tokens // CHUNK + rows if length is None else rows * triton.cdiv(length, CHUNK)

    result = by_token(output, not batched)
    q, k, v, g, beta = (by_token(t, not batched) for t in (q, k, v, g, beta))
    cu_seqlens, has_initial_state = (None if t is None else t.contiguous() for t in (cu_seqlens, has_initial_state))
    slots, write_slots = (None if t is None else dense(t) for t in (slots, write_slots))
    operand = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    if operand == torch.float64 or (operand == torch.bfloat16 and q.get_device() < 0):
        operand = torch.float32  # Triton's interpreter multiplies the bits of bfloat16 numbers

    def new(*shape: int, dtype: torch.dtype = operand) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=v.device)

    totals, keys = new(v_heads, tokens, dtype=torch.float32), new(tokens, k_heads, k_dim)
    written, through = new(tokens, v_heads, v_dim), new(tokens, v_heads, k_dim)
    systems, inverses = (new(chunks, v_heads, CHUNK, CHUNK, dtype=dtype) for dtype in (torch.float32, operand))
    befores = new(chunks, v_heads, k_dim, v_dim)
    places = 0
    for tensor in (q, k, v, result):
        places |= tensor.data_ptr() | tensor.stride(0) * tensor.itemsize
    aligned = places % 16 == 0 and all(size * operand.itemsize % 16 == 0 for size in (k_dim, v_dim))
    slots_stride = None if slots is None else slots.stride(0)
    write_stride = None if write_slots is None else write_slots.stride(0)
    state_strides = (None, None, None, None) if state is None else state.stride()
    null = None if slots is None and write_slots is None else null_slot

    block_k, block_v = (max(triton.next_power_of_2(size), 16) for size in (k_dim, v_dim))
    sizes = {"K_HEADS": k_heads, "V_HEADS": v_heads, "K_DIM": k_dim, "V_DIM": v_dim, "ALIGNED": aligned}
    sizes |= {"CHUNK": CHUNK, "BLOCK_ROWS": 128, "BLOCK_K": block_k}
    inverse, solutions, states, outputs = _launches(block_k, block_v)
    with on_device_of(v):
        if tokens:
            _systems[(chunks * k_heads,)](
                k,
                g,
                beta,
                cu_seqlens,
                slots,
                totals,
                keys,
                systems,
                k.stride(0),
                g.stride(0),
                beta.stride(0),
                slots_stride,
                length,
                rows,
                tokens,
                null,
                **sizes,
                L2NORM=qk_l2norm,
                num_warps=4,
            )
            _inverses[(chunks * v_heads,)](
                cu_seqlens,
                slots,
                systems,
                inverses,
                slots_stride,
                length,
                rows,
                null,
                V_HEADS=v_heads,
                EXACT=operand == torch.float32,
                CHUNK=CHUNK,
                BLOCK_ROWS=128,
                **inverse,
            )
            _solutions[(chunks * v_heads,)](
                v,
                beta,
                cu_seqlens,
                slots,
                totals,
                keys,
                inverses,
                written,
                through,
                v.stride(0),
                beta.stride(0),
                slots_stride,
                length,
                rows,
                tokens,
                null,
                **sizes,
                BLOCK_V=block_v,
                **solutions,
            )
        _states[(rows * v_heads * triton.cdiv(v_dim, states["BLOCK"]),)](
            cu_seqlens,
            state,
            slots,
            write_slots,
            has_initial_state,
            totals,
            keys,
            written,
            through,
            befores,
            slots_stride,
            write_stride,
            *state_strides,
            length,
            tokens,
            null,
            **sizes,
            **states,
        )
        if tokens:
            _outputs[(chunks * v_heads * triton.cdiv(v_dim, outputs["BLOCK"]),)](
                q,
                cu_seqlens,
                slots,
                result,
                totals,
                keys,
                written,
                befores,
                k_dim**-0.5 if scale is None else float(scale),
                q.stride(0),
                result.stride(0),
                slots_stride,
                length,
                rows,
                tokens,
                null,
                **sizes,
                L2NORM=qk_l2norm,
                **outputs,
            )
    if result.data_ptr() != output.data_ptr():
        output.copy_(result.view(output.shape))


@functools.cache
def _launches(block_k: int, block_v: int) -> tuple[dict[str, int], ...]:
    """Blocks, warps and stages of the last four kernels. In one stage Triton 3.6 compiles `_states` wrongly."""
    return (
        {"num_warps": 1},
        {"num_warps": 8},
        {"BLOCK": min(block_v, 32), "num_warps": 4, "num_stages": 3},
        {"BLOCK": min(block_v, 64), "num_warps": 4},
    )
