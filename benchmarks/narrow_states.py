"""What a decode state's format costs in error over thousands of steps, and what it saves in bytes and time.

Every step is one call of an op; the truth is the same recurrence in float64. Beside each format stands the error of a
stand-in for FlashInfer's: its documented way of storing a state (a scale for each row, the largest size over the
format's largest number, rounded to the nearest; for float16 with a seed: 13 random bits added, then cut off), written
here as a formula over float32 states. No code of FlashInfer's runs.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import mamba_ops
from benchmarks.measure import Row, command
from mamba_ops.cold_start.choosing import microseconds
from mamba_ops.commands.bench.clocks import nbytes
from mamba_ops.commands.watch import device_name
from mamba_ops.functional import narrow_states, widen_states

INT16, FP8 = torch.int16, torch.float8_e4m3fn
OPS = ("selective_state_update", "gated_delta_rule_update", "kda_update")


class Format(NamedTuple):
    dtype: torch.dtype
    stochastic: bool = False


FORMATS = {
    "float32": Format(torch.float32),
    "bfloat16": Format(torch.bfloat16),
    "float16": Format(torch.float16),
    "float16 stochastic": Format(torch.float16, stochastic=True),
    "int16": Format(INT16),
    "int16 stochastic": Format(INT16, stochastic=True),
    "float8": Format(FP8),
    "float8 stochastic": Format(FP8, stochastic=True),
}


class Model(NamedTuple):
    """An op's weights, the sizes of its states, and how the inputs of a step are drawn."""

    op: Any
    state: tuple[int, ...]
    weights: dict[str, Tensor]
    inputs: Callable[[torch.Generator], dict[str, Tensor]]


def model_of(name: str, rows: int, heads: int, dim: int, dstate: int, device: torch.device) -> Model:
    """Weights as new layers have them: step sizes are log-uniform from 0.001 to 0.1, so some heads remember for long.

    Inputs are of size 1 and independent from step to step.
    """
    made = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return (low + (high - low) * torch.rand(shape, generator=made)).to(device)

    def normal(generator: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    step = torch.exp(uniform(-6.9, -2.3, heads))
    bias = step + torch.log(-torch.expm1(-step))
    if name == "selective_state_update":
        weights: dict[str, Any] = {"A": -uniform(1, 16, heads), "D": uniform(0, 1, heads), "dt_bias": bias}

        def inputs(generator: torch.Generator) -> dict[str, Tensor]:
            x, dt = normal(generator, rows, heads, dim), 0.5 * normal(generator, rows, heads)
            return {"x": x, "dt": dt, "B": normal(generator, rows, 1, dstate), "C": normal(generator, rows, 1, dstate)}

        weights["dt_softplus"] = True
        return Model(mamba_ops.selective_state_update, (heads, dim, dstate), weights, inputs)
    by_channel = (dstate,) if name == "kda_update" else ()
    bias = bias.view(heads, *[1] * len(by_channel)).expand(heads, *by_channel).contiguous()
    weights = {"A_log": uniform(1, 16, heads).log(), "dt_bias": bias, "qk_l2norm": True}

    def tokens(generator: torch.Generator) -> dict[str, Tensor]:
        given = {n: normal(generator, rows, heads, dstate) for n in "qk"} | {"v": normal(generator, rows, heads, dim)}
        gates = {"a": 0.5 * normal(generator, rows, heads, *by_channel), "b": normal(generator, rows, heads)}
        return given | gates

    return Model(getattr(mamba_ops, name), (heads, dim, dstate), weights, tokens)


# -- what is compared --------------------------------------------------------------------------------------------------


class Ours:
    """A state in a format, advanced by an op."""

    def __init__(self, model: Model, rows: int, given: Format, device: torch.device) -> None:
        self.model, self.seed = model, None
        zeros = torch.zeros(rows, *model.state, device=device)
        self.more: dict[str, Any] = {}
        if given.dtype in (INT16, FP8):
            self.state, self.more["state_scale"] = narrow_states(zeros, given.dtype)
        else:
            self.state = zeros.to(given.dtype)
        self.seeds = torch.Generator().manual_seed(1) if given.stochastic else None

    def advance(self, inputs: dict[str, Tensor]) -> Tensor:
        if self.seeds is not None:
            self.more["rounding_seed"] = torch.randint(2**62, (1,), generator=self.seeds).to(self.state.device)
        out: Tensor = self.model.op(self.state, **inputs, **self.model.weights, **self.more)
        return out

    def numbers(self) -> Tensor:
        if "state_scale" in self.more:
            return widen_states(self.state, self.more["state_scale"], torch.float64)
        return self.state.double()

    @property
    def bytes_a_step(self) -> int:
        """What a step reads and writes of states."""
        tensors = (self.state, *(t for t in self.more.values() if t.shape[:1] == self.state.shape[:1] and t.dim() > 1))
        return 2 * nbytes(*tensors)


class StandIn(Ours):
    """The recurrence in float32, after each step of which the state is stored as FlashInfer documents it."""

    def __init__(self, model: Model, rows: int, given: Format, device: torch.device) -> None:
        super().__init__(model, rows, Format(torch.float32), device)
        self.given, self.bits = given, torch.Generator().manual_seed(2)

    def advance(self, inputs: dict[str, Tensor]) -> Tensor:
        out = super().advance(inputs)
        self.state.copy_(self.stored(self.state))
        return out

    def stored(self, state: Tensor) -> Tensor:
        dtype, stochastic = self.given
        if dtype in (INT16, FP8):
            largest = state.abs().amax(-1, keepdim=True)
            scale = torch.where(largest > 0, largest / (32767 if dtype == INT16 else 448), 1.0)
            numbers = state / scale
            return (numbers.round() if dtype == INT16 else numbers.to(dtype)).float() * scale
        if stochastic:
            random = torch.randint(2**13, state.shape, generator=self.bits, dtype=torch.int32).to(state.device)
            cut = ((state.view(torch.int32) + random) & ~(2**13 - 1)).view(torch.float32)
            return torch.where(cut.abs() < 2.0**-14, 0.0, cut)
        return state.to(dtype).float()


class Truth(Ours):
    """The recurrence in float64."""

    def __init__(self, model: Model, rows: int, device: torch.device) -> None:
        weights = {n: w.double() if isinstance(w, Tensor) else w for n, w in model.weights.items()}
        super().__init__(model._replace(weights=weights), rows, Format(torch.float64), device)

    def advance(self, inputs: dict[str, Tensor]) -> Tensor:
        return super().advance({name: tensor.double() for name, tensor in inputs.items()})


def off(got: Tensor, right: Tensor) -> float:
    """How far numbers are from the right ones, by root mean squares."""
    return float((got.double() - right).square().mean().sqrt() / right.square().mean().sqrt())


def errors(
    name: str,
    steps: int,
    device: torch.device,
    *,
    formats: dict[str, Format] = FORMATS,
    sizes: tuple[int, int, int, int] = (1, 8, 8, 128),
    after: Callable[[], object] = lambda: None,
) -> dict[str, Row]:
    """Return, for each format, the errors of states after 1, 2, 4, ... steps, those of outputs since the last time, and
    those of the stand-in.

    Args:
        name: of the op.
        steps, device, formats: what is run.
        sizes: rows, heads, dim and dstate.
        after: called after every step.
    """
    rows = sizes[0]
    model = model_of(name, *sizes, device)
    truth = Truth(model, rows, device)
    runs = {label: (Ours(model, rows, f, device), StandIn(model, rows, f, device)) for label, f in formats.items()}
    drawn, found = torch.Generator().manual_seed(3), dict[str, Row]()
    for label, (ours, _) in runs.items():
        keys = ("state", "output", "stand-in's state", "stand-in's output")
        found[label] = {"bytes": ours.bytes_a_step, "steps": [], **{key: [] for key in keys}}
    with torch.no_grad():
        outputs: dict[str, list[Tensor]] = {label: [] for label in ("truth", *runs)}
        for number in range(1, steps + 1):
            inputs = model.inputs(drawn)
            outputs["truth"].append(truth.advance(inputs))
            for label, pair in runs.items():
                outputs[label].append(torch.stack([run.advance(inputs) for run in pair]))
            if number & (number - 1) == 0 or number == steps:
                right = torch.stack(outputs.pop("truth"))
                for label, pair in runs.items():
                    row, got = found[label], torch.stack(outputs.pop(label), 1)
                    row["steps"].append(number)
                    for run, out, who in zip(pair, got, ("", "stand-in's "), strict=True):
                        row[f"{who}state"].append(off(run.numbers(), truth.state))
                        row[f"{who}output"].append(off(out, right))
                outputs = {label: [] for label in ("truth", *runs)}
            after()
    return found


def times(name: str, device: torch.device, sizes: tuple[int, int, int, int]) -> dict[str, float]:
    """Return the microseconds of a step in each format, over states that no cache holds."""
    found, model = {}, model_of(name, *sizes, device)
    inputs = model.inputs(torch.Generator().manual_seed(0))
    inputs = {name: tensor.bfloat16() for name, tensor in inputs.items()}
    for label, given in FORMATS.items():
        run = Ours(model, sizes[0], given, device)
        if run.seeds is not None:
            run.seeds, run.more["rounding_seed"] = None, torch.zeros(1, dtype=torch.int64, device=device)
        with torch.no_grad():
            found[label] = microseconds(lambda run=run: run.advance(inputs), device)  # type: ignore[misc]
    return found


def plot(found: dict[str, dict[str, Row]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), 2, squeeze=False)
    for (name, rows), pair in zip(found.items(), axes, strict=True):
        for axis, key in zip(pair, ("state", "output"), strict=True):
            for number, (label, row) in enumerate(rows.items()):
                color = f"C{number}"
                axis.loglog(row["steps"], row[key], label=label, color=color)
                axis.loglog(row["steps"], row[f"stand-in's {key}"], ":", color=color)
            axis.set(xlabel="steps", ylabel=f"relative error, {key}", title=name)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, title="dotted: the stand-in of that format")
    figure.savefig(path)


def table_of(name: str, rows: dict[str, Row]) -> Table:
    table = Table(title=name, box=MARKDOWN)
    for column in ("state", "bytes / bf16's", "error of states", "of outputs", "stand-in: states", "outputs", "us"):
        table.add_column(column, justify="left" if column == "state" else "right", no_wrap=True)
    least = rows["bfloat16"]["bytes"]
    for label, row in rows.items():
        ends = [row[key][-1] for key in ("state", "output", "stand-in's state", "stand-in's output")]
        us = f"{row['us']:.1f}" if "us" in row else "-"
        table.add_row(label, f"{row['bytes'] / least:.3f}", *(f"{end:.1e}" for end in ends), us)
    return table


def main() -> int:
    """Print a table for each op; return 1 where a goal is missed."""
    default = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.narrow_states", description=str(__doc__).partition("\n")[0]
    )
    parser.add_argument("--device", type=torch.device, default=default, help=f"default: {default}")
    parser.add_argument("--op", choices=OPS, help="this op alone")
    parser.add_argument("--steps", type=int, default=4096, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the errors there; needs mamba-ops[plot]")
    given = parser.parse_args()
    names, found = [given.op] if given.op else [*OPS], {}
    with Progress(transient=True) as progress:
        task = progress.add_task("steps", total=given.steps * len(names))
        for name in names:
            found[name] = errors(name, given.steps, given.device, after=lambda: progress.advance(task))
            if given.device.type != "cpu":
                for label, us in times(name, given.device, (128, 64, 64, 128)).items():
                    found[name][label]["us"] = us
    console = Console(width=120, highlight=False, markup=False)
    console.print(f"After {given.steps} steps on {device_name(given.device)}, torch {torch.__version__}")
    console.print(f"`{command(parser, argparse.Namespace(**{**vars(given), 'plot': None}))}`")
    missed = []
    for name, rows in found.items():
        console.print(table_of(name, rows))
        missed += missed_goals(name, rows)
    for line in missed:
        console.print(f"FAILED: {line}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))
    if given.plot:
        plot(found, given.plot)
    return bool(missed)


def missed_goals(name: str, rows: dict[str, Row]) -> list[str]:
    """Return what is worse than twice the stand-in, or takes more than 0.55 of bfloat16's bytes in 8 bits."""
    found = []
    for label, row in rows.items():
        same = rows.get(label.removesuffix(" stochastic"), row) if label.startswith(("int16", "float8")) else row
        for key in ("state", "output"):
            got, right = row[key][-1], same[f"stand-in's {key}"][-1]
            if label != "float32" and got > 2 * right:
                found.append(f"{name}, {label}: error of {key}s {got:.1e}, expected at most twice {right:.1e}")
    for label in ("float8", "float8 stochastic"):
        if label in rows and "bfloat16" in rows and rows[label]["bytes"] > 0.55 * rows["bfloat16"]["bytes"]:
            found.append(f"{name}, {label}: {rows[label]['bytes']} bytes, expected at most 0.55 of bfloat16's")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
