"""What kernels spill to memory on a GPU that is not here: `python -m tests.spills TARGET DTYPE [OP ...]`.

Prints a line of JSON for each kernel and launch: the kernel's name, and how many bytes (NVIDIA) or vector registers
(AMD) a thread spills, as the vendor's own assembler says.
"""

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported, which decides as it decorates

import triton
from triton._C import libtriton

from mamba_ops.cold_start import fitting
from mamba_ops.cold_start.specialization import kernel_name
from mamba_ops.cold_start.targets import target_of
from mamba_ops.ops._triton import _triton

LAST = {"cuda": "cubin", "hip": "amdgcn"}
"""The stage of Triton's compiler that tells, by its backend."""


def compiled(function: Any, asked: Any) -> tuple[Any, str]:
    """Compile a variant that `jit_cache_hook` was called for; return the last stage's text or bytes, and its log."""
    source, backend, options = _triton._source(function, asked)
    context, metadata, stages = libtriton.ir.context(), dict(vars(options)), {}
    libtriton.ir.load_dialects(context)
    backend.load_dialects(context)
    backend.add_stages(stages, options, source.language)
    generated = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(backend.target, options, *generated, context)
    with contextlib.redirect_stdout(io.StringIO()) as log:
        for name, stage in stages.items():
            module = stage(module, metadata)
            if name == LAST[backend.target.backend]:
                break
    return module, log.getvalue()


def spills(function: Any, asked: Any) -> int:
    """Return what a thread of a variant that `jit_cache_hook` was called for spills."""
    module, log = compiled(function, asked)
    if isinstance(module, bytes):
        return int(re.findall(r"(\d+) bytes spill stores", log)[0])
    return int(re.findall(r"\.vgpr_spill_count:\s*(\d+)", module)[0])


def launched(target: str, dtype: str, ops: list[str], sizes: dict[str, int], samples: int) -> Iterator[tuple[str, Any]]:
    """Yield each variant once that the first samples of ops launch, by its kernel's name."""
    done = set()
    for _, asked in fitting.variants(target_of(target), ops, dtype, sizes, samples):
        for variant in asked:
            if (identity := (variant.module, variant.function, variant.key)) not in done:
                done.add(identity)
                yield kernel_name(variant.module, variant.function), variant


def main() -> None:
    """Print what the kernels spill that the first samples of ops launch."""
    name, dtype, *ops = sys.argv[1:]
    triton.knobs.nvidia.dump_ptxas_log = True
    for kernel, variant in launched(name, dtype, ops, {}, 1):
        print(json.dumps([kernel, spills(variant.kernel, variant.asked)]), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
