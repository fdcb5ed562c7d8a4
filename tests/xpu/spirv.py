"""Compile the kernels for Intel GPUs that are not here: `python -m tests.xpu.spirv GPU DTYPE [OP ...]`.

`triton` must be triton-xpu: its folder comes first in PYTHONPATH. No device and no SYCL are needed. The first sample of
every op is called with sizes of large models, and with states in each narrow dtype where the op takes them; each launch
ends when its kernel is SPIR-V. Launches come from the rules, by the GPU's limits; what takes more shared memory than it
has is refused as there. Prints a line of JSON for each variant of a kernel, and for each call that is refused.
"""

import json
import os
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported, which decides as it decorates

import torch
import triton
from triton.backends import backends as compilers
from triton.runtime import jit

_COMMON = {
    "platform_name": "Intel(R) oneAPI Unified Runtime over Level-Zero",
    "vendor": "Intel(R) Corporation",
    "max_work_group_size": 1024,
    "max_num_sub_groups": 64,
    "sub_group_sizes": [16, 32],
    "has_fp64": True,
    "has_subgroup_matrix_multiply_accumulate": True,
    "has_subgroup_matrix_multiply_accumulate_tensor_float32": True,
    "has_subgroup_2d_block_io": True,
    "has_bfloat16_conversions": True,
    "architecture": 0,
}
GPUS = {
    "b580": _COMMON | {"name": "Intel(R) Arc(TM) B580 Graphics", "gpu_eu_count": 160, "gpu_subslice_count": 20},
    "pvc": _COMMON | {"name": "Intel(R) Data Center GPU Max 1550", "gpu_eu_count": 512, "gpu_subslice_count": 64},
}
"""What Triton's driver says of them: all of it is the target's `arch` there."""
SHARED_MEMORY = 131_072
"""Bytes that a program has on either."""


def prepare_triton() -> None:
    """Let triton-xpu do without SYCL, and one older than ours know what our kernels are launched with."""
    parser = types.SimpleNamespace(parse_device_arch=lambda architecture: "")
    compilers["intel"].compiler.__init__.__globals__["compile_module_from_src"] = lambda *_: parser
    jit.type_canonicalisation_dict.setdefault("int1", "i1")
    if not hasattr(triton, "knobs"):  # 3.3: before Triton 3.4 they were variables of the environment
        triton.knobs = types.ModuleType("triton.knobs")
        triton.knobs.runtime = types.SimpleNamespace(interpret=False)
        sys.modules["triton.knobs"] = triton.knobs


def rows(gpu: str, dtype: str, names: list[str]) -> Iterator[dict[str, Any]]:
    """Compile; yield what came of each kernel and each refused op, once."""
    prepare_triton()
    warnings.simplefilter("ignore", RuntimeWarning)  # of what this Triton does not have

    from mamba_ops import backends
    from mamba_ops.cold_start.fitting import calls
    from mamba_ops.cold_start.targets import StandIn, Target
    from mamba_ops.ops._triton import launch_config
    from mamba_ops.registry import NoBackendError, use_backend

    triton.runtime.driver.set_active(StandIn(Target(gpu, "xpu", GPUS[gpu], 32, SHARED_MEMORY)))
    backends.triton.devices = ("cpu",)
    launch_config.forget_device()
    common = {"gpu": gpu, "family": launch_config.family(-1), "dtype": dtype}
    compiled: dict[str, dict[str, Any]] = {}
    run = jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        size, shared = len(kernel.asm["spv"]), kernel.metadata.shared
        compiled[kernel.hash] = {"kernel": self.__name__, "bytes": size, "shared": shared, "refused": ""}
        return kernel

    jit.JITFunction.run = compile_only
    with use_backend("torch"), torch.no_grad():  # for what a backward sample needs of the forward
        for name, found in calls(names, dtype, {}, 1):
            for states, call in found:
                compiled.clear()
                try:
                    with use_backend("triton"):
                        call()
                except NoBackendError as error:
                    compiled[""] = {"kernel": "", "bytes": 0, "shared": 0, "refused": error.reasons["triton"]}
                yield from (common | {"op": name, "states": states} | row for row in compiled.values())


if __name__ == "__main__":
    for row in rows(sys.argv[1], sys.argv[2], sys.argv[3:]):
        print(json.dumps(row), flush=True)  # noqa: T201
