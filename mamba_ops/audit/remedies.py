"""Classifies causes of graph breaks and recompiles: a kind, a severity and a sentence that says what to change."""

import dataclasses
import re
import sys

from mamba_ops.registry import ops


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a cause means.

    Attributes:
        kind, severity: of the finding.
        remedy: one sentence; `{op}` is what the finding is about.
    """

    kind: str
    severity: str
    remedy: str


RULES = {
    # what ends a graph
    "item": Rule(
        "sync", "error", "Keep the value a tensor, or pass it in: {op} waits for the device and ends the graph."
    ),
    "tolist": Rule(
        "sync",
        "error",
        "Keep the values a tensor (index, gather, mask by it), or pass them in: {op} waits for the device and ends the "
        "graph.",
    ),
    "dynamic-shape": Rule(
        "sync",
        "error",
        "Use a form with a fixed size (torch.where, a mask, output_size=...): {op} sizes its result by values.",
    ),
    "branch": Rule("sync", "error", "Compute both sides and select with torch.where, or decide before the model runs."),
    "disable": Rule(
        "kernel",
        "error",
        "Replace {op} by an op that the compiler knows ({replacement}), or remove the torch.compiler.disable.",
    ),
    "pybind": Rule("kernel", "error", "Call {op} through an op that the compiler knows, with a fake ({replacement})."),
    "no-fake": Rule(
        "kernel", "error", "Register a fake for {op} (torch.library.register_fake); until then it runs alone."
    ),
    "print": Rule(
        "break", "error", "Remove the print, or add it to torch._dynamo.config.reorderable_logging_functions."
    ),
    "logging": Rule(
        "break", "error", "Log outside the model, or add it to torch._dynamo.config.ignore_logging_functions."
    ),
    "data-pointer": Rule("break", "error", "Leave addresses to the kernel: a trace has no tensors with memory."),
    "explicit": Rule("break", "error", "Remove the call of torch._dynamo.graph_break."),
    "explicit-of-torch": Rule("break", "note", "Nothing to do: torch itself leaves {op} to Python."),
    "backward": Rule(
        "break",
        "error",
        "Call {op} outside the compiled function: the backward of each graph is compiled with it all the same.",
    ),
    "builtin": Rule("break", "error", "Call {op} outside the compiled model, and pass what it returns."),
    "skipped-function": Rule("break", "error", "Move {op} out of the compiled model, or write it with tensor ops."),
    "context-manager": Rule("break", "error", "Enter {op} outside the compiled model: Dynamo cannot trace it."),
    "exception": Rule("break", "error", "Check shapes before the model is compiled: tracing ended in an exception."),
    "hook": Rule("break", "error", "Remove the hook, or register it outside the compiled region."),
    "out-argument": Rule("break", "error", "Pass a contiguous tensor as out, or let the function allocate its result."),
    "autograd-function-break": Rule(
        "kernel", "error", "Replace {op} by an op with a registered gradient ({replacement}); Dynamo cannot trace it."
    ),
    "rest-of-line": Rule("break", "note", "Remove the other break on this line first: this is what comes after it."),
    "other-break": Rule(
        "break", "error", "Move what this line does out of the compiled model, or write it with tensor ops."
    ),
    "compiler-error": Rule("break", "error", "Take this line out of the compiled model: the compiler fails at it."),
    # what stays in the graph
    "triton": Rule(
        "kernel",
        "warning",
        "Wrap the launch of {op} as an op ({replacement}, or torch.library.triton_op): engines cannot split there.",
    ),
    "autograd-function": Rule(
        "kernel",
        "warning",
        "Register the gradient on an op (torch.library.register_autograd) instead of {op}: Dynamo traces its inside.",
    ),
    "hidden-mutation": Rule(
        "kernel", "error", "Declare the mutation in the schema of {op}, as in Tensor(a!): compiled code may reorder it."
    ),
    "alias": Rule(
        "kernel", "error", "Let {op} return a new tensor or nothing: what it returns shares memory with an argument."
    ),
    "host-copy": Rule("sync", "warning", "Keep the tensor on the device: {op} waits for it and cannot be captured."),
    "unrolled": Rule(
        "fallback",
        "warning",
        "Replace the steps of {op} by one op ({replacement}): every one of them is in the graph.",
    ),
    # what stops CUDA graphs
    "capture-input": Rule(
        "capture",
        "warning",
        "Make {op} a buffer, or torch._dynamo.mark_static_address it: CUDA graphs need its address to stay.",
    ),
    "capture-host": Rule("capture", "warning", "Create this tensor on the device (device=x.device), not on the host."),
    "capture-other": Rule("capture", "warning", "Take this out of the compiled region if you need CUDA graphs: {op}."),
    # what recompiles
    "attribute": Rule(
        "recompile",
        "error",
        "If {op} changes, make it a tensor buffer; if it differs between layers, decide by it in __init__.",
    ),
    "number": Rule(
        "recompile",
        "note",
        "Nothing, or dynamic=True for one compile less: torch makes {op} dynamic at its second value; 0 and 1 are "
        "compiled for themselves.",
    ),
    "constant": Rule(
        "recompile",
        "error",
        "Do not loop over {op} or index by it in the model, or pass it as a tensor: each value is compiled for itself.",
    ),
    "string": Rule(
        "recompile",
        "error",
        "Decide by {op} before the model (in __init__, or one compiled function for each value): text is always a "
        "constant to the compiler, and every value is compiled.",
    ),
    "flag": Rule(
        "recompile",
        "warning",
        "Keep {op} one truth value, or compute both sides and select with torch.where: each value is compiled.",
    ),
    "length": Rule("recompile", "error", "Keep {op} at one length, such as a tensor allocated beforehand."),
    "keys": Rule(
        "recompile", "error", "Keep the keys of {op} the same from call to call: each set of keys is compiled."
    ),
    "keywords": Rule(
        "recompile",
        "warning",
        "Pass the same keyword arguments in every call (None where there is none yet): each form of call is compiled.",
    ),
    "size-one": Rule(
        "recompile", "warning", "Keep {op} above 1 (padded), or mark_unbacked it: size 1 is always compiled for itself."
    ),
    "size-again": Rule(
        "recompile", "error", "Do not decide by {op} in the model (pad, mask, decide before): each answer is a graph."
    ),
    "size-fixed": Rule(
        "recompile",
        "error",
        "Do not loop over {op} in Python or take its int() in the model (one op for the whole length, or padding): "
        "each size is compiled for itself.",
    ),
    "size": Rule("recompile", "note", "Compile with dynamic=True{marks}: this costs one compile."),
    "hyperparameter": Rule(
        "recompile",
        "error",
        "Give the optimizer {key} as a tensor, such as {key}=torch.tensor(0.01): numbers are compiled in.",
    ),
    "optimizer-state": Rule(
        "recompile", "note", "Nothing to do: the first step of an optimizer makes its state, and the second has it."
    ),
    "dtype": Rule("recompile", "warning", "Cast {op} before the model: each dtype is compiled for itself."),
    "rank": Rule(
        "recompile", "warning", "Give {op} one number of dimensions (view, unsqueeze): each is compiled for itself."
    ),
    "requires-grad": Rule(
        "recompile",
        "warning",
        "Call with {op} always detached or never: with and without requires_grad are two graphs.",
    ),
    "device": Rule("recompile", "warning", "Keep {op} on one device: each device is compiled for itself."),
    "dispatch-keys": Rule(
        "recompile",
        "warning",
        "Make {op} the same way in every call (not once under torch.inference_mode or vmap, not of another subclass): "
        "each kind of tensor is compiled.",
    ),
    "aliasing": Rule(
        "recompile",
        "warning",
        "Pass different tensors for {op} (a clone), or always the same one: torch compiles each.",
    ),
    "strides": Rule(
        "recompile",
        "warning",
        "Make {op} of one layout before the model (contiguous(), one memory_format): each layout is compiled.",
    ),
    "type": Rule(
        "recompile", "warning", "Pass {op} always as one type: None, a tensor and a number are compiled each."
    ),
    "grad-mode": Rule("recompile", "warning", "Call the model under one grad mode and one autocast state."),
    "identity": Rule(
        "recompile", "error", "Keep {op} the same object from call to call: it is guarded on by identity."
    ),
    "limit": Rule(
        "recompile", "error", "Remove the recompiles above first: at the limit {op} runs without the compiler."
    ),
    "other-guard": Rule(
        "recompile", "warning", "Keep {op} the same from call to call: the compiled code depends on it."
    ),
    # the rest
    "mutated-input": Rule(
        "copy", "warning", "Write to a contiguous cache of its own whose old values are not read after {op} has run."
    ),
    "reference-path": Rule("fallback", "warning", "Install {op}; without it a slower path runs."),
    "optional-package": Rule("fallback", "warning", "Install {op}; without it a slower path runs."),
    "refusal": Rule("fallback", "warning", "Give {op} what its faster backend takes: see the refusal."),
    "jit-first": Rule("jit", "note", "Warm {op} up before serving: it is compiled when it is first called."),
    "jit-later": Rule(
        "jit", "error", "Do not specialise {op} on what varies (do_not_specialize): a new shape compiles it again."
    ),
    "assumed-values": Rule(
        "stopped",
        "note",
        "Keep the values on the device; with other values than 1 the trace may go another way from here.",
    ),
    "needs-values": Rule(
        "stopped", "note", "Audit on the device itself, or with --device cpu, to see what comes after."
    ),
}

_TYPES = [  # patterns for torch's type of a break and for its message, then the cause
    (r"Tensor\.item\(\)", r"", "item"),
    (r"Tensor\.tolist\(\)", r"", "tolist"),
    (r"Data dependent operator", r"_local_scalar_dense|item", "item"),
    (r"Data.dependent branching|data-dependent jump|Data-dependent assertion|^generic_jump", r"", "branch"),
    (r"Data dependent operator|Could not guard on data-dependent", r"", "branch"),
    (r"Dynamic shape operator", r"", "dynamic-shape"),
    (r"compiler\.disable|disabled function", r"", "disable"),
    (r"fake tensors|Missing fake|no fake|FakeTensor|fake impl", r"", "no-fake"),
    (r"graph_break\(\)", r"", "explicit"),
    (r"Tensor\.backward\(\)", r"", "backward"),
    (r"logging\.Logger", r"", "logging"),
    (r"builtin operator", r"builtin print", "print"),
    (r"Observed exception", r"data_ptr|data pointer", "data-pointer"),
    (r"", r"data_ptr", "data-pointer"),
    (r"context manager", r"", "context-manager"),
    (r"autograd\.Function", r"", "autograd-function-break"),
    (r"hook", r"", "hook"),
    (r"out=|out variant", r"", "out-argument"),
    (r"marked as skipped", r"builtin `<unknown module>\.Tensor\.", "rest-of-line"),  # looked up before a break
    (r"", r"PyCapsule|pybind11|instancemethod", "pybind"),
    (r"marked as skipped|builtin operator", r"[Bb]uiltin|built-in", "builtin"),
    (r"marked as skipped|deepcopy|skipped", r"", "skipped-function"),
    (r"Observed exception", r"", "exception"),
]


def classify_break(gb_type: str, text: str, source: str) -> str:
    """Return the cause of a graph break from torch's type of it, its message and the source line."""
    if ".data_ptr(" in source:
        return "data-pointer"
    for wanted, context, cause in _TYPES:
        if re.search(wanted, gb_type) and re.search(context, text):
            if cause == "item" and ".tolist(" in source:
                return "tolist"
            if cause == "builtin" and (named := re.search(r"`(\w+)\.[\w.]+`", text)):
                return cause if named[1] in sys.stdlib_module_names else "pybind"
            return cause
    return "other-break"


def remedy(cause: str, op: str, *around: str, binds: bool = False) -> str:
    """Return the sentence.

    Args:
        cause: in `RULES`.
        op: what the finding is about.
        around: texts that may name a function that one of our ops replaces, nearest first.
        binds: whether `use_mamba_ops` binds the functions of the file that the finding is in.
    """
    replacement = next((found for text in (op, *around) if (found := _replacement(text))), None)
    if cause == "reference-path" and binds:
        on = f" (on {replacement})" if replacement else ""
        return f"Run the model under mamba_ops.compat.transformers.use_mamba_ops(model){on}; or install {op}."
    if cause == "attribute" and not op.startswith("self"):
        return f"Keep {op} the same from call to call, or make it a tensor: what an argument holds is compiled in."
    named = re.findall(r"(?:^|, )([A-Za-z_][\w.\[\]']*)\.shape\[(\d+)\]", op)
    marks = ", ".join(f"torch._dynamo.mark_dynamic({name}, {dim})" for name, dim in named)
    key = re.search(r"\['(\w+)'\]$", op)
    return RULES[cause].remedy.format(
        op=op,
        key=key[1] if key else op,
        marks=f", or call {marks} before the first call" if marks else "",
        replacement=replacement or "torch.library.custom_op",
    )


def _replacement(text: str) -> str | None:
    """Return the op of this library that replaces a function named in a text; of several, that of the longest name."""
    names = {op.name: re.search(op.replaces, text) for op in ops().values() if op.replaces}
    found = {name: len(match[0]) for name, match in names.items() if match}
    return f"mamba_ops.{max(found, key=found.__getitem__)}" if found else None
