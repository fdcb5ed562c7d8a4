"""The front of the warm-up; what it needs is imported when it is called."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mamba_ops.registry import Op

if TYPE_CHECKING:
    from mamba_ops.cold_start.warming import WarmUp


def warm_up(
    model_or_ops: "nn.Module | Op[...] | str | Sequence[Op[...] | str]",
    *,
    device: torch.device | str | None = None,
    dtypes: "Sequence[torch.dtype | tuple[torch.dtype | None, torch.dtype]] | None" = None,
    sizes: Mapping[str, int] | None = None,
    backends: Sequence[str] | None = None,
    training: bool = False,
    processes: int | None = None,
    progress: Callable[[str, int, int], None] | bool | None = None,
) -> "WarmUp":
    """Compile, load and call once every kernel that will be asked for, so that no later call is a slow first one.

    Of a model, each kind of layer is called in every way in which it can be: whole sequences and packed ones, cached or
    not, with slots and initial states or not, one token and a few, with plans, speculative or not. Those are the layers
    of `mamba_ops.layers`, norms between them too, and those of Transformers after `use_mamba_ops`; sizes and dtypes are
    those of their own parameters, so this rank's. Layers that are alike are called once. A layer whose parameters are
    elsewhere, as on the meta device, is replaced by a random one meanwhile. Of an op, one of another package's too, its
    samples are called.

    Kernels compile in processes, and what was compiled is kept on disk by Triton: the next process reads it. What is
    warmed up already is not looked at again. Call it before the caches take the memory; its own is free again.

    Args:
        model_or_ops: a model, or an op or several, or their names.
        device: where calls will be made. None: where the model is if that is no CPU, else this machine's accelerator,
            else the CPU.
        dtypes: dtypes of activations, each in a pair with that of states (alone: float32 states). None: the layers'
            own, or the samples', with float32 states.
        sizes: of ops: the static sizes that their samples are functions of (`heads`, `dim`, ...). Where there
            are several ops, each takes those that it has.
        backends: names of the backends to call it on, one after the other. None: the default order.
        training: warm up what training asks for, too: forwards that record gradients, of whole sequences and packed
            ones, and backwards. No gradient is left behind.
        processes: how many compile at a time. None: as many as there are cores.
        progress: called with what is being done, how much of it is, and of how much; True for a bar. None: a bar
            where the standard error is a terminal and rich is installed.

    Returns:
        A list of rows `(op, backend, variant, seconds, cached)`, with the whole's figures and with a sentence for each
        layer or sample that was skipped: because it is incomplete, or no backend takes it.

    Raises:
        ValueError: a name that nobody registered, a module without layers that run on the ops, a number below 1,
            something else than dtypes.
    """
    from mamba_ops.cold_start import arguments, warming

    what = arguments.known_ops(model_or_ops)
    where, pairs = arguments.device_of(what, device), arguments.pairs_of(dtypes)
    arguments.check_numbers(sizes or {}, processes)
    names: Sequence[Any] = arguments.known_backends(backends)
    with arguments.shown(progress) as show:
        return warming.warm_up(what, where, pairs, sizes or {}, names, training, processes, show)
