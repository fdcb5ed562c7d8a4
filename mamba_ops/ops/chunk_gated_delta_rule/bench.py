"""What `mamba-ops bench` times of chunk_gated_delta_rule, and the peer of it."""

from functools import partial

from mamba_ops.ops._common import bench
from mamba_ops.ops._common.delta_rule_bench import fla, prefill_case
from mamba_ops.ops.chunk_gated_delta_rule.op import chunk_gated_delta_rule

case = partial(prefill_case, chunk_gated_delta_rule, by_channel=False)
chunk_gated_delta_rule.bench_cases(bench.by_scale(case, large=bench.LONG, small=bench.SHORT))
chunk_gated_delta_rule.bench_host("rows", 1, 64, dim=64, k_heads=2, heads=4)
chunk_gated_delta_rule.bench_peer("fla")(partial(fla, of="fla.ops.gated_delta_rule", name="chunk_gated_delta_rule"))
