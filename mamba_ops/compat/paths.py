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

    def why_not(self) -> str:
        """Return why a path or name of the original is none here."""
        return (
            f"mamba_ops.compat stands for {self.name} {self.version}, and does not have this; {self.others}; "
            f"install {self.distributions[0]} itself for it, without mamba_ops.compat.install({self.name!r})"
        )


_CONV = "causal_conv1d_fn causal_conv1d_update"
_SCAN = "selective_scan_fn"
_SSD = "mamba_chunk_scan_combined mamba_split_conv1d_scan_combined"
_SHORT = "ShortConvolution causal_conv1d causal_conv1d_update causal_conv1d_update_states"
_GATED = "FusedLayerNormGated FusedRMSNormGated FusedRMSNormSwishGate layer_norm_gated rms_norm_gated"
_GDN = "chunk_gdn=chunk_gated_delta_rule fused_recurrent_gdn=fused_recurrent_gated_delta_rule"
_INDEX = (
    "get_max_num_splits prepare_chunk_indices prepare_chunk_indices_static prepare_chunk_offsets "
    "prepare_cu_seqlens_from_lens prepare_cu_seqlens_from_mask prepare_lens prepare_lens_from_mask "
    "prepare_position_ids prepare_sequence_ids prepare_split_cu_seqlens prepare_token_indices tensor_cache"
)
_PACK = "pack_sequence unpack_sequence"
_LAYER_NORM = "RMSNorm layer_norm_fn rms_norm_fn layer_norm_linear_fn layer_norm_ref rms_norm_ref"
_STEPS = (
    "chunk_scan chunk_scan_ref=chunk_scan chunk_state chunk_state_ref=chunk_state chunk_state_varlen "
    "state_passing state_passing_ref=state_passing"
)
_MIXER_NORM = "RMSNorm layer_norm_fn rms_norm_fn"
_GROUPED = {
    "fla.norms": "RMSNormGated",
    "mamba_ssm.norms": "LayerNormGated layernorm_fn rms_norm_ref=rms_norm_gated_ref rmsnorm_fn",
}
_DELTA_RULE = "chunk_gated_delta_rule fused_recurrent_gated_delta_rule"
_KDA = "chunk_kda fused_recurrent_kda"

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
        "mamba_ssm": {"mamba_ssm": f"{_SCAN} mamba_inner_fn Mamba Mamba2 Mamba3 MambaLMHeadModel"},
        "mamba_ssm.distributed": {},
        "mamba_ssm.distributed.distributed_utils": {"mamba_ssm.ranks": "all_reduce reduce_scatter"},
        "mamba_ssm.distributed.tensor_parallel": {"mamba_ssm.ranks": "ColumnParallelLinear RowParallelLinear"},
        "mamba_ssm.models": {},
        "mamba_ssm.models.config_mamba": {"mamba_ssm.models": "MambaConfig"},
        "mamba_ssm.models.mixer_seq_simple": {
            "mamba_ssm": "Block GatedMLP MHA Mamba Mamba2",
            "mamba_ssm.checkpoints": "load_config_hf load_state_dict_hf",
            "mamba_ssm.generation": "GenerationMixin",
            "mamba_ssm.models": "MambaConfig MambaLMHeadModel MixerModel _init_weights create_block",
            "mamba_ssm.norms": _MIXER_NORM,
        },
        "mamba_ssm.modules": {},
        "mamba_ssm.modules.block": {"mamba_ssm": "Block", "mamba_ssm.norms": "RMSNorm layer_norm_fn"},
        "mamba_ssm.modules.mamba2": {
            "causal_conv1d": f"{_CONV} causal_conv1d_varlen_states",
            "mamba_ssm": f"Mamba2 RMSNormGated selective_state_update {_SSD}",
        },
        "mamba_ssm.modules.mamba2_simple": {
            "causal_conv1d": "causal_conv1d_fn",
            "mamba_ssm": f"Mamba2Simple RMSNormGated {_SSD}",
            "mamba_ssm.norms": "LayerNorm=LayerNormGated",
        },
        "mamba_ssm.modules.mamba3": {"mamba_ssm": "Mamba3 RMSNormGated"},
        "mamba_ssm.modules.mamba_simple": {
            "causal_conv1d": _CONV,
            "mamba_ssm": f"Mamba Block {_SCAN} mamba_inner_fn selective_state_update",
            "mamba_ssm.norms": _MIXER_NORM,
        },
        "mamba_ssm.modules.mha": {"causal_conv1d": _CONV, "mamba_ssm": "MHA"},
        "mamba_ssm.modules.mlp": {"mamba_ssm": "GatedMLP"},
        "mamba_ssm.modules.ssd_minimal": {
            "mamba_ssm": "mamba_chunk_scan_combined",
            "mamba_ssm.minimal": "segsum segsum_unstable=segsum ssd_minimal_discrete",
        },
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.selective_scan_interface": {
            "mamba_ssm": f"{_SCAN} mamba_inner_fn",
            "mamba_ssm.parts": "mamba_inner_ref=mamba_inner_fn selective_scan_ref",
        },
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.k_activations": {"mamba_ssm.norms": "swiglu"},
        "mamba_ssm.ops.triton.layer_norm": {"mamba_ssm.norms": _LAYER_NORM},
        "mamba_ssm.ops.triton.layernorm": {"mamba_ssm.norms": _LAYER_NORM},  # before 2.0
        "mamba_ssm.ops.triton.layernorm_gated": {
            "mamba_ssm.norms": "LayerNorm=LayerNormGated RMSNorm=RMSNormGated layernorm_fn "
            "rms_norm_ref=rms_norm_gated_ref rmsnorm_fn",
        },
        "mamba_ssm.ops.triton.selective_state_update": {
            "mamba_ssm": "selective_state_update",
            "mamba_ssm.parts": "selective_state_update_ref",
        },
        "mamba_ssm.ops.triton.ssd_chunk_scan": {"mamba_ssm.chunks": "chunk_scan chunk_scan_ref=chunk_scan"},
        "mamba_ssm.ops.triton.ssd_chunk_state": {
            "mamba_ssm.chunks": "chunk_state chunk_state_ref=chunk_state chunk_state_varlen "
            "_chunk_cumsum_fwd=chunk_cumsum _chunk_state_fwd=chunk_state_fwd",
        },
        "mamba_ssm.ops.triton.ssd_combined": {
            "mamba_ssm": _SSD,
            "mamba_ssm.chunks": _STEPS,
            "mamba_ssm.norms": "rmsnorm_fn",
            "mamba_ssm.parts": "mamba_chunk_scan mamba_conv1d_scan_ref mamba_split_conv1d_scan_ref "
            "ssd_chunk_scan_combined_ref=mamba_chunk_scan ssd_selective_scan",
        },
        "mamba_ssm.ops.triton.ssd_state_passing": {
            "mamba_ssm.chunks": "state_passing state_passing_ref=state_passing _state_passing_fwd=state_passing_fwd",
        },
        "mamba_ssm.utils": {},
        "mamba_ssm.utils.generation": {
            "mamba_ssm.generation": "DecodingCGCache GenerationMixin InferenceParams capture_graph decode "
            "modify_logit_for_repetition_penalty modify_logits_for_min_p_filtering modify_logits_for_top_k_filtering "
            "modify_logits_for_top_p_filtering sample update_graph_cache",
        },
        "mamba_ssm.utils.hf": {"mamba_ssm.checkpoints": "load_config_hf load_state_dict_hf"},
    },
    "it has the mixers of Mamba-1 to Mamba-3, and neither kernels of Mamba-3 nor what splits models over ranks",
)

_FLA = Library(
    "fla",
    "0.6.0",
    ("flash-linear-attention", "fla-core"),
    {
        "fla": {},
        "fla.layers": {},
        "fla.layers.utils": {
            "fla.padding": "get_layer_cache get_unpad_data index_first_axis index_put_first_axis pad_input "
            "require_cache_layer_idx unpad_input update_layer_cache",
        },
        "fla.modules": {
            "fla": "FusedRMSNormGated RMSNorm ShortConvolution",
            "fla.norms": "FusedLayerNormGated FusedRMSNormSwishGate L2Norm",
        },
        "fla.modules.causal_conv1d": {"fla.convolution": _SHORT},
        "fla.modules.conv": {"fla.convolution": _SHORT},  # before 0.6, as six more
        "fla.modules.conv.short_conv": {"fla.convolution": "ShortConvolution"},
        "fla.modules.convolution": {"fla.convolution": _SHORT},
        "fla.modules.fused_norm_gate": {"fla.norms": _GATED},
        "fla.modules.l2norm": {"fla.norms": "L2Norm l2_norm=l2norm l2norm"},
        "fla.modules.layernorm": {"fla.norms": "RMSNorm layer_norm rms_norm"},
        "fla.modules.layernorm_gated": _GROUPED,
        "fla.modules.norm": {
            "fla.norms": "FusedLayerNormGated FusedRMSNormGated FusedRMSNormSwishGate L2Norm RMSNorm RMSNormGated",
            "mamba_ssm.norms": "LayerNormGated",
        },
        "fla.modules.norm.fused_norm_gate": {"fla.norms": _GATED},
        "fla.modules.norm.l2norm": {"fla.norms": "L2Norm l2_norm=l2norm l2norm"},
        "fla.modules.norm.layernorm": {"fla.norms": "RMSNorm layer_norm rms_norm"},
        "fla.modules.norm.layernorm_gated": _GROUPED,
        "fla.ops": {"fla": f"{_DELTA_RULE} {_KDA}", "fla.delta_rule": _GDN},
        "fla.ops.gated_delta_rule": {
            "fla": _DELTA_RULE,
            "fla.delta_rule": f"{_GDN} naive_chunk_gated_delta_rule naive_recurrent_gated_delta_rule",
        },
        "fla.ops.gated_delta_rule.chunk": {
            "fla": "chunk_gated_delta_rule chunk_gdn=chunk_gated_delta_rule",
        },
        "fla.ops.gated_delta_rule.fused_recurrent": {
            "fla": "fused_recurrent_gated_delta_rule fused_recurrent_gdn=fused_recurrent_gated_delta_rule",
        },
        "fla.ops.gated_delta_rule.gate": {"fla.delta_rule": "fused_gdn_gate naive_gdn_gate=fused_gdn_gate"},
        "fla.ops.gated_delta_rule.naive": {
            "fla.delta_rule": "naive_chunk_gated_delta_rule naive_recurrent_gated_delta_rule",
        },
        "fla.ops.kda": {"fla": _KDA},
        "fla.ops.kda.chunk": {"fla": "chunk_kda"},
        "fla.ops.kda.fused_recurrent": {"fla": "fused_recurrent_kda"},
        "fla.ops.kda.gate": {"fla.kda": "fused_kda_gate naive_kda_gate naive_kda_lowerbound_gate"},
        "fla.ops.kda.naive": {"fla.kda": "naive_chunk_kda naive_recurrent_kda"},
        "fla.ops.utils": {"fla.index": f"{_INDEX} {_PACK}"},
        "fla.ops.utils.index": {"fla.index": _INDEX},
        "fla.ops.utils.pack": {"fla.index": _PACK},
        "fla.utils": {"fla.index": "tensor_cache"},
    },
    "it has the functions of the gated delta rule and KDA and the modules beside them, and no layers, models or other "
    "kinds of attention",
)

LIBRARIES = {library.name: library for library in (_CAUSAL_CONV1D, _MAMBA_SSM, _FLA)}
"""The libraries, by import name."""
