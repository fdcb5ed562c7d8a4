"""What is proved for Intel GPUs on a machine that has none: the first table of docs/xpu.md.

    python scripts/xpu_evidence.py

runs what each row names, and prints the table with what came of it. It installs triton-xpu into a temporary folder
(`--triton-xpu FOLDER`: where it is). The exit status is 1 where a row does not hold.
"""

import argparse
import importlib.metadata
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.xpu import test_spirv as spirv  # noqa: E402

COMPILES = (("b580", "bfloat16"), ("b580", "float32"), ("pvc", "float16"))
TRACES = ("compile_tests/test_absent.py", "compile_tests/test_plans.py", "-k", "xpu or cut")
ROWS = {
    "traces": (
        "Every op and layer is one graph on `xpu`, whatever decodes and is read; engines can cut it at `gdn_mixing`",
        "traced with fake tensors on an `xpu` that is not there (`mamba_ops.audit.absent`), in `compile_tests`",
    ),
    "kernels": (
        "The Triton kernels are right",
        (
            "the same source runs in Triton's interpreter and on CUDA; it names no device, and its one line of inline "
            "assembly is left out on all but NVIDIA's sm_100a and sm_103a"
        ),
    ),
    "spirv": (
        "The Triton kernels, backward ones too, compile for a B580 and a Max 1550",
        (
            f"to SPIR-V, by {spirv.RELEASE} (`tests/xpu`), with sizes of large models in bfloat16, float16 and "
            "float32, and states of float32, int16 and 8 bits"
        ),
    ),
    "launches": (
        "Their launches are chosen by the GPU's limits, and fit its shared memory",
        "`family()` and the rules, given the properties that Intel's driver tells of both GPUs (`tests/xpu`)",
    ),
    "vendor": (
        "The `sycl` backend says the right thing to the vendor's op",
        (
            "a stand-in with the vendor's schema, in both forms that were released (the newer from 0.1.9 to 0.1.16.2), "
            "holds every argument to what is documented of shapes, dtypes and layouts and computes on the CPU; results "
            "are held to the same oracle and error budget as our own kernels (`tests/sycl`)"
        ),
    ),
}
"""What is proved, and how."""


def tests(*chosen: str) -> tuple[bool, str]:
    """Run tests; return whether they passed, and how many."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    counts = [line for line in done.stdout.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    told = re.sub(r" in [\d.]+s.*|, \d+ deselected|, \d+ warnings?", "", counts[-1]) if counts else done.stderr[-300:]
    return done.returncode == 0, f"{told.strip('= ')} ".strip()


def compiles(folder: Path) -> dict[str, tuple[bool, str]]:
    """Compile all kernels; return what to say of SPIR-V and of launches."""
    found: list[dict[str, Any]] = [row for which in COMPILES for row in spirv.compiled(folder, *which)]
    kernels = [row for row in found if row["kernel"]]
    refused = {(row["op"], row["dtype"]): row["refused"] for row in found if row["refused"]}
    different = {(row["op"], row["kernel"]) for row in kernels}
    told = f"{len(kernels)} variants for {len(different)} launches"
    for (op, dtype), reason in refused.items():
        told += f"; refused, so that `torch` runs it: `{op}` in {dtype} ({reason})"
    most = max(row["shared"] for row in kernels if (row["op"], row["dtype"]) not in refused)
    families = ", ".join(dict.fromkeys(f"`{row['family']}`" for row in found))
    return {
        "spirv": (set(refused) == spirv.REFUSED, told),
        "launches": (most <= 131_072, f"{families}: at most {most:,} of 131,072 bytes"),
    }


def main() -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton-xpu", type=Path, metavar="FOLDER", help="where triton-xpu is installed already")
    asked = parser.parse_args()
    results: dict[str, tuple[bool, str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.triton_xpu or Path(temporary)
        if asked.triton_xpu is None:
            spirv.install(folder)
        results |= compiles(folder)
    results["traces"] = tests(*TRACES)
    results["kernels"] = tests("tests/test_numerics.py", "-m", "not slow", "-k", "triton")
    results["vendor"] = tests("tests/sycl")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "triton"))
    print(table(lambda name: results[name][1]))
    print(f"\nBy `python scripts/xpu_evidence.py`, with {versions} and {spirv.RELEASE.replace('==', ' ')}.")
    failed = [name for name, (holds, _) in results.items() if not holds]
    if failed:
        print(f"does not hold: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def table(result: Callable[[str], str]) -> str:
    """Return the table, with what a function says of each row."""
    lines = ["| what | how | result |", "|---|---|---|"]
    return "\n".join(lines + [f"| {what} | {how} | {result(name)} |" for name, (what, how) in ROWS.items()])


if __name__ == "__main__":
    sys.exit(main())
