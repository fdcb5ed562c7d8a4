"""What Triton kernels share: device functions, copies into the layout that they read, launch configurations."""


def op_of(module: str) -> str:
    """Return the op that a module has Triton kernels of (`...ops.<op>.triton`), of a shared module its own name."""
    return module.partition(".triton")[0].rpartition(".")[2]
