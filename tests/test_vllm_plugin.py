"""examples/vllm_plugin, installed, under a stand-in of vLLM: its entry-point group, its modules, their signatures."""

from pathlib import Path

import pytest

from tests.test_backend_plugin import install, succeed

pytest.importorskip("setuptools", reason="installing the plug-in needs setuptools and pip")
pytest.importorskip("pip")

OPS = "model_executor/layers/mamba/ops"
STAND_IN = {
    # calls what is in the group, as vLLM does in each process: those that VLLM_PLUGINS names, an error is logged
    "plugins/__init__.py": """
import logging, os
from importlib.metadata import entry_points

def load_general_plugins():
    wanted = os.environ.get("VLLM_PLUGINS")
    for entry in entry_points(group="vllm.general_plugins"):
        if wanted is None or entry.name in wanted.split(","):
            try:
                entry.load()()
            except Exception:
                logging.getLogger("vllm").exception("Failed to load plugin %s", entry.name)
""",
    "config.py": """
class CompilationConfig:
    _attention_ops = ["vllm::unified_attention_with_output", "vllm::mamba_mixer2", "vllm::short_conv"]
""",
    f"{OPS}/mamba_ssm.py": """
def selective_state_update(state, x, dt, A, B, C, D, dt_bias, z=None, dt_softplus=False, state_batch_indices=None,
                           dst_state_batch_indices=None, null_block_id=0, out=None, num_accepted_tokens=None,
                           cu_seqlens=None, is_blackwell=False, enable_stochastic_rounding=False,
                           cache_philox_rounds=0):
    raise NotImplementedError

def selective_scan_fn(u, ssm_states, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                      query_start_loc=None, cache_indices=None, has_initial_state=None, null_block_id=0,
                      block_size=1024, block_idx_first_scheduled_token=None, block_idx_last_scheduled_token=None,
                      initial_state_idx=None, cu_chunk_seqlen=None, last_chunk_indices=None):
    raise NotImplementedError
""",
    f"{OPS}/causal_conv1d.py": """
def causal_conv1d_fn(x, weight, bias, conv_states, query_start_loc, cache_indices=None, has_initial_state=None,
                     activation="silu", pad_slot_id=-1, null_block_id=0, metadata=None, validate_data=False):
    raise NotImplementedError

def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None, conv_state_indices=None,
                         num_accepted_tokens=None, query_start_loc=None, max_query_len=-1, null_block_id=0,
                         validate_data=False, out=None):
    raise NotImplementedError
""",
    f"{OPS}/ssd_combined.py": """
def mamba_chunk_scan_combined_varlen(x, dt, A, B, C, chunk_size, cu_seqlens, cu_chunk_seqlens, last_chunk_indices,
                                     seq_idx, out, D=None, z=None, dt_bias=None, initial_states=None,
                                     dt_softplus=False, dt_limit=(0.0, float("inf")),
                                     return_intermediate_states=False, state_dtype=None, final_states_out=None,
                                     final_state_indices=None):
    raise NotImplementedError
""",
    "model_executor/layers/mamba/mamba_mixer2.py": """
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_update
""",
}
START = """
import importlib, sys
from vllm.plugins import load_general_plugins
from vllm.model_executor.layers.mamba import mamba_mixer2  # before the plug-in is loaded
sys.modules["vllm.never"] = None  # which is how a module is kept from being imported
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install("vllm_plugin", tmp_path_factory.mktemp("vllm_plugin"))


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """A folder with the stand-in."""
    for name, text in STAND_IN.items():
        path = tmp_path / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_vllm_runs_on_our_ops(plugin: Path, engine: Path) -> None:
    code = """
load_general_plugins()
load_general_plugins()  # it may be called again
import torch
from mamba_ops.compat import vllm as ours
from mamba_ops_vllm_plugin import FUNCTIONS
for module, names in FUNCTIONS.items():
    for name in names:
        assert getattr(sys.modules[module], name) is getattr(ours, name), name
x, state = torch.randn(2, 8), torch.randn(3, 3, 8).transpose(1, 2)
kept = state.clone()
weight, slots = torch.randn(8, 4), torch.tensor([1, 2], dtype=torch.int32)
y = mamba_mixer2.causal_conv1d_update(x.clone(), state, weight, conv_state_indices=slots)
expected = (torch.cat([kept[1:], x.unsqueeze(2)], 2) * weight).sum(2)
torch.testing.assert_close(y, expected)
assert torch.equal(state[1:, :, 2], x)
assert torch.ops.mamba_ops_vllm.mamba_mixer2.default
print("right")
"""
    assert succeed(START + code, plugin, engine).split() == ["right"]


def test_a_plugin_that_is_not_asked_for_does_nothing(plugin: Path, engine: Path) -> None:
    code = "load_general_plugins(); print('mamba_ops' in sys.modules, mamba_mixer2.causal_conv1d_update.__module__)"
    said = succeed(START + code, plugin, engine, VLLM_PLUGINS="another")
    assert said.split() == ["False", "vllm.model_executor.layers.mamba.ops.causal_conv1d"]


@pytest.mark.slow
def test_functions_with_other_arguments_stay_and_it_is_said(plugin: Path, engine: Path) -> None:
    """As in another version of vLLM: an argument more, a function that is gone, a module that is gone."""
    ops = engine / "vllm" / OPS
    text = (ops / "causal_conv1d.py").read_text()
    (ops / "causal_conv1d.py").write_text(text.replace("validate_data=False, out=None", "validate_data=False, more=1"))
    text = (ops / "mamba_ssm.py").read_text()
    (ops / "mamba_ssm.py").write_text(text.replace("def selective_scan_fn", "def selective_scan"))
    (ops / "ssd_combined.py").unlink()
    code = """
import logging
logging.basicConfig(format="%(message)s", stream=sys.stdout)
load_general_plugins()
from vllm.model_executor.layers.mamba.ops import causal_conv1d
print(causal_conv1d.causal_conv1d_fn.__module__, mamba_mixer2.causal_conv1d_update.__module__)
"""
    *said, last = succeed(START + code, plugin, engine).splitlines()
    assert len(said) == 3
    ours = "vllm.model_executor.layers.mamba.ops"
    assert said[0].startswith(
        f"{ours}.mamba_ssm.selective_scan_fn is not replaced: it is not there, and ours takes u, "
    )
    assert said[1].startswith(f"{ours}.causal_conv1d.causal_conv1d_update is not replaced: it takes x, conv_state, ")
    assert said[2] == f"{ours}.ssd_combined is not replaced: No module named '{ours}.ssd_combined'"
    assert last.split() == ["mamba_ops.compat.vllm", f"{ours}.causal_conv1d"]


def test_splitting_ops_are_theirs_and_ours(plugin: Path, engine: Path) -> None:
    code = """
load_general_plugins()
from mamba_ops_vllm_plugin import splitting_ops
from vllm.config import CompilationConfig
theirs = CompilationConfig._attention_ops
found = splitting_ops()
assert found[: len(theirs)] == theirs  # in this order: so vLLM takes the list for piecewise
assert len(set(found)) == len(found)
print(*found[len(theirs):])
"""
    found = succeed(START + code, plugin, engine).split()
    kinds = ("mamba", "mamba2", "mamba3", "gdn", "kda", "short_conv")
    names = {f"mamba_ops::{kind}_mixing" for kind in kinds}
    names |= {f"mamba_ops_vllm::{op}" for op in ("mamba_mixer", "mamba_mixer2", "short_conv", "gdn_attention_core_xpu")}
    assert set(found) == names
