"""`make matrix`: the tests on several versions of torch, Triton and Transformers, one environment after the other.

Each environment is a virtual environment in a temporary folder, deleted when its tests are done, unless `--keep` says
otherwise. There is no GPU in it: Triton's kernels are interpreted. A summary comes last; the exit status is 1 where
tests failed, 2 where an environment could not be made.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
FROM_311 = "python_version >= '3.11'"  # on Python 3.10 it is the last Transformers for that
ENVIRONMENTS = {
    # numpy: the interpreter of this Triton takes no newer one
    "2.11": ("torch==2.11.*", "triton==3.6.*", f"transformers==5.22.*; {FROM_311}", "numpy<2.4"),
    "2.13": ("torch==2.13.*", "triton==3.7.*", f"transformers==5.23.*; {FROM_311}"),
    "2.14": ("torch==2.14.*", "triton==3.8.*", f"transformers==5.24.*; {FROM_311}"),
    "newest": ("torch", "triton", "transformers"),
}
NEEDS = 8  # GiB of disk, with a CUDA build of torch, where there is no other
VERSIONS = """
import platform, torch, transformers, triton
print("Python", platform.python_version(), *(f"{m.__name__} {m.__version__}" for m in (torch, triton, transformers)))
"""
SUMMARY = re.compile(r"(?:\d+ \w+,? ?)+in ")  # of pytest


class Result(NamedTuple):
    """What came of one environment."""

    name: str
    versions: str
    tests: str
    status: int
    seconds: float


def main() -> int:
    """Run what the arguments say; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ENVIRONMENTS)}; all by default")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the environments")
    parser.add_argument(
        "--index", default=CPU_BUILDS, help="an index with CPU builds of torch beside PyPI; '' for none"
    )
    parser.add_argument("--tests", nargs="*", default=[], help="files of tests; all by default")
    parser.add_argument("--folder", type=Path, help="where environments are made; a temporary folder by default")
    parser.add_argument("--keep", action="store_true", help="leave environments in --folder, use those there")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(ENVIRONMENTS):
        parser.error(f"got {', '.join(sorted(unknown))}, expected names of {', '.join(ENVIRONMENTS)}")
    if asked.keep and not asked.folder:
        parser.error("got --keep without --folder, expected the folder where environments are kept")
    if asked.folder:
        asked.folder.mkdir(parents=True, exist_ok=True)
    results = [run(name, asked) for name in asked.names or ENVIRONMENTS]
    print("\nenvironment  seconds  tests")
    for result in results:
        print(f"{result.name:<11}  {result.seconds:7.0f}  {result.tests}\n{'':22}{result.versions}")
    return max(result.status for result in results)


def run(name: str, asked: argparse.Namespace) -> Result:
    """Make an environment, run the tests in it, delete it."""
    begin = time.perf_counter()
    free = shutil.disk_usage(asked.folder or tempfile.gettempdir()).free / 2**30
    if free < NEEDS:
        return Result(name, "", f"not run: got {free:.0f} GiB of free disk, expected {NEEDS}", 2, 0.0)
    print(f"\n{name}: {' '.join(ENVIRONMENTS[name])}", flush=True)
    with _folder(name, asked) as folder:
        python = Path(folder, "bin", "python")
        if not (python.exists() or _made(name, folder, asked)):
            return Result(name, "", "not run: the environment could not be made", 2, time.perf_counter() - begin)
        versions = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=False).stdout.strip()
        print(versions, flush=True)
        status, tests = _tested(python, asked.tests)
        return Result(name, versions, tests, status, time.perf_counter() - begin)


def _folder(name: str, asked: argparse.Namespace) -> AbstractContextManager[str]:
    """Return the folder of an environment: one that stays, or a temporary one."""
    if asked.keep:
        return nullcontext(str(asked.folder.absolute() / name))
    return tempfile.TemporaryDirectory(prefix=f"matrix-{name}-", dir=asked.folder)


def _made(name: str, folder: str, asked: argparse.Namespace) -> bool:
    """Make an environment; return whether that went well."""
    pip = [str(Path(folder, "bin", "python")), "-m", "pip"]
    extra = ["--extra-index-url", asked.index] if asked.index else []
    steps = [
        [asked.python, "-m", "venv", folder],
        [*pip, "install", "-q", *extra, *ENVIRONMENTS[name], "-e", f"{ROOT}[test,finetune]"],
    ]
    done = all(subprocess.run(step, check=False).returncode == 0 for step in steps)
    if not done:
        shutil.rmtree(folder, ignore_errors=True)
    return done


def _tested(python: Path, tests: list[str]) -> tuple[int, str]:
    """Run the tests in an environment, showing what they say; return 0 where they passed, else 1, and the counts."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [str(python), "-m", "pytest", "-q", "-m", "not slow", "-n", os.environ.get("WORKERS", "2")]
    command += ["--dist", "loadgroup", "-p", "no:cacheprovider", *tests]
    counts = ""
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None  # it is a pipe
        for line in child.stdout:
            print(line, end="", flush=True)
            counts = line.strip() if SUMMARY.match(line) else counts
    return int(child.returncode != 0), counts or f"no summary, exit status {child.returncode}"


if __name__ == "__main__":
    sys.exit(main())
