"""All that an owner of a GPU can tell us about it, in one file: `python scripts/gpu_report.py`.

Runs `mamba-ops doctor`, the tests and the benchmarks of kernels on the accelerator of this machine, and writes one JSON
to send back. What fails does not end it: it is in the file. Takes about half an hour; `--quick` takes a minute, and
shows whether all of it can run. The environment needs `mamba-ops[test]`, and Triton for the GPU.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FACTS = """
import json, torch
device = torch.accelerator.current_accelerator(check_available=True)
properties = torch.get_device_module(device).get_device_properties() if device else None
names = [name for name in dir(properties) if not name.startswith("_")] if device else []
told = {name: str(value) for name in names if not callable(value := getattr(properties, name, None))}
print(json.dumps({"device": device.type if device else "cpu", "properties": told}))
"""
BENCHMARKS = ("kernels", "prefill", "scan", "delta_rule")
TESTS = ("tests", "compile_tests")
QUICK = ("tests/test_import.py", "tests/test_capture.py")


def ran(*command: str, limit: float) -> dict[str, Any]:
    """Run a command from the checkout's root; return its exit status, seconds and the end of its output."""
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit, check=False
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        status, output = -1, f"{error.output or ''}\nended after {limit:.0f} seconds"
    return {"status": status, "seconds": round(time.perf_counter() - begin, 1), "output": output[-20_000:]}


def tests(chosen: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Run tests; return their counts, and of each that failed its name and what it says."""
    path = folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", f"--junitxml={path}"]
    result = ran(*command, "--ignore=tests/test_packaging.py", *chosen, limit=3600)
    if path.exists():
        suite = next(ET.parse(path).iter("testsuite"))
        result |= {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
        result["failed"] = dict(failures(suite))
        result["output"] = result["output"][-2000:]
    return result


def failures(suite: ET.Element) -> Iterator[tuple[str, str]]:
    """Yield the name of each test that failed, and the end of what it says."""
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            if (said := case.find(kind)) is not None:
                yield f"{case.get('classname')}::{case.get('name')}", (said.text or "")[-4000:]


def benchmark(name: str, folder: Path, *options: str) -> dict[str, Any]:
    """Run a benchmark; return what it measured."""
    path = folder / f"{name}.json"
    result = ran(sys.executable, "-m", f"benchmarks.{name}", "--json", str(path), *options, limit=1200)
    if path.exists():
        result["measured"] = json.loads(path.read_text())
        result["output"] = result["output"][-2000:]
    return result


def main() -> int:
    """Write the report; return 0 if it could be written, whatever is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: mamba-ops-DEVICE.json, here")
    parser.add_argument("--quick", action="store_true", help="a few tests and one op, to see that all of it can run")
    asked = parser.parse_args()
    facts = ran(sys.executable, "-c", FACTS, limit=300)
    report: dict[str, Any] = {"facts": json.loads(facts["output"]) if facts["status"] == 0 else facts}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for command in ("doctor", "backends"):
            report[command] = say(command, ran(sys.executable, "-m", "mamba_ops", command, limit=300))
        report["tests"] = say("tests", tests(QUICK if asked.quick else TESTS, folder))
        for name in BENCHMARKS[:1] if asked.quick else BENCHMARKS:
            options = ["--op", "causal_conv1d_update"] if asked.quick else []
            report[name] = say(name, benchmark(name, folder, *options))
    known = report["facts"].get("properties", {})
    title = re.sub("[^0-9A-Za-z]+", "-", known.get("name") or report["facts"].get("device", "unknown")).strip("-")
    path = asked.json or Path(f"mamba-ops-{title}.json")
    path.write_text(json.dumps(report, indent=1))
    print(f"{path}: please attach it to an issue of the project")
    return 0


def say(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """Print a line about a stage, and return it."""
    print(f"{name:<11} exit {result['status']:<3} {result['seconds']:7.1f} s", flush=True)
    return result


if __name__ == "__main__":
    sys.exit(main())
