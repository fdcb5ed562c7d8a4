"""Functions generated once per op with the op's literal signature.

A generic `*args, **kwargs` layer costs several microseconds a call and hides names from tracebacks and from Dynamo; a
function written out with the op's own parameters costs what a hand-written one does. All generated source is here.
"""

import inspect
import linecache
import math
import textwrap
from collections.abc import Callable, Collection, Iterable
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor

Parameters = list[inspect.Parameter]

LARGEST = torch.finfo(torch.float32).max

_FRONT = """\
def __call__(self, {header}):
    try:
        {limits}
        {recording}
        {allocation}
        if is_compiling_():
            if is_transform_traced_(): refuse_traced_transform_()
            {traced_caches}
            if is_grad_enabled_():
                {refusals}
            overload_({passed}, selection=token_({first}))
            return {result}
        cache_ = decisions_.get(active_())
        if cache_ is not None and not is_watched_():
            must_redispatch_, same_tensors_, numbers_, kernel_, _ = cache_.last
            if (not must_redispatch_() and numbers_ == {numbers} and same_tensors_({compared})):
                {numbers} = numbers_
                kernel_({passed})
                increment_version_({written})
                return {result}
        {transformed}
        {typing}
        if 'torch.distributed.tensor' in modules_:
            refuse_distributed_({tensors})
        {caches}
        dispatch_({passed})
        return {result}
    except Exception as error_:
        raise explained_(error_, {values})
"""

_FUNCTIONAL_FRONT = """\
def __call__(self, {header}):
    try:
        {limits}
        if is_compiling_():
            if is_transform_traced_(): refuse_traced_transform_()
            return overload_({passed}, token_({first}))
        if type({first}) is not tensor_ and is_distributed_({first}):
            register_shardings_()
        {typing}
        {recording}
        return dispatch_({passed})
    except Exception as error_:
        raise explained_(error_, {values})
"""

_BODY = """\
def run({header}, selection=None):
    {caches}
    cache_ = decisions_.get(active_())
    if cache_ is None or selection is not None and selection.size(0) != cache_.token_size:
        cache_ = resolve_(selection)
    must_redispatch_, same_tensors_, numbers_, kernel_, is_capturing_ = cache_.last
    if (must_redispatch_() or numbers_ != {numbers} or not same_tensors_({compared})):
        values_ = {values}
        if is_grad_enabled_():
            refuse_gradient_(values_)
        key_ = ({numbers}, is_inference_mode_enabled_(), {key})
        known_ = cache_.known.get(key_)
        if known_ is None or known_.same_tensors is never_matches_:
            known_ = decide_(cache_, key_, values_)
        cache_.last = known_
        _, _, _, kernel_, is_capturing_ = known_
        if is_capturing_():
            kernel_ = decide_captured_(values_, selection)
    {allocation}
    kernel_({passed})
    {versions}
    return {result}
"""


def is_tensor(parameter: inspect.Parameter) -> bool:
    """Whether a parameter holds a tensor or an optional one."""
    return parameter.annotation in (Tensor, Tensor | None)


def is_optional(parameter: inspect.Parameter) -> bool:
    """Whether a parameter holds a tensor and may be None."""
    return bool(parameter.annotation == Tensor | None)


def left_out(parameters: Parameters, mutated: Collection[str]) -> list[str]:
    """Names of the mutated parameters that a caller may leave out: None in Python, an empty tensor at the op."""
    found = [p for p in parameters if p.name in mutated and is_optional(p)]
    return [p.name for p in found if p.kind is p.KEYWORD_ONLY and p.default is None]


def fronts(
    op: str,
    parameters: Parameters,
    mutated: list[str],
    caches: list[str],
    first_code: int,
    trained: Collection[str] = (),
    result: str = "",
    **closure: Any,
) -> tuple[FunctionType, Callable[[], FunctionType]]:
    """Write the op's `__call__`: allocate what is missing, hand the rest to the dispatcher; and what writes the same
    that hands it to the op's body, which few ops ever need.

    An eager call like the latest one goes to the kernel at once: what torch's dispatcher would do for it is known. It
    takes the dispatcher where something there may follow it: the comparison tells dispatch modes, subclasses and
    transforms apart, `is_watched` knows the rest. The kernel gets the latest call's numbers, which are of the schema's
    types: 2.0 is equal to 2. Kernels write to memory of which torch knows nothing, so here as in the body the versions
    of what they wrote go up: autograd then refuses a backward pass that needs what was there before.

    What a failed call raises is looked at again (`explained`): a value of the wrong type costs a right call nothing.

    While tracing it also passes the selection token and, where an input requires grad, leaves a call in the graph that
    raises when the graph runs. It reads nothing else, because Dynamo would guard on it.

    Of an op with a number that is infinite by default, the largest float32 stands for infinity (see `_limits`):
    packages of AOTInductor are written as JSON, which has none.

    Args:
        op, parameters: qualified name and parameters of the op.
        mutated, caches: names of the mutated parameters, and of those among them that may be left out.
        first_code: number of the sentence that refuses a gradient of the first parameter; the others follow.
        trained: those of the parameters that the op's `forward` takes, which runs instead of the op where gradients are
            asked for, or tensors are spread over devices, and no other tensor is given; none if it does not record any.
        result: what takes the output out of that which `forward` returns.
        closure: the values of the template's names that end in `_`, and `inside`, those that the second has instead.
    """
    shown = [p.replace(name="out", default=None) if p.name == "output" else p for p in parameters]
    names = [p.name for p in shown]
    first = next(p.name for p in parameters if p.annotation is Tensor)
    victim = "out" if "out" in names else mutated[0]
    allocated = f"facets_['allocate_output']({passed_on([p for p in parameters if p.name != 'output'])})"
    empties = [f"if {cache} is None: {cache} = {first}.new_empty(0)" for cache in caches]
    refusals = [
        f"if {_is_given(p)}{p.name}.requires_grad: refuse_({victim}, {first_code + number})"
        for number, p in enumerate(shown)
        if is_tensor(p)
    ]
    inside_ = closure.pop("inside")
    options: dict[str, Any] = {
        "header": header_of(shown, closure),
        "limits": _limits(parameters, closure),
        "allocation": f"if out is None: out = {allocated}" if "out" in names else "",
        "traced_caches": "\n            ".join(empties),
        "caches": "\n        ".join(empties),
        "refusals": "\n                ".join(refusals),
        "passed": passed_on(parameters, output="out"),
        "numbers": numbers_of(parameters),
        "values": as_tuple(shown),
        "compared": compared(shown),
        "first": first,
        "tensors": as_tuple(p for p in shown if is_tensor(p)),
        "written": _those_given(p for p, declared in zip(shown, parameters, strict=True) if declared.name in mutated),
        "result": "out" if "out" in names else None,
    }
    others = [f"{p.name} is None" for p in shown if is_tensor(p) and p.name not in trained]
    handed_on = ", ".join(f"{p.name}={p.name}" for p in shown if p.name in trained)
    forward, recording = f"return forward_({handed_on}){result}", ""
    transformed = f"if is_transformed_(): refuse_transformed_({options['values']})"
    if trained:
        asks, given = _asks_for_gradients(p for p in shown if p.name in trained), " and ".join(others)
        asks = f"{asks} or type({first}) is not tensor_ and is_distributed_({first})"
        recording = f"is_forward_ = ({given})\n        if is_forward_ and ({asks}):\n            {forward}"
        transformed = f"if is_forward_ and is_transformed_(): {forward}\n        {transformed}"
    source = _FRONT.format(recording=recording, transformed=transformed, typing=_typing(shown), **options)
    front = compiled(op, "front", source, closure)

    def inside() -> FunctionType:
        source = _FRONT.format(recording="", transformed="", typing="", **options)
        return cast(FunctionType, compiled(op, "inside", source, {**closure, **inside_}))

    return cast(FunctionType, front), inside


def functional_front(op: str, inputs: Parameters, **closure: Any) -> FunctionType:
    """Write the `__call__` of an op that returns new tensors: hand the call to the dispatcher, while tracing with the
    selection token; or to `record`, where an eager call asks for gradients.

    Args:
        op: qualified name of the op.
        inputs: the op's own parameters, without the tensors that it returns.
        closure: the values of the template's names that end in `_`; `record` is None for an op that records none.
    """
    passed = passed_on(inputs)
    records, asks = closure["record"] is not None, _asks_for_gradients(inputs)
    refusal = f"if is_transformed_(): refuse_tangents_({as_tuple(inputs)})"
    source = _FUNCTIONAL_FRONT.format(
        header=header_of(inputs, closure),
        limits=_limits(inputs, closure),
        passed=passed,
        first=next(p.name for p in inputs if p.annotation is Tensor),
        values=as_tuple(inputs),
        typing=_typing(inputs),
        recording=f"if is_transformed_() or {asks}:\n            return record_({passed})" if records else refusal,
    )
    return cast(FunctionType, compiled(op, "front", source, closure))


def body(
    op: str,
    parameters: Parameters,
    caches: list[str],
    mutated: Collection[str],
    returned: Collection[str] = (),
    **closure: Any,
) -> Callable[..., Any]:
    """Write the op's implementation: recognise the call, then run its kernel.

    A call is known by shape, dtype, layout and device of every tensor, by the strides of those that are written, by
    which input `output` is (if any), and by every number. So a known call was checked before and its kernel is known:
    checks cost nothing on a repeated call.

    The latest call is recognised in one C++ comparison (the one that Dynamo guards
    with; it tells inference tensors and mode apart, so the key does too, and tensors that require grad), which is made
    at the second call of its kind; any other by a look-up. What is known does not settle a call in grad mode if a
    tensor requires grad, nor one that is being captured, which the op has to remember.

    `selection` is there for the keys of captured graphs.

    Args:
        op, parameters: qualified name and parameters of the op.
        caches: names of those that are empty where the caller left them out; from here on they are None.
        mutated: names of those that the op writes.
        returned: those of them that are no arguments of the op: they are allocated and returned.
        closure: the values of the template's names that end in `_`; among them `no_<name>` for each optional tensor,
            which stands for None in the comparison.
    """
    passed, parameters = passed_on(parameters), [p for p in parameters if p.name not in returned]
    tensors = [p for p in parameters if is_tensor(p)]
    written = [p for p in parameters if p.name in mutated]
    facts = "({0}.size(), {0}.dtype, {0}.layout, {0}.get_device(), {0}.is_inference()"
    keys = [
        (f"None if {p.name} is None else " if is_optional(p) else "")
        + facts.format(p.name)
        + (f", {p.name}.layout is strided_ and {p.name}.stride())" if p.name in mutated else ")")
        for p in tensors
    ]
    if any(p.name == "output" for p in tensors):  # a tensor met twice is no match for the comparison: told apart here
        others = [p.name for p in tensors if p.name != "output"]
        keys.append("(" + "".join(f"{i} if output is {other} else " for i, other in enumerate(others)) + "None)")
    source = _BODY.format(
        header=header_of(parameters, closure),
        caches="\n    ".join(f"{cache} = {cache} if {cache}.numel() else None" for cache in caches),
        numbers=numbers_of(parameters),
        compared=compared(parameters),
        values=as_tuple(parameters),
        key=", ".join(keys),
        # Without spaces around `=`, where a long line would be broken outside parentheses.
        allocation=f"({', '.join(returned)},)=facets_['allocate_output']({passed_on(parameters)})" if returned else "",
        passed=passed,
        versions=f"increment_version_({_those_given(written)})" if written else "",
        result=f"({', '.join(returned)})" if returned else None,
    )
    return compiled(op, "body", source, closure)


def numbers_of(parameters: Parameters) -> str:
    return as_tuple(p for p in parameters if not is_tensor(p))


def _typing(parameters: Iterable[inspect.Parameter]) -> str:
    """Write what looks at the types of a call's numbers, which torch's dispatcher converts: 0.5 of numpy is its 0."""
    kinds = {int: "type({0}) is int", bool: "type({0}) is bool", float: "type({0}) is float"}
    optional = {kind | None: f"({{0}} is None or {check})" for kind, check in kinds.items()}
    checks = [(kinds | optional)[p.annotation].format(p.name) for p in parameters if not is_tensor(p)]
    return f"if not ({' and '.join(checks)}): check_numbers_({as_tuple(parameters)})" if checks else ""


def compared(parameters: Parameters) -> str:
    """Write a call's tensors as they are compared with the latest call's."""
    tensors = [p for p in parameters if is_tensor(p)]
    return ", ".join(f"no_{p.name}_ if {p.name} is None else {p.name}" if is_optional(p) else p.name for p in tensors)


def _asks_for_gradients(parameters: Iterable[inspect.Parameter]) -> str:
    """Write whether autograd is to record a call."""
    require = " or ".join(f"{_is_given(p)}{p.name}.requires_grad" for p in parameters if is_tensor(p))
    return f"is_grad_enabled_() and ({require})"


def compiled(op: str, role: str, source: str, closure: dict[str, Any]) -> Callable[..., Any]:
    """Compile a function; the values of `closure` are cells called `<name>_`, which Dynamo guards on as on any closure.

    No parameter of an op ends in `_`, so none hides a cell.
    """
    cells = {f"{name}_": value for name, value in closure.items()}
    name = source.removeprefix("def ").partition("(")[0]
    lines = [f"def make({', '.join(cells)}):", *textwrap.indent(source, "    ").splitlines(), f"    return {name}"]
    code = "\n".join(_wrapped(line) for line in lines if line.strip()) + "\n"
    filename = f"<{op}: {role}>"
    linecache.cache[filename] = (len(code), None, code.splitlines(keepends=True), filename)  # for tracebacks
    scope: dict[str, Any] = {}  # no __name__: Dynamo would look the globals up in a module of that name
    exec(compile(code, filename, "exec"), scope)
    return cast(Callable[..., Any], scope["make"](*cells.values()))


def _wrapped(line: str, width: int = 110) -> str:
    """Break a long line at spaces; those of the templates that get long are in parentheses from early on.

    textwrap would do the same in ten times the time, which is a fifth of that of importing the package.
    """
    if len(line) <= width:
        return line
    first, *words = line.lstrip().split(" ")
    indent = " " * (len(line) - len(line.lstrip()))
    broken, end = [indent + first], len(indent + first)
    for word in words:
        end += 1 + len(word)
        if end <= width:
            broken.append(" " + word)
        else:
            broken.append(f"\n{indent}        {word}")
            end = len(indent) + 8 + len(word)
    return "".join(broken)


def header_of(parameters: Iterable[inspect.Parameter], closure: dict[str, Any]) -> str:
    """Write a parameter list; defaults that have no literal go to `closure`."""
    parts: list[str] = []
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        if p.default is p.empty:
            parts.append(p.name)
        elif isinstance(p.default, float) and not math.isfinite(p.default):
            closure[f"default_{p.name}"] = p.default
            parts.append(f"{p.name}=default_{p.name}_")
        else:
            parts.append(f"{p.name}={p.default}")
    return ", ".join(parts)


def _limits(parameters: Parameters, closure: dict[str, Any]) -> str:
    """Write what puts the largest float32 in the place of infinity, in the numbers of an op that has such a default.

    That is infinity itself where it is the default, and -infinity in all.
    """
    numbers = [p for p in parameters if p.annotation is float]
    infinite = [p.name for p in numbers if isinstance(p.default, float) and math.isinf(p.default)]
    if not infinite:
        return ""
    closure["inf"] = math.inf
    lines = [f"if {name} == inf_: {name} = {LARGEST}" for name in infinite]
    return "\n        ".join([*lines, *(f"if {p.name} == -inf_: {p.name} = -{LARGEST}" for p in numbers)])


def passed_on(parameters: Iterable[inspect.Parameter], **renamed: str) -> str:
    """Write the arguments of a call that hands every parameter on."""
    values = ((p, renamed.get(p.name, p.name)) for p in parameters)
    return ", ".join(f"{p.name}={value}" if p.kind is p.KEYWORD_ONLY else value for p, value in values)


def as_tuple(parameters: Iterable[inspect.Parameter]) -> str:
    return "(" + "".join(f"{p.name}, " for p in parameters) + ")"


def _those_given(parameters: Iterable[inspect.Parameter]) -> str:
    """Write a tuple of tensors without those that are None; the output never is."""
    optional = "*(() if {0} is None else ({0},))"
    return "(" + "".join(f"{optional.format(p.name) if _may_be_none(p) else p.name}, " for p in parameters) + ")"


def _may_be_none(parameter: inspect.Parameter) -> bool:
    return is_optional(parameter) and parameter.name != "out"


def _is_given(parameter: inspect.Parameter) -> str:
    return f"{parameter.name} is not None and " if is_optional(parameter) else ""
