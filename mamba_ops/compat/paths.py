"""Which of our names stand at which import paths of other libraries."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Library:
    """A library that `mamba_ops.compat.install` stands in for.

    Attributes:
        name: what is imported.
        version: of the original whose names these are.
        distributions: what it is called where it is installed.
        modules: by import path, the names there, by the module of `mamba_ops.compat` that they come from; `theirs=ours`
            where the two differ.
        others: what else the original has, for those who look for it.
    """

    name: str
    version: str
    distributions: tuple[str, ...]
    modules: Mapping[str, Mapping[str, str]]
    others: str

    def why_not(self, path: str) -> str:
        """Return why a path of the original is none here."""
        return (
            f"mamba_ops.compat stands for {self.name} {self.version}, and does not have this; {self.others}; "
            f"install {self.distributions[0]} itself for it, without mamba_ops.compat.install({self.name!r})"
        )


_CONV = "causal_conv1d_fn causal_conv1d_update"
_SCAN = "selective_scan_fn"
_SSD = "mamba_chunk_scan_combined mamba_split_conv1d_scan_combined"
_DELTA_RULE = "chunk_gated_delta_rule fused_recurrent_gated_delta_rule"

_CAUSAL_CONV1D = Library(
    "causal_conv1d",
    "1.7.0",
    ("causal-conv1d",),
    {
        "causal_conv1d": {"causal_conv1d": _CONV},
        "causal_conv1d.causal_conv1d_interface": {
            "causal_conv1d": f"{_CONV} causal_conv1d_ref causal_conv1d_update_ref",
        },
        "causal_conv1d.causal_conv1d_varlen": {
            "causal_conv1d": "causal_conv1d_varlen_states causal_conv1d_varlen_states_ref",
        },
        "causal_conv1d.cpp_functions": {
            "causal_conv1d": "causal_conv1d_fwd_function causal_conv1d_bwd_function causal_conv1d_update_function",
        },
    },
    "it has the functions alone",
)

_MAMBA_SSM = Library(
    "mamba_ssm",
    "2.3.2.post1",
    ("mamba-ssm",),
    {
        "mamba_ssm": {"mamba_ssm": _SCAN},
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.selective_scan_interface": {"mamba_ssm": _SCAN},
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.selective_state_update": {"mamba_ssm": "selective_state_update"},
        "mamba_ssm.ops.triton.ssd_combined": {"mamba_ssm": _SSD},
    },
    "it has Mamba-1 and Mamba-2, and neither Mamba-3 nor what splits models over ranks",
)

_FLA = Library(
    "fla",
    "0.6.0",
    ("flash-linear-attention", "fla-core"),
    {
        "fla": {},
        "fla.ops": {"fla": _DELTA_RULE},
        "fla.ops.gated_delta_rule": {"fla": _DELTA_RULE},
        "fla.ops.gated_delta_rule.chunk": {"fla": "chunk_gated_delta_rule"},
        "fla.ops.gated_delta_rule.fused_recurrent": {"fla": "fused_recurrent_gated_delta_rule"},
    },
    "it has the gated delta rule and the modules beside it, and no other kind of attention",
)

LIBRARIES = {library.name: library for library in (_CAUSAL_CONV1D, _MAMBA_SSM, _FLA)}
"""The libraries, by import name."""
