"""How the kernels of mamba_chunk_scan divide the rows: chunks into pieces of some tokens, rows into segments of pieces.

A chunk's pieces begin with the chunk, and its last one may be short. Chunks are counted from the very first token, so
that a row's first one may be short. Pieces, segments and states before segments are numbered over all rows. A row's
numbers begin at some that grow from one row to the next by at least as many as the row has, so they need no prefix sum;
numbers left over are of none.
"""

import triton
import triton.language as tl

from mamba_ops.ops._triton.common import within


@triton.jit
def extent(row, inside, cu_seqlens, num_computed_tokens, computed_stride, length, CHUNK: tl.constexpr):
    # A row's first token and number of tokens, and how many tokens of its first chunk came before them. `length` is the
    # number of a row's tokens, with cu_seqlens that of all.
    if cu_seqlens is not None:
        begin = within(tl.load(cu_seqlens + row, inside, other=0), length).to(tl.int32)
        count = within(tl.load(cu_seqlens + row + 1, inside, other=0), length).to(tl.int32) - begin
    else:
        begin = row * length
        count = tl.where(inside, length, 0)
    num_computed_tokens += row.to(tl.int64) * computed_stride
    before = tl.load(num_computed_tokens, inside & (computed_stride >= 0), other=0)
    return begin, tl.maximum(count, 0), (tl.maximum(before, 0) % CHUNK).to(tl.int32)


@triton.jit
def numbers(before, count, CHUNK: tl.constexpr, PIECE: tl.constexpr):
    # The numbers of a row's first piece and of the one after its last, counted from the beginning of its first chunk.
    PER_CHUNK: tl.constexpr = (CHUNK + PIECE - 1) // PIECE
    end = before + count
    last = end // CHUNK * PER_CHUNK + (end % CHUNK + PIECE - 1) // PIECE
    return before // PIECE, tl.where(count > 0, last, before // PIECE)


@triton.jit
def piece_range(number, before, count, CHUNK: tl.constexpr, PIECE: tl.constexpr):
    # A piece's tokens, counted from the row's first one: the first, and the one after the last.
    PER_CHUNK: tl.constexpr = (CHUNK + PIECE - 1) // PIECE
    chunk = number // PER_CHUNK
    low = chunk * CHUNK + number % PER_CHUNK * PIECE - before
    return tl.maximum(low, 0), tl.minimum(tl.minimum(low + PIECE, (chunk + 1) * CHUNK - before), count)


@triton.jit
def first_piece(row, begin, extra, CHUNK: tl.constexpr, PIECE: tl.constexpr):
    # The number of the first piece of the row that begins with a token; `extra` pieces of a row are not whole.
    number = begin // PIECE + row * extra
    if CHUNK % PIECE != 0:
        number += begin // CHUNK
    return number


@triton.jit
def first_segment(piece, row, segment):
    # The number of a row's first segment, from that of its first piece. A row without tokens has one, too.
    return piece // segment + row


@triton.jit
def first_start(piece, segment):
    # The same of the states before the segments of a row that has several: more than `segment` pieces.
    return 2 * piece // segment


@triton.jit
def row_of(number, rows, cu_seqlens, length, extra, CHUNK: tl.constexpr, PIECE: tl.constexpr, SEGMENT: tl.constexpr):
    # The row of a piece (SEGMENT: None) or segment, -1 if it is of none, and the number of the row's first piece.
    row = -1
    for start in range(0, rows, 128):
        r = start + tl.arange(0, 128)
        begin = r * length
        if cu_seqlens is not None:
            begin = within(tl.load(cu_seqlens + r, r < rows, other=0), length).to(tl.int32)
        first = first_piece(r, begin, extra, CHUNK, PIECE)
        if SEGMENT is not None:
            first = first_segment(first, r, SEGMENT)
        row += tl.sum(((r < rows) & (first <= number)).to(tl.int32), 0)
    begin = row * length
    if cu_seqlens is not None:
        begin = within(tl.load(cu_seqlens + row, row >= 0, other=0), length).to(tl.int32)
    return row, first_piece(row, begin, extra, CHUNK, PIECE)


@triton.jit
def chunks_before(row, cu_seqlens, num_computed_tokens, computed_stride, length, CHUNK: tl.constexpr):
    # How many chunks the rows before a row have.
    first = 0
    for start in range(0, row, 128):
        r = start + tl.arange(0, 128)
        _, count, before = extent(r, r < row, cu_seqlens, num_computed_tokens, computed_stride, length, CHUNK)
        of_row = tl.where((r < row) & (count > 0), (before + count + CHUNK - 1) // CHUNK, 0)
        first = tl.minimum(first + tl.sum(of_row, 0), 1 << 30)
    return first
