"""The plain-torch kernel of mamba3_mixing: its reference, which runs on any device."""

from typing import Any

from mamba_ops.ops._common.mamba3_checks import CACHES, TOKENS
from mamba_ops.ops._common.mixing import Batch, batch_of
from mamba_ops.ops.mamba3_chunk_scan import mamba3_chunk_scan
from mamba_ops.ops.mamba3_chunk_scan.reference import read
from mamba_ops.ops.mamba3_mixing.op import Arguments
from mamba_ops.ops.mamba3_state_update import mamba3_state_update
from mamba_ops.ops.mamba3_state_update.reference import advance
from mamba_ops.ops.mamba_chunk_scan import mamba_chunk_scan
from mamba_ops.ops.selective_state_update import selective_state_update
from mamba_ops.registry import explain, has_explicit_backend
from mamba_ops.registry.snapshot import COMPOSED


def mamba3_mixing(call: Arguments) -> None:
    batch = batch_of("mamba_ops::mamba3_mixing", call, call.x.shape[0])
    names = ("B_bias", "C_bias", "D", "mimo_x", "mimo_z", "mimo_o")
    weights: dict[str, Any] = {name: getattr(call, name) for name in names}
    caches = {name: getattr(call, name) for name in CACHES}

    def mix(batch: Batch) -> None:
        for rows, op in batch.kinds(mamba3_state_update, mamba3_chunk_scan):
            tokens = {name: rows.of(getattr(call, name)) for name in TOKENS}
            arguments = {**tokens, **caches, **weights, "z": None if call.z is None else rows.of(call.z)}
            arguments |= {"out": rows.of(call.output)} | (
                {"chunk_size": call.chunk_size} if op is mamba3_chunk_scan else {}
            )
            if not rows.check_only:
                rows.bind(op)(**arguments)
                continue
            given: dict[str, Any] = {**rows.arguments._asdict(), **arguments}
            op.check_supported(**given)
            if explain(op, **given).backend == COMPOSED:
                found: Any = op.arguments(**op.bind((), given))
                (read if op is mamba3_chunk_scan else advance)(found, check_only=True)

    if has_explicit_backend(mamba3_state_update, mamba3_chunk_scan, selective_state_update, mamba_chunk_scan):
        mix(batch.check_only())
    mix(batch)
    batch.clear_rest(call.output)
