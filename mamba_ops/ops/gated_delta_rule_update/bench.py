"""What `mamba-ops bench` times of gated_delta_rule_update, and the peer of it."""

from functools import partial

from mamba_ops.ops._common import bench
from mamba_ops.ops._common.delta_rule_bench import fla, update_case
from mamba_ops.ops.gated_delta_rule_update.op import gated_delta_rule_update

case = partial(update_case, gated_delta_rule_update, by_channel=False)
gated_delta_rule_update.bench_cases(bench.by_scale(case, large=((1,), (64,), (256,)), small=((1,), (16,))))
gated_delta_rule_update.bench_host("one token", 4, 1, dim=64, k_heads=2, heads=4)
gated_delta_rule_update.bench_peer("fla")(
    partial(fla, of="fla.ops.gated_delta_rule", name="fused_recurrent_gated_delta_rule")
)
