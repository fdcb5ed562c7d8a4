"""Functions generated once per op with the op's literal signature.

A generic `*args, **kwargs` layer costs several microseconds a call and hides names from tracebacks and from Dynamo; a
function written out with the op's own parameters costs what a hand-written one does. All generated source is here.
"""

import inspect
import linecache
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from types import FunctionType
from typing import Any, cast

from torch import Tensor

Parameters = list[inspect.Parameter]


def _compiled(name: str, role: str, source: str, **closure: Any) -> Callable[..., Any]:
    """Compile a function whose free names are cells, so that Dynamo guards on them as on any closure."""
    lines = [f"def make({', '.join(closure)}):", *(f"    {line}" for line in source.splitlines())]
    lines.append(f"    return {source.split('(')[0].split()[-1]}")
    factory = "".join(f"{part}\n" for line in lines for part in _wrapped(line))
    filename = f"<{name}: {role}>"
    linecache.cache[filename] = (len(factory), None, factory.splitlines(keepends=True), filename)  # for tracebacks
    scope: dict[str, Any] = {}  # no __name__: Dynamo would look the globals up in a module of that name
    exec(compile(factory, filename, "exec"), scope)
    return cast(Callable[..., Any], scope["make"](*closure.values()))


def _wrapped(line: str, width: int = 110) -> Iterator[str]:
    """Break a long line after commas and before `or`, where parentheses are open."""
    indent = " " * (len(line) - len(line.lstrip()) + 8)
    start = depth = 0
    last = None
    for i, character in enumerate(line):
        depth += (character in "([{") - (character in ")]}")
        if depth and character == " " and (line[i - 1] == "," or line.startswith(" or ", i)):
            if i - start > width - len(indent) and last is not None:
                yield (indent if start else "") + line[start:last].strip(" " if start else "")
                start = last
            last = i
    yield (indent if start else "") + line[start:].strip(" " if start else "")


def _header(parameters: Iterable[inspect.Parameter], defaults: dict[str, Any]) -> str:
    """Write a parameter list; defaults that have no literal go to `defaults`, as closure variables."""
    parts: list[str] = []
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        if p.default is p.empty:
            parts.append(p.name)
        elif p.default is None or isinstance(p.default, int) or (p.default == p.default and abs(p.default) < math.inf):
            parts.append(f"{p.name}={p.default}")
        else:
            defaults[f"_{p.name}"] = p.default
            parts.append(f"{p.name}=_{p.name}")
    return ", ".join(parts)


def _passed(parameters: Iterable[inspect.Parameter], **renamed: str) -> str:
    """Write the arguments of a call that hands every parameter on."""
    values = ((p, renamed.get(p.name, p.name)) for p in parameters)
    return ", ".join(f"{p.name}={value}" if p.kind is p.KEYWORD_ONLY else value for p, value in values)


def is_tensor(parameter: inspect.Parameter) -> bool:
    """Whether a normalised parameter holds a tensor or an optional one."""
    return "Tensor" in str(parameter.annotation)


def is_optional(parameter: inspect.Parameter) -> bool:
    """Whether a normalised parameter may be None."""
    return is_tensor(parameter) and parameter.annotation is not Tensor


def left_out(parameters: Parameters, mutated: Collection[str]) -> list[str]:
    """Names of the mutated parameters that a caller may leave out: None in Python, an empty tensor at the op."""
    return [
        p.name
        for p in parameters
        if p.name in mutated and is_optional(p) and p.kind is p.KEYWORD_ONLY and p.default is None
    ]


def subset(name: str, parameters: Parameters, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of the op's signature that calls `function` with the parameters it names, or with all of them
    where it takes any.
    """
    wanted = inspect.signature(function).parameters
    takes_any = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in wanted.values())
    defaults: dict[str, Any] = {}
    call = _passed(parameters) if takes_any else ", ".join(f"{p.name}={p.name}" for p in parameters if p.name in wanted)
    source = f"def call({_header(parameters, defaults)}):\n    return function({call})"
    return _documented(_compiled(name, function.__name__, source, function=function, **defaults), function)


def packed(
    name: str, parameters: Parameters, arguments: type[tuple[Any, ...]], function: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a function of the op's signature that calls `function` with one value, the NamedTuple of all arguments."""
    defaults: dict[str, Any] = {}
    call = "".join(f"{p.name}, " for p in parameters)
    source = f"def call({_header(parameters, defaults)}):\n    return function(make(arguments, ({call})))"
    closure = {"function": function, "make": tuple.__new__, "arguments": arguments}
    return _documented(_compiled(name, function.__name__, source, **closure, **defaults), function)


def _documented(made: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    made.__doc__ = function.__doc__
    return made


def renamed_output(name: str, parameters: Parameters, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of the op's signature that calls a declared one, whose output may be called `out`."""
    if "out" not in inspect.signature(function).parameters:
        return function
    defaults: dict[str, Any] = {}
    call = ", ".join(f"{'out' if p.name == 'output' else p.name}={p.name}" for p in parameters)
    source = f"def reference({_header(parameters, defaults)}):\n    function({call})"
    return _compiled(name, "reference", source, function=function, **defaults)


def fronts(
    name: str,
    parameters: Parameters,
    mutated: list[str],
    caches: list[str],
    first_code: int,
    trained: Collection[str] = (),
    saves: bool = False,
    **closure: Any,
) -> tuple[FunctionType, FunctionType]:
    """Write the op's `__call__`: allocate what is missing, hand the rest to the dispatcher; and the same that hands it
    to the op's body.

    While tracing it also passes the selection token and, where an input requires grad, leaves a call in the graph that
    raises when the graph runs. It reads nothing else, because Dynamo would guard on it.

    Args:
        name: qualified name of the op.
        parameters: the op's own.
        mutated: names of the mutated parameters.
        caches: those of them that may be left out.
        first_code: number of the sentence that refuses a gradient of the first parameter; the others follow.
        trained: those of the parameters that the op's `forward` takes, which runs instead of the op where gradients are
            asked for and no other tensor is given; none if it does not record gradients.
        saves: whether `forward` returns more than the output, for the backward.
        closure: `overload`, `dispatch`, `body`, `outputs` (a list of the one function that allocates), `is_compiling`,
            `token`, `is_grad_enabled`, `refuse`, `is_transformed`, `forward`.
    """
    writes_output = any(p.name == "output" for p in parameters)
    shown = [p.replace(name="out", default=None) if p.name == "output" else p for p in parameters]
    inputs = [p for p in parameters if p.name != "output"]
    victim = "out" if writes_output else mutated[0]
    defaults: dict[str, Any] = {}
    header = [f"def __call__(self, {_header(shown, defaults)}):"]
    lines, training = [], []
    if trained:
        others = [p.name for p in shown if is_tensor(p) and p.name not in trained]
        handed_on = ", ".join(f"{p.name}={p.name}" for p in shown if p.name in trained)
        training = [
            f"    if {_asks_for_gradients(p for p in shown if p.name in trained)}:",
            f"        if {' and '.join(f'{other} is None' for other in others)}:",
            f"            return forward_({handed_on}){'[0]' if saves else ''}",
        ]
    if writes_output:
        lines += ["    if out is None:", f"        out = outputs_[0]({_passed(inputs)})"]
    first = next(p.name for p in parameters if is_tensor(p) and not is_optional(p))
    for cache in caches:
        lines += [f"    if {cache} is None:", f"        {cache} = {first}.new_empty(0)"]
    lines += ["    if is_compiling_():", "        if is_grad_enabled_():"]
    for number, p in enumerate(parameters):
        if is_tensor(p):
            value = "out" if p.name == "output" else p.name
            given = f"{value} is not None and " if is_optional(p) else ""
            lines += [
                f"            if {given}{value}.requires_grad:",
                f"                refuse_({victim}, {first_code + number})",
            ]
    call = _passed(parameters, output="out")
    lines += [
        f"        overload_({call}, selection=token_({first}.device))",
        "    else:",
        f"        dispatch_({call})",
        "    return out" if writes_output else "    return None",
    ]
    body = closure.pop("body")
    front = _compiled(name, "front", "\n".join(header + training + lines), **_own(closure), **defaults)
    inside = _compiled(name, "inside", "\n".join(header + lines), **_own({**closure, "dispatch": body}), **defaults)
    return cast(FunctionType, front), cast(FunctionType, inside)


def functional_front(name: str, inputs: Parameters, **closure: Any) -> FunctionType:
    """Write the `__call__` of an op that returns new tensors: hand the call to the dispatcher, while tracing with the
    selection token; or to `record`, where an eager call asks for gradients.

    Args:
        name: qualified name of the op.
        inputs: the op's own parameters, without the tensors that it returns.
        closure: `overload`, `dispatch`, `is_compiling`, `token`, `is_grad_enabled`, `is_transformed`, `record` (None
            for an op that records no gradients).
    """
    first = next(p.name for p in inputs if is_tensor(p) and not is_optional(p))
    defaults: dict[str, Any] = {}
    passed = "".join(f"{p.name}, " for p in inputs)
    lines = [
        f"def __call__(self, {_header(inputs, defaults)}):",
        "    if is_compiling_():",
        f"        return overload_({passed}token_({first}.device))",
    ]
    if closure["record"] is not None:
        lines += [f"    if {_asks_for_gradients(inputs)}:", f"        return record_({passed.rstrip(', ')})"]
    lines += [f"    return dispatch_({passed.rstrip(', ')})"]
    return cast(FunctionType, _compiled(name, "front", "\n".join(lines), **_own(closure), **defaults))


def _asks_for_gradients(parameters: Iterable[inspect.Parameter]) -> str:
    """Write whether a call is to be differentiated: by autograd, or by a transform of torch.func."""
    return f"is_grad_enabled_() and ({_need_grad(parameters)} or not is_compiling_() and is_transformed_())"


def _need_grad(parameters: Iterable[inspect.Parameter]) -> str:
    return " or ".join(
        f"{p.name} is not None and {p.name}.requires_grad" if is_optional(p) else f"{p.name}.requires_grad"
        for p in parameters
        if is_tensor(p)
    )


def body(
    name: str, parameters: Parameters, caches: list[str], returned: Collection[str] = (), **closure: Any
) -> Callable[..., Any]:
    """Write the op's implementation: recognise the call, then run its kernel.

    A call is known by shape, dtype and device of every tensor and by every number, so a known call was checked before
    and its kernel is known: checks cost nothing on a repeated call. The latest call is recognised in one C++ comparison
    (the one that Dynamo guards with; it tells inference tensors and mode apart, so the key does too, and tensors that
    require grad), which is made at the second call of its kind; any other by a look-up. What is known does not settle
    a call in grad mode if a tensor requires grad, nor one that is being captured, for the op has to remember that it
    was.

    Args:
        name: qualified name of the op.
        parameters: the op's own; `selection` follows them: it is there for the keys of captured graphs.
        caches: those of them that are empty where the caller left them out; from here on they are None.
        returned: those of them that are no arguments of the op: `outputs` allocates them, and they are returned.
        closure: `decisions` (a `DecisionCache` for each context's requests), `active` (returns those), `resolve` (finds
            the cache of a call with a selection token, or the first), `never_matches` (what a call seen once is
            compared by), `decide`, `decide_captured`, `refuse_gradient`, `is_grad_enabled`,
            `is_inference_mode_enabled`, `outputs` (a list of the one function that allocates), `no_<name>` for each
            optional tensor (which stands for None in the comparison).
    """
    kernel_call = _passed(parameters)
    parameters = [p for p in parameters if p.name not in returned]
    tensors = [p for p in parameters if is_tensor(p)]
    compared = ", ".join(
        f"no_{p.name}_ if {p.name} is None else {p.name}" if is_optional(p) else p.name for p in tensors
    )
    numbers = "(" + "".join(f"{p.name}, " for p in parameters if not is_tensor(p)) + ")"
    key = ", ".join(
        (f"None if {p.name} is None else " if is_optional(p) else "")
        + f"({p.name}.size(), {p.name}.dtype, {p.name}.get_device(), {p.name}.is_inference())"
        for p in tensors
    )
    values = "(" + "".join(f"{p.name}, " for p in parameters) + ")"
    defaults: dict[str, Any] = {}
    lines = [
        f"def run({_header(parameters, defaults)}, selection=None):",
        *(f"    {cache} = {cache} if {cache}.numel() else None" for cache in caches),
        "    cache_ = decisions_.get(active_())",
        "    if cache_ is None or selection is not None and selection.size(0) != cache_.token_size:",
        "        cache_ = resolve_(selection)",
        "    must_redispatch_, same_tensors_, numbers_, kernel_, is_capturing_ = cache_.last",
        f"    if must_redispatch_() or numbers_ != {numbers} or not same_tensors_({compared}):",
        f"        if is_grad_enabled_() and ({_need_grad(tensors)}):",
        f"            refuse_gradient_({values})",
        f"        key_ = ({numbers}, is_inference_mode_enabled_(), {key})",
        "        known_ = cache_.known.get(key_)",
        "        if known_ is None or known_.same_tensors is never_matches_:",
        f"            known_ = decide_(cache_, key_, {values})",
        "        cache_.last = known_",
        "        _, _, _, kernel_, is_capturing_ = known_",
        "        if is_capturing_():",
        f"            kernel_ = decide_captured_({values}, selection)",
        *([f"    {', '.join(returned)}, = outputs_[0]({_passed(parameters)})"] if returned else ()),
        f"    kernel_({kernel_call})",
        *([f"    return {', '.join(returned)}"] if returned else ()),
    ]
    return _compiled(name, "body", "\n".join(lines), **_own(closure), **defaults)


def _own(closure: dict[str, Any]) -> dict[str, Any]:
    """Return closure variables under the names that they have in fronts and bodies, which no op's parameter has."""
    return {f"{name}_": value for name, value in closure.items()}
