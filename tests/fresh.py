"""Programs in processes of their own, without the seconds in which each of them would import torch.

One process per test session imports torch and nothing else, and every program runs in a fork of it. So it finds what
`python PROGRAM` finds after its first `import torch`. Another one has compiled something, for programs that are not
about what is imported when: half of the seconds of a small program are those of its first `torch.compile`.
"""

import atexit
import builtins
import functools
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STRICT = (
    *("-W", "error::RuntimeWarning"),
    *("-W", "ignore:Guards may run slower on Python:RuntimeWarning"),  # torch advises against Python 3.13.0, for speed
)
"""Arguments that run code as users do, in which what the package warns of is an error."""


def run(
    arguments: Sequence[object], *, cwd: Path | None = None, env: Mapping[str, str] | None = None, is_warm: bool = False
) -> "subprocess.CompletedProcess[str]":
    """Run `python` with these arguments: `-W action:message:Category` any number of times, then `-c CODE`, `-m MODULE`
    or a script, and what it reads as `sys.argv`. Return its exit status and what it printed.

    Where it `is_warm`, the program begins in a process that has compiled something, and variables that torch or Triton
    reads when it is imported are those of the tests.
    """
    words, environment = [str(argument) for argument in arguments], dict(os.environ if env is None else env)
    if not sys.platform.startswith("linux"):
        return subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        server = _server(is_warm)
        job = {"argv": words, "env": environment, "cwd": str(cwd or Path.cwd()), "outputs": [*map(str, outputs)]}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        stdout, stderr = (output.read_text(encoding="utf-8") for output in outputs)
    return subprocess.CompletedProcess([sys.executable, *words], status, stdout, stderr)


@functools.cache
def _server(is_warm: bool) -> Any:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, __file__, *["warm"] * is_warm]
    process = subprocess.Popen(command, env=environment, **pipes)  # type: ignore[call-overload]

    @atexit.register
    def _end() -> None:
        process.stdin.close()
        process.stdout.close()
        process.wait()

    return process


def _serve() -> None:
    import torch

    if "warm" in sys.argv:
        with torch.no_grad():
            torch.compile(lambda x: x.sin() + 1, dynamic=True)(torch.ones(3, 4))
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    del sys.path[0]  # the folder of this file
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            _run(**json.loads(line))
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)  # noqa: T201


def _run(argv: list[str], env: dict[str, str], cwd: str, outputs: list[str]) -> None:
    """Become what `python` with these arguments would be."""
    import torch

    for number, place in enumerate([os.devnull, *outputs]):
        file = os.open(place, os.O_RDWR | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    torch.seed()  # a process draws its own
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    while argv[0] == "-W":
        action, message, category = argv[1].split(":")
        warnings.filterwarnings(action, re.escape(message), getattr(builtins, category))  # type: ignore[arg-type]
        argv = argv[2:]
    option, *rest = argv
    first = {"-c": "", "-m": cwd}.get(option, str(Path(option).parent))
    sys.path[:0] = [first, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    if option == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    elif option == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(option, run_name="__main__")


if __name__ == "__main__":
    _serve()
