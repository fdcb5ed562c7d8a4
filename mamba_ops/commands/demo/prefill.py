"""Times a compiled model of Transformers on prompts of several lengths, in a child process that can be stopped.

Stock and ours are measured by the same code, each in a process of its own.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba_ops.commands.targets import TargetError, quiet_transformers, transformers_model
from mamba_ops.commands.watch import watch_compiler

Progress = Callable[[str], None]


class MeasurementError(RuntimeError):
    """The child process failed; the message ends in what it printed."""


@dataclass(frozen=True)
class Job:
    """What a child is to measure.

    Attributes:
        model, layers, width: as for `targets.transformers_model`.
        prompts: tokens.
        device: where.
        ours: whether `use_mamba_ops` comes first.
        dynamic: as for torch.compile.
    """

    model: str
    prompts: list[list[int]]
    device: str
    ours: bool = False
    layers: int | None = None
    width: int | None = None
    dynamic: bool | None = True

    @property
    def name(self) -> str:
        return "ours" if self.ours else "stock"


@dataclass(frozen=True)
class Prefill:
    """What was measured, of as many prompts as there was time for.

    Attributes:
        lengths: of all prompts, in tokens.
        compile_s: seconds of compiling, for each prompt that was read: its first call less its second, or 0 where
            nothing was compiled.
        eager_tokens_per_s, compiled_tokens_per_s: over all prompts; over those read.
        graphs, compiles: how many there were.
        difference: of a logit, eager or compiled, from stock's eager one; at most.
        largest_logit: of stock.
        stopped_after_s: seconds from the first compiled call until the child was stopped; None if it was not.
    """

    lengths: tuple[int, ...]
    compile_s: tuple[float, ...] = ()
    eager_tokens_per_s: float | None = None
    compiled_tokens_per_s: float | None = None
    graphs: int = 0
    compiles: int = 0
    difference: float = 0.0
    largest_logit: float = 0.0
    stopped_after_s: float | None = None

    @property
    def total_compile_s(self) -> float:
        """Seconds of compiling; if it was stopped, the least that they can have been."""
        return sum(self.compile_s) if self.stopped_after_s is None else self.stopped_after_s


# -- in the child -----------------------------------------------------------------------------------------------------


def measure(job: Job, progress: Progress, report: Callable[[Prefill], None]) -> None:
    """Read eagerly, then compiled; report what is known before the first compiled call, and after each prompt."""
    device = torch.device(job.device)
    prompts = [torch.tensor([tokens], device=device) for tokens in job.prompts]
    measured = Prefill(tuple(len(tokens) for tokens in job.prompts))
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(quiet_transformers())
        progress("eager")
        model = transformers_model(job.model, device, layers=job.layers, width=job.width)
        expected = [_logits(model, prompt) for prompt in prompts]
        if job.ours:
            from mamba_ops.compat.transformers import use_mamba_ops

            stack.enter_context(use_mamba_ops(model))
        eager = [_timed(model, prompt) for prompt in prompts for _ in range(2)][1::2]  # the second of two runs
        measured = replace(
            measured,
            eager_tokens_per_s=sum(measured.lengths) / sum(seconds for seconds, _ in eager),
            difference=max(_difference(got, e) for (_, got), e in zip(eager, expected, strict=True)),
            largest_logit=max(float(e.abs().max()) for e in expected),
        )

        progress("setting torch.compile up")  # once in a process, for any model
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
        torch.compiler.reset()
        compiled = torch.compile(model, dynamic=job.dynamic)
        watch = stack.enter_context(watch_compiler())
        report(measured)
        seconds_again = 0.0
        for i, prompt in enumerate(prompts):
            progress(f"compiling for {prompt.shape[1]} tokens")
            compiles = watch.compiles
            first, got = _timed(compiled, prompt)
            second, _ = _timed(compiled, prompt)
            seconds_again += second
            measured = replace(
                measured,
                compile_s=(*measured.compile_s, max(first - second, 0.0) if watch.compiles > compiles else 0.0),
                compiled_tokens_per_s=sum(measured.lengths[: i + 1]) / seconds_again,
                graphs=watch.graphs,
                compiles=watch.compiles,
                difference=max(measured.difference, _difference(got, expected[i])),
            )
            report(measured)


def _logits(model: Callable[..., Any], prompt: Tensor) -> Tensor:
    logits: Tensor = model(prompt, use_cache=False).logits
    return logits


def _difference(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max())


def _timed(model: Callable[..., Any], prompt: Tensor) -> tuple[float, Tensor]:
    start = time.perf_counter()
    logits = _logits(model, prompt)
    torch.get_device_module(prompt.device).synchronize()
    return time.perf_counter() - start, logits


def child() -> None:
    """Do the job given on stdin; write steps and results as lines of JSON to stdout, and all other output to stderr."""
    lines, sys.stdout = sys.stdout, sys.stderr

    def write(kind: str, what: Any) -> None:
        print(json.dumps([kind, what]), file=lines, flush=True)

    job = Job(**json.load(sys.stdin))
    try:
        measure(job, lambda step: write("step", step), lambda measured: write("measured", asdict(measured)))
    except TargetError as error:
        write("refused", str(error))


# -- in the parent ----------------------------------------------------------------------------------------------------

_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from mamba_ops.commands.demo.prefill import child; child()"
)


def measure_in_child(job: Job, progress: Progress, *, cache: Path, cap: float | None = None) -> Prefill:
    """Do a job in a process of its own, and stop it `cap` seconds after its first compiled call began.

    Args:
        job: what to measure.
        progress: called with each step.
        cache: folder for what is compiled.
        cap: seconds. None: however long it takes.

    Raises:
        TargetError: there is no such model.
        MeasurementError: the child failed.
    """
    folders = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    measured = Prefill(tuple(len(tokens) for tokens in job.prompts))
    with tempfile.TemporaryFile("w+") as printed, _start(printed, folders) as process, ExitStack() as stack:
        stack.callback(_kill, process)
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdin as stdin:
            json.dump(asdict(job), stdin)
        stopped = threading.Event()

        def stop() -> None:
            stopped.set()
            _kill(process)

        timer: threading.Timer | None = None
        for line in process.stdout:
            kind, what = json.loads(line)
            if kind == "step":
                progress(f"{job.name}, {what}")
            elif kind == "refused":
                raise TargetError(what)
            else:
                measured = Prefill(**{**what, "lengths": tuple(what["lengths"]), "compile_s": tuple(what["compile_s"])})
                if cap is not None and timer is None:
                    timer = threading.Timer(cap, stop)
                    stack.callback(timer.cancel)
                    timer.start()
        if process.wait() == 0:
            return measured
        if stopped.is_set():
            return replace(measured, stopped_after_s=cap)
        printed.seek(0)
        raise MeasurementError(f"{job.name}: the child process ended with {process.returncode}\n{printed.read()}")


def _start(printed: Any, folders: Mapping[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, json.dumps(sys.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=printed,
        text=True,
        env={**os.environ, **folders},
        start_new_session=True,  # so that it can be killed with the compilers that it started
    )


def _kill(process: "subprocess.Popen[str]") -> None:
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
