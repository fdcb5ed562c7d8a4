"""Without a private name of Triton's, calls, swaps and warm-ups still work; slower will do, with one warning."""

import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from mamba_ops.ops._triton import _triton
from tests import fresh
from tests.conftest import ACCELERATOR
from tests.harness import compiled_for_a_gpu

ROOT = Path(__file__).parents[1]
PROGRAM = """
import importlib, json, os, sys, warnings
from functools import reduce
import torch, triton, torch._dynamo, torch._functorch.aot_autograd
import triton.experimental.gluon, triton.runtime.interpreter  # so that what Triton itself uses is bound

def remove(name):
    module, _, path = name.partition(":")
    owner, _, last = path.rpartition(".")
    owner = reduce(getattr, owner.split(".") if owner else [], importlib.import_module(module))
    holders = [holder for holder in (owner, type(owner)) if last in vars(holder)]
    assert holders or last == "device_caches", name  # which kernels that are interpreted do not have
    for holder in holders:
        delattr(holder, last)
    assert not hasattr(owner, last) or last == "run", name  # which the base of kernels has, too

def check():
    import mamba_ops
    from torch._dynamo.utils import counters

    x, weight = torch.randn(3, 24), torch.randn(24, 4)
    state = torch.randn(3, 3, 24).transpose(1, 2)

    def step(x, state):
        return mamba_ops.causal_conv1d_update(x, state, weight)

    ran = []
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), mamba_ops.registry.record_selections() as ran:
        for backend in ("triton", "torch", "triton"):
            with mamba_ops.use_backend(backend):
                mine, theirs = state.clone(), state.clone()
                got, expected = step(x, mine), compiled(x, theirs)
            if backend == "triton":
                outputs = got, mine
            assert torch.equal(got, expected) and torch.equal(mine, theirs), "eager and compiled differ"
            for ours, reference in zip(outputs, (got, mine)):
                torch.testing.assert_close(ours, reference)
    assert {r.backend for r in ran} == {"triton", "torch"}, ran
    assert counters["stats"]["unique_graphs"] == 1, counters["stats"]
    from mamba_ops.ops._triton import launch_config
    assert launch_config.family(-1) == "interpreted"

for names in sys.argv[1:]:
    if (child := os.fork()) == 0:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for name in names.split():
                remove(name)
            check()
        said = [str(w.message) for w in caught if "this Triton has no" in str(w.message)]
        print(json.dumps([names, said]), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, names
"""
DAILY = [" ".join(_triton.PRIVATE), _triton.LOAD]
WATCHED = {
    _triton.LOAD: "JITFunction._do_compile: no_jit()",
    _triton.TUNE: "Autotuner._bench: no_jit()",
}


interpreted = pytest.mark.skipif(ACCELERATOR is not None, reason="its forks interpret kernels, on a CPU")


def without(*names: str) -> None:
    """Call, compile and swap in a fork for each name, or names, that Triton lacks there."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    done = fresh.run(["-c", PROGRAM, *names], cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    said = dict(json.loads(line) for line in done.stdout.splitlines())
    assert list(said) == list(names)
    for gone, messages in said.items():
        expected = [words for name, words in WATCHED.items() if name in gone.split()]
        assert len(messages) == len(expected)
        assert all(words in message for words, message in zip(expected, messages, strict=True))


@interpreted
def test_calls_without_private_names() -> None:
    """All of them at once, and some alone."""
    without(*DAILY)


@interpreted
@pytest.mark.slow
def test_calls_without_each_private_name() -> None:
    without(*(name for name in _triton.PRIVATE if name not in DAILY))


WARM_UP = """
import os, torch, warnings
import mamba_ops
from mamba_ops.ops._triton import _triton

named = _triton.named
counts = []
for name in sys.argv[1:]:
    if (child := os.fork()) == 0:
        def without(module, path):
            if f"{module}:{path}" == name:
                raise AttributeError(name)
            return named(module, path)

        _triton.named = without
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = mamba_ops.warm_up("causal_conv1d_update", device="cpu", dtypes=[(torch.bfloat16, torch.bfloat16)])
            with mamba_ops.no_jit():
                sample = mamba_ops.causal_conv1d_update.make_samples("cpu")[0]
                mamba_ops.causal_conv1d_update(*sample.args, **sample.kwargs)
        assert report and not report.skipped, report.skipped
        said = {str(w.message) for w in caught if "this Triton has no" in str(w.message)}
        os._exit(100 + len(said))  # an error ends it with 1
    counts.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(counts))
"""


def test_a_warm_up_without_private_names() -> None:
    """It calls everything all the same; what was hidden from it, it said once. HASH is for devices that are here."""
    names = [*(_triton.BEFORE_LOAD, _triton.LOADED, _triton.PRELOAD, _triton.TARGET, _triton.CACHE_DIR), "none:of_them"]
    assert compiled_for_a_gpu(WARM_UP, *names, compiles=False) == [101, 101, 101, 101, 101, 100]


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names to hide."""
    hidden: list[str] = []
    named = _triton.named

    def without(module: str, name: str) -> object:
        if f"{module}:{name}" in hidden:
            raise AttributeError(name)
        return None if f"{module}:{name}" == _triton.DRIVER else named(module, name)

    monkeypatch.setattr(_triton, "named", without)
    _triton._warn_once.cache_clear()
    return hidden


@pytest.mark.parametrize("name", _triton.ON_DISK)
def test_what_is_on_disk_may_not_be_known(name: str, gone: list[str]) -> None:
    gone.append(name)
    with pytest.warns(RuntimeWarning, match=f"no {name.partition(':')[2]}: a warm-up has kernels compiled"):
        assert not _triton.is_on_disk(object(), {})


def test_the_cache_is_where_it_is_without_its_name_too(
    gone: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variables in ({"TRITON_CACHE_DIR": str(tmp_path)}, {"TRITON_HOME": str(tmp_path)}, {}):
        for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        gone.clear()
        found = _triton.cache_dir()
        gone.append(_triton.CACHE_DIR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert _triton.cache_dir() == found


@pytest.mark.parametrize(
    ("properties", "family"),
    [({"major": 9, "minor": 0}, "cuda-90"), ({"gcnArchName": "gfx942:sramecc+"}, "hip-gfx942")],
)
def test_devices_have_the_same_names_by_torch(
    properties: dict[str, object], family: str, gone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    gone.append(_triton.DRIVER)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    module = SimpleNamespace(get_device_properties=lambda: SimpleNamespace(**properties))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    with pytest.warns(RuntimeWarning, match=r"no driver\.active: devices are named after"):
        assert _triton.device_family() == family


def test_other_names_turn_off_what_needs_them(gone: list[str]) -> None:
    gone += [_triton.HASH, _triton.COMPILED]
    with pytest.warns(RuntimeWarning, match=r"no triton_key: its files are hashed at the first launch"):
        _triton.hash_sources()
    with (
        pytest.warns(RuntimeWarning, match=r"no knobs\.runtime\.jit_post_compile_hook: nothing is heard"),
        _triton.hook(_triton.COMPILED, print, "nothing is heard"),
    ):
        pass
    with pytest.warns(RuntimeWarning, match=r"no device_caches: the variants of a kernel that are loaded"):
        assert _triton.variants(object()) == []
    _triton._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"no device_caches: variants"), _triton.unloaded([object()]):
        pass


def test_the_package_has_private_names_of_triton_in_one_file() -> None:
    sources = [path for path in (ROOT / "mamba_ops").rglob("*.py") if path.name != "_triton.py"]
    assert len(sources) > 100
    private = ("triton.runtime.jit", "knobs", "device_caches", "triton.compiler", "triton.backends.", "triton_key")
    found = [(path.name, line) for path in sources for line in path.read_text().splitlines()]
    assert [f for f in found if any(name in f[1] for name in private) and "mamba_ops" not in f[1]] == []


WHILE_REHEARSING = """
import json, triton
from mamba_ops.cold_start.targets import StandIn, target_of
from mamba_ops.ops._triton import _triton

triton.runtime.driver.set_active(StandIn(target_of("sm_90")))
_triton.replace_run(lambda run, function, *args, **kwargs: run(function, *args, **kwargs))
found = _triton.launching()
watched = [found is not None and found.is_watched()]
_triton.replace_run(None)
watched.append(found is not None and found.is_watched())
print(json.dumps([found is not None, watched]))
"""


def test_a_rehearsal_of_another_thread_does_not_make_all_launches_long() -> None:
    """What is first asked while one is under way is remembered."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = fresh.run(["-c", WHILE_REHEARSING], cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)})
    assert json.loads(done.stdout) == [True, [True, False]], done.stderr
