"""A few tokens of Mamba-3 for every row, token by token; where states are read and kept is that of other updates."""

from typing import Any

import torch
from torch import Tensor

from tests.ops.common.mamba3 import Recurrence
from tests.ops.gated_delta_rule_update.oracle import tokens_of_rows


def mamba3_state_update(
    angle_state: Tensor,
    ssm_state: Tensor,
    k_state: Tensor,
    v_state: Tensor,
    *tokens: Tensor,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    null_slot: int = -1,
    dtype: torch.dtype = torch.float64,
    rounds_more: bool = False,
    **options: Any,
) -> tuple[Any, ...]:
    """Return (output, angle_state, ssm_state, k_state, v_state), all new; nothing is rounded on the way.

    With `rounds_more` angles are off, see `Head`.
    """
    caches = (angle_state, ssm_state, k_state, v_state)
    options |= {"dtype": dtype, "rounds_more": rounds_more}
    run, before = (Recurrence(tokens, caches, **options) for _ in range(2))

    def slot_of(table: Tensor | None, row: int, column: int) -> int | None:
        """A slot of a row, None for padding or for a column that is not there."""
        if table is None:
            return row if column == 0 else None
        entries = table[row].reshape(-1).tolist()
        slot = entries[column] if column < len(entries) else -1
        return None if slot < 0 or slot == null_slot else slot

    for row, places in enumerate(tokens_of_rows(ssm_state, tokens[0], cu_seqlens)):
        first = 0
        if num_accepted_tokens is not None and slots is not None:
            columns = 1 if slots.dim() == 1 else slots.shape[1]
            first = min(max(int(num_accepted_tokens[row]) - 1, 0), columns - 1)
        source = slot_of(slots, row, first)
        if source is None:
            for at in places:
                run.output[at] = 0
            continue
        heads = before.begin(source) if places else []
        for number, at in enumerate(places):
            run.read(heads, at)
            column = number if num_accepted_tokens is not None else 0
            if num_accepted_tokens is not None or number == len(places) - 1:
                run.keep(heads, slot_of(slots if write_slots is None else write_slots, row, column))
    return (run.output, *run.states)
