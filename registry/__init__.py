"""The generic half of mamba-ops: a kernel is declared once as a torch.library op and has several backends.

It knows no Mamba; `mamba_ops/registry` is a symlink to this folder, and `mamba_ops.registry` is its name.
"""

if __name__ == "registry":
    raise ImportError(
        "this folder is imported as mamba_ops.registry, never as registry; if mamba_ops/registry in your checkout is a "
        "text file, git did not make the symlink: run `git config core.symlinks true` and check the file out again"
    )

from mamba_ops.registry.backend import Backend as Backend
from mamba_ops.registry.backend import backends as backends
from mamba_ops.registry.capture import noticing_swaps as noticing_swaps
from mamba_ops.registry.decomposition import decompositions as decompositions
from mamba_ops.registry.errors import CompilationError as CompilationError
from mamba_ops.registry.errors import ConfigError as ConfigError
from mamba_ops.registry.errors import DeclarationError as DeclarationError
from mamba_ops.registry.errors import NoBackendError as NoBackendError
from mamba_ops.registry.errors import RegistryError as RegistryError
from mamba_ops.registry.errors import UnknownNameError as UnknownNameError
from mamba_ops.registry.errors import bad_argument as bad_argument
from mamba_ops.registry.jit import no_jit as no_jit
from mamba_ops.registry.kinds import answering as answering
from mamba_ops.registry.kinds import is_plain as is_plain
from mamba_ops.registry.layouts import renew_caches as renew_caches
from mamba_ops.registry.memory import check_written as check_written
from mamba_ops.registry.namespace import Namespace as Namespace
from mamba_ops.registry.op import Op as Op
from mamba_ops.registry.op import ops as ops
from mamba_ops.registry.op import require_out as require_out
from mamba_ops.registry.request import checking as checking
from mamba_ops.registry.request import configure as configure
from mamba_ops.registry.request import use_backend as use_backend
from mamba_ops.registry.samples import ErrorInput as ErrorInput
from mamba_ops.registry.samples import Sample as Sample
from mamba_ops.registry.selection import Explanation as Explanation
from mamba_ops.registry.selection import Selection as Selection
from mamba_ops.registry.selection import explain as explain
from mamba_ops.registry.selection import generation as generation
from mamba_ops.registry.selection import has_explicit_backend as has_explicit_backend
from mamba_ops.registry.selection import pays as pays
from mamba_ops.registry.selection import record_selections as record_selections
from mamba_ops.registry.selection import runs_at_once as runs_at_once
from mamba_ops.registry.selection import settings as settings
from mamba_ops.registry.splitting import SplitGraph as SplitGraph
from mamba_ops.registry.splitting import Subgraph as Subgraph
from mamba_ops.registry.splitting import mark_splitting as mark_splitting
from mamba_ops.registry.splitting import partition_at_splitting_ops as partition_at_splitting_ops
from mamba_ops.registry.splitting import split_graph as split_graph
from mamba_ops.registry.splitting import splitting_ops as splitting_ops
from mamba_ops.registry.training import flop_formulas as flop_formulas
from mamba_ops.registry.training import register_flop_formulas as register_flop_formulas
from mamba_ops.registry.training import save_ops as save_ops
