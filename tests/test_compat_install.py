"""mamba_ops.compat.install: the import paths of other libraries lead here, and back again."""

import importlib
import importlib.metadata
import importlib.util
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mamba_ops.compat import install
from mamba_ops.compat.paths import LIBRARIES

NAMES = tuple(LIBRARIES)


@pytest.fixture(autouse=True)
def _without_originals() -> Iterator[None]:
    if any(importlib.util.find_spec(name) for name in NAMES):
        pytest.skip("an original is installed")
    yield
    assert not any(module.partition(".")[0] in NAMES for module in sys.modules)
    assert not any(type(finder).__module__ == "mamba_ops.compat.installing" for finder in sys.meta_path)


@pytest.fixture(autouse=True)
def _no_late_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests import modeling files, of which the first installation would warn."""
    monkeypatch.setattr("mamba_ops.compat.installing._seen", set(NAMES))


def test_every_path_is_there_while_installed() -> None:
    with install(*NAMES):
        for library in LIBRARIES.values():
            for path, sources in library.modules.items():
                module = importlib.import_module(path)
                assert module.__spec__ is importlib.util.find_spec(path)
                for name in " ".join(sources.values()).split():
                    theirs = name.partition("=")[0]
                    value: Any = getattr(module, theirs)
                    assert value is not None
                    owner = getattr(value, "__module__", "mamba_ops")
                    assert owner is None or owner.startswith(("mamba_ops", "torch", "builtins")), f"{path}.{theirs}"
    for name in NAMES:
        with pytest.raises(ModuleNotFoundError, match=f"No module named '{name}'"):
            importlib.import_module(name)


def test_a_whole_library_is_there_once_its_first_module_is() -> None:
    with install("mamba_ssm"):
        mamba_ssm: Any = importlib.import_module("mamba_ssm")
        assert mamba_ssm.__version__ == LIBRARIES["mamba_ssm"].version
        own = mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined
        assert own.__module__.startswith("mamba_ops.")


@pytest.mark.parametrize("name", NAMES)
def test_metadata_tell_of_it(name: str) -> None:
    library = LIBRARIES[name]
    for distribution in library.distributions:
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(distribution)
    with install(name):
        for distribution in (*library.distributions, library.distributions[0].replace("-", "_").upper()):
            assert importlib.metadata.version(distribution) == library.version
        assert set(library.distributions) <= set(importlib.metadata.packages_distributions()[name])
        assert importlib.metadata.metadata(library.distributions[0])["Name"] == library.distributions[0]
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version(library.distributions[0])


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("fla.ops.chunk_gla", "other kinds of attention"),
        ("fla.layers.GatedDeltaNet", "no layers"),
        ("fla.models", "no layers, models"),
        ("fla.utils.input_guard", "other kinds of attention"),
        ("fla.ops.gated_delta_rule.chunk.chunk_gated_delta_rule_fwd", "other kinds of attention"),
        ("mamba_ssm.ops.triton.mamba3", "neither kernels of Mamba-3"),
        ("mamba_ssm.ops.selective_scan_interface.SelectiveScanFn", "neither kernels of Mamba-3"),
        ("causal_conv1d.causal_conv1d_interface.CausalConv1dFn", "the functions alone"),
    ],
)
def test_what_is_not_here_says_so(path: str, says: str) -> None:
    """Modules, and names of modules that are there; to those who look for an attribute, too."""
    parent, _, name = path.rpartition(".")
    with install("causal_conv1d", "fla", "mamba_ssm"):
        with pytest.raises(ModuleNotFoundError, match=f"{path}: .*{says}"):
            importlib.import_module(path)
        with pytest.raises(ModuleNotFoundError, match=f"{path}: .*{says}"):
            exec(f"from {parent} import {name}")
        module = importlib.import_module(parent)
        with pytest.raises(AttributeError, match=f"module '{parent}' has no attribute '{name}': .*{says}"):
            getattr(module, name)
        assert not hasattr(module, "__all__")


@pytest.mark.parametrize(
    "line",
    [
        "from mamba_ssm.models.mixer_seq_simple import GenerationMixin, MixerModel, _init_weights, load_config_hf",
        "from mamba_ssm.modules.mamba_simple import Block, Mamba, causal_conv1d_fn, mamba_inner_fn, selective_scan_fn",
        "from mamba_ssm.modules.mamba2 import Mamba2, RMSNormGated, mamba_split_conv1d_scan_combined",
        "from mamba_ssm.distributed.tensor_parallel import ColumnParallelLinear, RowParallelLinear",
        "from mamba_ssm.distributed.distributed_utils import all_reduce, reduce_scatter",
        "from mamba_ssm.ops.triton.ssd_combined import chunk_state, mamba_conv1d_scan_ref, state_passing",
        "from mamba_ssm.ops.triton.layernorm import RMSNorm, layer_norm_fn, rms_norm_fn, rms_norm_ref",
        "from fla.layers.utils import get_layer_cache, get_unpad_data, index_first_axis, pad_input, unpad_input",
        "from fla.modules.layernorm_gated import RMSNormGated",
        "from fla.modules.conv.short_conv import ShortConvolution",
        "from fla.ops.utils import pack_sequence, prepare_lens_from_mask, unpack_sequence",
    ],
)
def test_what_layers_of_others_import(line: str) -> None:
    """Names that a module of the original has from others, and what its mixers import."""
    with install(*NAMES):
        exec(line)


def test_one_rank_is_all_there_is() -> None:
    with install("mamba_ssm"):
        split: Any = importlib.import_module("mamba_ssm.distributed.tensor_parallel")
        between: Any = importlib.import_module("mamba_ssm.distributed.distributed_utils")
    for name in ("ColumnParallelLinear", "RowParallelLinear"):
        with pytest.raises(ValueError, match=rf"{name}: process_group: got one, expected .*mamba_ops\.distributed"):
            getattr(split, name)(8, 8, process_group=object())
    for name in ("all_reduce", "reduce_scatter"):
        with pytest.raises(ValueError, match=f"{name}: process_group: got one"):
            getattr(between, name)(None, object())


def test_undo_works_in_any_order() -> None:
    first, second = install("fla", "causal_conv1d"), install("causal_conv1d", "mamba_ssm")
    module = importlib.import_module("causal_conv1d")
    first.undo()
    first.undo()
    assert importlib.import_module("causal_conv1d") is module
    assert importlib.util.find_spec("fla") is None
    with install("fla"):
        second.undo()
        assert importlib.util.find_spec("causal_conv1d") is None
        assert importlib.import_module("fla.ops").chunk_gated_delta_rule
    assert "undone" in repr(second)


def test_threads_install_and_import_at_once() -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(30):
                with install(NAMES[(number + turn) % 3], NAMES[number % 3]):
                    importlib.import_module(NAMES[number % 3])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_an_original_is_not_replaced_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "causal_conv1d.py").write_text("causal_conv1d_fn = 'original'\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"install: causal_conv1d: it is installed at .*, expected .*replace=True"):
        install("fla", "causal_conv1d")
    assert importlib.util.find_spec("fla") is None  # nothing of a refused call
    with install("causal_conv1d", replace=True):
        assert callable(importlib.import_module("causal_conv1d").causal_conv1d_fn)
    assert importlib.import_module("causal_conv1d").causal_conv1d_fn == "original"
    with pytest.raises(ValueError, match="install: causal_conv1d: causal_conv1d is imported already, expected a proc"):
        install("causal_conv1d", replace=True)
    del sys.modules["causal_conv1d"]


def test_unknown_libraries_are_refused() -> None:
    with pytest.raises(ValueError, match="install: libraries: got 'flash_attn', expected some of causal_conv1d, fla"):
        install("flash_attn")
    with pytest.raises(ValueError, match="install: libraries: got none"):
        install()


def test_modeling_files_that_looked_before_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    file = type(sys)("transformers.models.some.modeling_some")
    vars(file)["use_kernel_func_from_hub_with_fallback"] = None
    monkeypatch.setitem(sys.modules, file.__name__, file)
    monkeypatch.setattr("mamba_ops.compat.installing._seen", set())
    with (
        pytest.warns(UserWarning, match=rf"install: .*{file.__name__}.*: imported before.*use_mamba_ops"),
        install("fla"),
    ):
        pass
    with install("fla"):
        pass
