"""BackendConfig: from code, a string and the environment; what it refuses; what it puts in force, and before what."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.idle_ops import does_nothing
from mamba_ops import BackendConfig, causal_conv1d_update, configure, explain, selective_state_update, use_backend
from mamba_ops.registry import (
    Backend,
    ConfigError,
    NoBackendError,
    Op,
    RegistryError,
    backends,
    ops,
    record_selections,
    settings,
)
from mamba_ops.registry.dispatcher import dispatcher
from tests import fresh
from tests.harness import environment

CPU = torch.device("cpu")
CONV, SSM = causal_conv1d_update, selective_state_update


def forget_environment() -> None:
    """Read the variable again at the next decision."""
    dispatcher._environments.clear()
    dispatcher.changed()


@pytest.fixture(autouse=True)
def _nothing_in_force() -> Iterator[None]:
    yield
    configure(None)
    forget_environment()


@pytest.fixture
def idle() -> Iterator[Backend]:
    """A backend of the two decode ops that does nothing, and refuses a batch of 3."""
    made = Backend("idle", devices=None, priority=-100)
    for op in (CONV, SSM):
        refusal = lambda x: "takes no batch of 3" if x.shape[0] == 3 else None  # noqa: E731
        made.implements(op, unsupported=refusal)(does_nothing(op.parameters))
    yield made
    made.remove()


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> Backend:
    """The backend of that name, as if it were installed and ran here."""
    [backend] = [backend for backend in backends() if backend.name == "flashinfer"]
    for name, value in (("devices", None), ("_import_problem", lambda: None), ("why_not_setting", None)):
        monkeypatch.setattr(backend, name, value)
    return backend


def arguments(op: Op[...], rows: int = 2) -> tuple[Tensor, ...]:
    x, B = torch.zeros(rows, 8), torch.zeros(rows, 4)
    if op is CONV:
        return x, torch.zeros(rows, 8, 3), torch.zeros(8, 4)
    return torch.zeros(rows, 8, 4), x, x, torch.zeros(8, 4), B, B


def runs_on(op: Op[...], rows: int = 2) -> tuple[str | None, str | None]:
    """Where a decode step would run, and who asked for that."""
    found = explain(op, *arguments(op, rows))
    return found.backend, found.bound_by


# -- making one -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("idle", "flashinfer")
@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("idle", {"order": "idle"}),
        ("Idle : TORCH", {"order": ["idle", "torch"]}),
        ("selective_state_update=idle:torch", {"order": {"selective_state_update": ("idle", "torch")}}),
        ("torch, Causal_Conv1d_Update=idle", {"order": {"*": "torch", "causal_conv1d_update": ["idle"]}}),
        (
            "stochastic_rounding=yes,philox_rounds=6,flashinfer_algorithm=Simple",
            {"stochastic_rounding": True, "philox_rounds": 6, "flashinfer_algorithm": "simple"},
        ),
    ],
)
def test_from_a_string_and_back(text: str, values: dict[str, Any]) -> None:
    config = BackendConfig(**values)
    assert BackendConfig.from_string(text) == config
    assert BackendConfig.from_string(str(config)) == config
    with environment(MAMBA_OPS_BACKEND=text):
        assert BackendConfig.from_env() == config


@pytest.mark.usefixtures("idle")
def test_every_problem_is_listed_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        BackendConfig(
            {
                "selective_stat_update": "idle",
                "causal_conv1d_update": "tirton",
                "mamba_chunk_scan": "idle",
                "selective_scan": "torch:torch",
                "causal_conv1d": (),
                "*": "sycl",
            },
            stochastic_rounding="yes",  # type: ignore[arg-type]
            philox_rounds=-1,
            flashinfer_algorithm="fast",
            device="cpu",
        )
    names, known = ", ".join(sorted(ops())), ", ".join(sorted(backend.name for backend in backends()))
    assert refused.value.problems == [
        f"order: unknown op 'selective_stat_update'; valid: {names}; did you mean selective_state_update?",
        f"order: unknown backend 'tirton'; valid: {known}; did you mean triton?",
        "order: backend 'idle' has no kernel for mamba_ops::mamba_chunk_scan; it can run on: torch, triton",
        "order: torch is named twice for selective_scan",
        "order: no backend is named for causal_conv1d",
        "order: sycl runs on xpu, not on cpu",
        "stochastic_rounding: got 'yes', expected True or False",
        "philox_rounds: got -1, expected a number of rounds, 1 to 100, or 0 for the default of 10",
        "flashinfer_algorithm: got 'fast', expected auto, simple, vertical, horizontal",
    ]
    assert str(refused.value).startswith(
        "the configuration has 9 problems:\n  order: unknown op 'selective_stat_update'"
    )


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("torch,triton", ["got the bare names torch, triton, expected at most one; an order is written torch:triton"]),
        ("philox_rounds=6,philox_rounds=7", ["got philox_rounds twice"]),
        (
            "flashinfer_algorithm=fast",
            ["flashinfer_algorithm: got 'fast', expected auto, simple, vertical, horizontal"],
        ),
        (
            "stochastic_rounding=maybe,philox_rounds=few,causal_conv1d_update=sycl",
            [
                "stochastic_rounding: got 'maybe', expected true or false",
                "philox_rounds: got 'few', expected a number of rounds, or 0 for the default of 10",
                (
                    "order: backend 'sycl' has no kernel for mamba_ops::causal_conv1d_update; "
                    "it can run on: cpp, torch, triton"
                ),
                "order: sycl runs on xpu, not on cpu",
            ],
        ),
    ],
)
def test_every_problem_of_a_string_is_listed_at_once(text: str, problems: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        BackendConfig.from_string(text, device="cpu")
    assert refused.value.problems == problems
    with environment(MAMBA_OPS_BACKEND=text), pytest.raises(ConfigError) as refused:
        BackendConfig.from_env(device="cpu")
    assert refused.value.problems == [f"MAMBA_OPS_BACKEND: {problem}" for problem in problems]


def test_what_is_no_order_and_no_device_is_said() -> None:
    with pytest.raises(ConfigError) as refused:
        BackendConfig({"causal_conv1d": 5, "selective_scan": [None]}, device="gpu0")  # type: ignore[dict-item]
    first, second, third = refused.value.problems
    assert first == "order: got 5 for causal_conv1d, expected names of backends"
    assert second == "order: got [None] for selective_scan, expected names of backends"
    assert third.startswith("device: got 'gpu0', expected one such as cpu or ")


def test_an_unknown_setting_is_answered_with_the_valid_names() -> None:
    says = (
        "unknown op or setting 'philox_round'; valid: causal_conv1d, .*philox_rounds, .*; did you mean philox_rounds[?]"
    )
    with pytest.raises(ConfigError, match=says):
        BackendConfig.from_string("philox_round=6")


def test_a_backend_says_which_setting_a_device_cannot_have(
    flashinfer: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flashinfer, "why_not_setting", lambda name, value, device: f"no {value} {name} on {device}")
    with pytest.raises(ConfigError, match="flashinfer_algorithm: no vertical algorithm on cpu"):
        BackendConfig(flashinfer_algorithm="vertical", device="cpu")
    assert BackendConfig(flashinfer_algorithm="auto", device="cpu").flashinfer_algorithm == "auto"
    monkeypatch.setattr(flashinfer, "devices", ("cuda",))
    with pytest.raises(ConfigError, match="flashinfer_algorithm: flashinfer runs on cuda, not on cpu"):
        BackendConfig(flashinfer_algorithm="simple", device="cpu")


def test_the_algorithm_reaches_the_backend(flashinfer: Backend) -> None:
    sample = SSM.make_samples(CPU)[0]
    seen = []
    for config in (None, BackendConfig(flashinfer_algorithm="simple", device="cpu"), None):
        configure(config)
        with use_backend("torch"):  # any decision hands all backends their settings
            SSM(*sample.clone().args, **sample.kwargs)
        seen.append(flashinfer.settings["algorithm"])
    assert seen == ["auto", "simple", "auto"]


# -- in force ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("idle")
def test_precedence_is_use_backend_then_the_configuration_then_the_environment_then_priority() -> None:
    by_priority = runs_on(SSM)
    assert by_priority[1] is None
    forget_environment()
    with environment(MAMBA_OPS_BACKEND="causal_conv1d_update=idle,selective_state_update=idle"):
        assert runs_on(SSM) == ("idle", "MAMBA_OPS_BACKEND")
        configure(BackendConfig({"selective_state_update": "torch"}))
        assert runs_on(SSM) == ("torch", "BackendConfig")
        assert runs_on(CONV) == ("idle", "MAMBA_OPS_BACKEND")  # of which the configuration says nothing
        with use_backend("idle"):
            assert runs_on(SSM) == ("idle", "use_backend")
            with use_backend(BackendConfig("torch")):
                assert runs_on(SSM) == ("torch", "use_backend")
                with use_backend(BackendConfig("torch"), causal_conv1d_update="idle"):
                    assert (runs_on(SSM)[0], runs_on(CONV)[0]) == ("torch", "idle")
        configure(None)
        assert runs_on(SSM) == ("idle", "MAMBA_OPS_BACKEND")
    forget_environment()
    assert runs_on(SSM) == by_priority


@pytest.mark.usefixtures("idle")
def test_an_order_goes_on_to_the_next_and_to_no_other() -> None:
    x, cache, weight = arguments(CONV, 3)
    with torch.no_grad(), use_backend("idle:torch"):
        with pytest.warns(
            RuntimeWarning, match="runs on torch because idle does not take the call: takes no batch of 3"
        ):
            CONV(x, cache, weight)
        with record_selections() as record:
            CONV(x, cache, weight)
            CONV(*arguments(CONV))
        assert [run.backend for run in record] == ["torch", "idle"]
        found = explain(CONV, *arguments(CONV))
        assert (found.backend, found.reasons["torch"]) == ("idle", "comes after idle in the order of use_backend")
        assert found.reasons["triton"] == "use_backend asks for idle, torch"
    configure(BackendConfig({"causal_conv1d_update": "idle"}))
    with pytest.raises(NoBackendError, match=r"(?s)idle  takes no batch of 3.*asked for by BackendConfig"):
        CONV(x, cache, weight)


def test_settings_of_the_environment_hold_until_somebody_states_others() -> None:
    program = """
from mamba_ops import BackendConfig, configure, selective_state_update as op
from mamba_ops.registry import settings
[sample] = [s for s in op.make_samples("cpu") if s.name == "base"]
assert settings()["philox_rounds"] == 6
configure(BackendConfig(stochastic_rounding=True))
assert settings()["philox_rounds"] == 0
configure(None)
assert settings() == {"philox_rounds": 6}
"""
    with environment(MAMBA_OPS_BACKEND="Philox_Rounds=6"):
        done = fresh.run(["-c", program])
    assert done.returncode == 0, done.stderr


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor | None, int]]]:
    """What a kernel of selective_state_update gets as seed and rounds, call after call."""
    seen: list[tuple[Tensor | None, int]] = []

    def kernel(*args: Tensor, rounding_seed: Tensor | None, philox_rounds: int, **rest: object) -> None:
        seen.append((rounding_seed, philox_rounds))

    kernel.__signature__ = inspect.signature(does_nothing(SSM.parameters))  # type: ignore[attr-defined]
    monkeypatch.delitem(SSM.facets, "validate")  # what they say of seeds is not looked at here
    backend = Backend("listener", devices=None, priority=-100)
    backend.implements(SSM)(kernel)
    with use_backend("listener"):
        yield seen
    backend.remove()


def two_steps(state: torch.dtype, **given: object) -> None:
    [sample] = [s for s in SSM.make_samples(CPU, state_dtype=state) if s.name == "base"]
    with torch.no_grad():
        for _ in range(2):
            SSM(*sample.args, **sample.kwargs, **given)


def test_stochastic_rounding_draws_a_seed_for_every_call_of_a_float16_state(
    listener: list[tuple[Tensor | None, int]],
) -> None:
    configure(BackendConfig(stochastic_rounding=True, philox_rounds=6))
    torch.manual_seed(0)
    expected = [torch.randint(0, 2**63 - 1, (1,)) for _ in range(2)]  # one for each, no more
    torch.manual_seed(0)
    two_steps(torch.float16)
    seeds, rounds = zip(*listener, strict=True)
    assert rounds == (6, 6)
    assert list(seeds) == expected
    assert seeds[0] != seeds[1]


def test_a_seed_of_ones_own_stays_and_other_states_get_none(listener: list[tuple[Tensor | None, int]]) -> None:
    own = torch.tensor([7])
    configure(BackendConfig(stochastic_rounding=True, philox_rounds=6))
    two_steps(torch.float32)
    two_steps(torch.float16, rounding_seed=own, philox_rounds=3)
    two_steps(torch.float16, rounding_seed=own)
    configure(None)
    two_steps(torch.float16)
    assert listener == [(None, 0)] * 2 + [(own, 3)] * 2 + [(own, 6)] * 2 + [(None, 0)] * 2


@pytest.mark.usefixtures("listener")
def test_a_config_in_a_block_has_settings_and_names_alone_have_none() -> None:
    with use_backend(BackendConfig(philox_rounds=6)), use_backend("torch"):
        assert settings()["philox_rounds"] == 6
    assert settings() == {}


def test_states_are_rounded_without_bias_under_compiled_code_and_nothing_is_recompiled() -> None:
    """The mean of many roundings is nearer to the exact state than one rounding to nearest can be."""

    def step(state: Tensor, *rest: Tensor) -> Tensor:
        return SSM(state, *rest, dt_softplus=True)

    torch._dynamo.reset()
    torch.manual_seed(0)
    exact, x, dt, B, C = (torch.randn(4, *shape) for shape in ((2, 8, 16), (2, 8), (2,), (1, 16), (1, 16)))
    rest = (x, dt, -torch.rand(2), B, C)
    state, compiled = exact.half(), torch.compile(step, fullgraph=True, backend="aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.no_grad():
        step(exact := state.float(), *rest)
        nearest = state.clone()
        compiled(nearest, *rest)
        with use_backend(BackendConfig("torch", stochastic_rounding=True)):
            rounded = []
            for _ in range(400):
                compiled(once := state.clone(), *rest)
                rounded.append(once.double())
        compiled(after := state.clone(), *rest)
    mean = torch.stack(rounded).mean(0)
    assert (mean - exact).abs().max() < (nearest - exact).abs().max() / 2
    assert torch.equal(after, nearest)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1


def test_what_is_no_configuration_is_refused_in_a_sentence() -> None:
    with pytest.raises(RegistryError, match=r"^configure: got 'torch', expected a BackendConfig or None$"):
        configure("torch")  # type: ignore[arg-type]
    with (
        pytest.raises(RegistryError, match=r"^use_backend: got 3, expected a BackendConfig, a backend's name or None$"),
        use_backend(3),  # type: ignore[arg-type]
    ):
        pass
