"""Reads why no compiled version of a function fitted a call: the guards that failed, with the values before and now.

Torch names one guard for each version, the first that failed. The version that fits best says what has changed, so all
its guards are evaluated here.
"""

import ast
import contextlib
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from mamba_ops.audit import _torch

_COMPILE_ID = re.compile(r"^(\d+/\d+)(?:_\d+)?: ")
_TENSOR = re.compile(r"^check_tensor\((.+?), \w+, DispatchKeySet\(.*?\), (torch\.\w+), device=\w+, (.*)\)$", re.DOTALL)
_LITERAL = re.compile(r"^([^=<>!]+) == (-?[\d.e+-]+|True|False|'[^']*')$")
_BEFORE = "a value from before the break"
_LONGEST = 40  # characters of a value

_CAUSES = [
    (r"size mismatch .*(expected [01], actual|actual [01]$)", "size-one"),
    (r"size mismatch", "size"),
    (r"stride mismatch", "strides"),
    (r"dtype mismatch", "dtype"),
    (r"rank mismatch", "rank"),
    (r"requires_grad mismatch", "requires-grad"),
    (r"device index mismatch|device mismatch", "device"),
    (r"dispatch key set mismatch", "dispatch-keys"),
    (r"expected type of|Tensor .*mismatch", "type"),
    (r"Duplicate tensor|check_no_aliasing|object_aliasing", "aliasing"),
    (r"2 <= |== 1\b.*size\(\)|0/1 specialization", "size-one"),
    (r"^[\w.\[\]']+\.size\(\)\[\d+\] == \d+$", "size-fixed"),
    (r"size\(\)\[|\.size\(|stride\(\)|\.shape\[", "size-again"),
    (r"___dict_contains|^list\(|keys\(\)", "keys"),
    (r"^len\(|^not \w", "length"),
    (r" is None| is not None|TYPE_MATCH|___check_type_id|type\(", "type"),
    (r"GRAD_MODE|grad_mode|autocast|torch_function|GLOBAL_STATE", "grad-mode"),
    (r"___check_obj_id|ID_MATCH| is ", "identity"),
    (r"^(?!___)\w+(\[[\w']+\])*\.[\w.\[\]']+ ==", "attribute"),
    (r" == ['\"]", "string"),
    (r" == (True|False)\b", "flag"),
    (r" == -?[\d.]", "number"),
    (r" == ", "constant"),
]
FOLLOWING = ("size", "size-one", "strides", "number")  # torch can make these dynamic: beside others they do not matter
_VALUES = ("size", "size-one", "size-fixed", "number", "constant", "string", "flag", "attribute")  # not a range
_PROPERTIES = {
    "dtype": ".dtype",
    "rank": ".dim()",
    "strides": ".stride()",
    "requires-grad": ".requires_grad",
    "device": ".device",
}


@dataclasses.dataclass(frozen=True)
class Guard:
    """A guard that failed.

    Attributes:
        cause: of the recompile, if it has no other; a name in `remedies.RULES`.
        subject: the argument, size or attribute that it is about.
        text: the guard, as torch words it.
        before, now: the value that the version was compiled for, and that of the call; "" if unknown.
        values: what the subject was in all versions, oldest first, and is in the call.
        source: torch's expression for the subject.
        version: the compile id of the version.
    """

    cause: str
    subject: str
    text: str
    before: str = ""
    now: str = ""
    source: str = ""
    version: str = ""
    values: tuple[str, ...] = ()

    @property
    def is_from_before_a_break(self) -> bool:
        """Whether the value is one that code after a break got from before it."""
        return _BEFORE in self.subject

    @property
    def name(self) -> str:
        """The subject, with the property of a tensor that has changed."""
        subject = f"({self.subject})" if self.subject == _BEFORE and self.cause in _PROPERTIES else self.subject
        return subject + _PROPERTIES.get(self.cause, "")

    def __str__(self) -> str:
        return f"{self.name}: {self.before} -> {self.now}" if self.before and self.now else self.text


def classify_guard(guard: str) -> str:
    """Return the cause of a recompile from the guard that failed."""
    return next((cause for pattern, cause in _CAUSES if re.search(pattern, guard)), "other-guard")


def classify_guard_of_optimizer(guard: str) -> str | None:
    """Return the cause of a recompile in torch.optim, where it is one of its own."""
    if "param_groups" in guard:
        return "hyperparameter"
    return "optimizer-state" if "self.state" in guard else None


def guard_subject(guard: str) -> str:
    """Return the argument or attribute that a guard is about."""
    return _from_before(_subject(guard))


def _from_before(subject: str) -> str:
    """Name what code after a break gets from before it: the values on Python's stack, as arguments."""
    return re.sub(r"^___stack\d*(.*)$", lambda of: f"({_BEFORE}){of[1]}" if of[1] else _BEFORE, subject)


def _subject(guard: str) -> str:
    if named := re.match(r"tensor '(.+?)' |expected type of '(.+?)' ", guard):
        dim = re.search(r"(?:size|stride) mismatch at index (\d+)", guard)
        name = named[1] or named[2]
        return name + (f".shape[{dim[1]}]" if dim and "size" in guard else "")
    if sized := re.search(r"([\w.\[\]']+)\.(?:size|stride)\(\)\[(\d+)\]", guard):
        return f"{sized[1]}.shape[{sized[2]}]"
    if found := re.match(r"(?:not )?___dict_contains\((.+), (.+)\)$", guard):
        return found[2]
    if names := re.search(r"Duplicate tensors? found: \[(.*)\]", guard):
        return names[1].replace('"', "")
    if state := re.match(r"GLOBAL_STATE changed: (\w+)", guard):
        return state[1]
    guard = re.sub(r"^not |^len\((.*?)\)", r"\1", guard)
    guard = re.sub(r"___check_\w+\((.+?),.*", r"\1", guard)
    return re.split(r" (?:==|is|!=|in|<=|>=)\b| [<>=!]=? ", guard)[0].strip() or guard


def failed_guards(reasons: Sequence[str], entries: Sequence[Any], frame: Any) -> list[Guard]:
    """Return the guards that failed of the version that fits a call best, the reason for the recompile first.

    Args:
        reasons: torch's, of each version one, the version last used first.
        entries: the versions.
        frame: the call; it has `f_code` and `f_locals`.
    """
    told = {found[1]: reason for reason in reasons if (found := _COMPILE_ID.match(reason))}
    versions = []
    for entry in entries:
        version = str(entry.compile_id)
        first = [_read(told[version], frame, version)] if version in told else []
        failed = list(_evaluate(entry, frame, version))
        known = {guard.subject: guard for guard in failed}
        first = [known.get(guard.subject, guard) for guard in first]
        versions.append(list(dict.fromkeys([*first, *failed])))
    versions = [guards for guards in versions if guards] or [[_read(reason, frame, "")] for reason in reasons]
    best = min(versions, key=lambda guards: (len(guards), _preference(guards[0].cause)))
    oldest_first = sorted((guard for guards in versions for guard in guards), key=lambda guard: _number(guard.version))
    complete = [
        dataclasses.replace(guard, values=_values(guard, [old for old in oldest_first if old.subject == guard.subject]))
        for guard in best
    ]
    return sorted(complete, key=lambda guard: guard.cause in FOLLOWING)


def _preference(cause: str) -> int:
    """Rank versions that fit a call equally well: a version that takes other sizes already comes first."""
    return 0 if cause in ("size-again", "size-one") else 1 if cause in FOLLOWING else 2


def _values(guard: Guard, olds: Sequence[Guard]) -> tuple[str, ...]:
    alike = [old for old in olds if old.cause == guard.cause or {old.cause, guard.cause} <= set(_VALUES)]
    seen = [old.before for old in alike if old.before]
    return tuple(dict.fromkeys([*seen, guard.now])) if guard.before and guard.now else ()


def _number(version: str) -> int:
    return int(version.rpartition("/")[2] or 0)


def guard_text(reason: str) -> str:
    """Return the guard that failed, as an expression, from torch's text of it."""
    text = re.split(r"\s+# |\n", _COMPILE_ID.sub("", reason))[0].strip()
    return re.sub(r"\bkwargs\['(\w+)'\]", r"\1", text)


def _read(reason: str, frame: Any, version: str) -> Guard:
    """Return a guard from torch's text."""
    text = guard_text(reason)
    before = re.search(r"expected (.+?), actual (.+)", text)
    values = (before[1], before[2]) if before else ("", "")
    cause = classify_guard(text)
    sized = re.search(r"([\w.]+)\.size\(\)\[(\d+)\]", text)
    if cause == "size-one" and sized and isinstance(tensor := frame.f_locals.get(sized[1]), Tensor):
        now = int(tensor.shape[int(sized[2])])
        cause, values = (
            "size-again" if now > 1 else cause,
            (_needs(text), str(now)),
        )  # beyond the other end of the range
    elif cause == "requires-grad" and (expected := re.search(r"expected requires_grad=(\d)", text)):
        values = (str(expected[1] == "1"), str(expected[1] != "1"))
    elif cause == "dispatch-keys" and before:
        values = (_keys(before[1], before[2]), _keys(before[2], before[1]))
    elif cause == "type" and (found := re.search(r"but found <class '([\w.]+)'>", text)):
        values = ("a tensor", found[1])
    return Guard(_in_call(cause, guard_subject(text), frame), guard_subject(text), text, *values, version=version)


def _keys(these: str, others: str) -> str:
    """Return the dispatch keys that the other set does not have."""
    found, rest = (set(re.findall(r"\w+", keys)) - {"DispatchKeySet"} for keys in (these, others))
    return "+".join(sorted(found - rest)) or "the rest"


def _in_call(cause: str, subject: str, frame: Any) -> str:
    """Return "keywords" for a guard on the dict of a call's keyword arguments."""
    code = frame.f_code
    if cause in ("keys", "length") and code.co_flags & inspect.CO_VARKEYWORDS:
        at = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
        return "keywords" if code.co_varnames[at] == subject else cause
    return cause


def _evaluate(entry: Any, frame: Any, version: str) -> Iterator[Guard]:
    """Return the guards of a version that fail for a call, as far as they can be evaluated in Python."""
    parts, names = _torch.guard_parts(entry)
    scope = {**names, "L": frame.f_locals}

    def value_of(source: str) -> Any:
        return eval(source, scope)

    for part in parts:
        with contextlib.suppress(Exception):  # not every guard is an expression, and not every value can be read
            if matched := _TENSOR.match(part):
                yield from _tensor(matched, value_of(matched[1]), version)
            elif typed := re.match(r"(___check_(type|obj)_id\((.+), \d+\)), type=<class '([\w.]+)'>", part):
                if value_of(typed[1]) is False:
                    yield _replaced(typed[3], value_of(typed[3]), typed[4].rpartition(".")[2], typed[2], version)
            elif (literal := _LITERAL.match(part)) and type(value := value_of(literal[1])) is not _type_of(literal[2]):
                yield _made("type", literal[1], part, literal[2], _shown(value), version)
            elif value_of(part) is False:
                yield _compared(part, value_of, frame, version)


def _type_of(literal: str) -> type:
    return type(ast.literal_eval(literal))


def _replaced(source: str, value: Any, before: str, by: str, version: str) -> Guard:
    """Return a guard on the type or the identity of an object."""
    if by == "type":
        return _made("type", source, f"type of {_pretty(source)}", before, type(value).__name__, version)
    text = f"{_pretty(source)} is another object: now {_shown(value)}"
    return _made("identity", source, text, "", "", version)


def _tensor(matched: re.Match[str], tensor: Any, version: str) -> Iterator[Guard]:
    """Return where a tensor differs from that of a version."""
    source, dtype, rest = matched.groups()
    if not isinstance(tensor, Tensor):
        yield _made("type", source, matched[0], "a tensor", type(tensor).__name__, version)
        return
    facts: Mapping[str, Any] = {  # requires_grad=False, size=[5, None], stride=[3, 1]
        name: ast.literal_eval(value) for name, value in re.findall(r"(\w+)=(\[.*?\]|\w+)", rest)
    }

    def differs(cause: str, before: Any, now: Any) -> Iterator[Guard]:
        if before != now:
            yield _made(cause, source, f"{cause} of {_pretty(source)}", str(before), str(now), version)

    yield from differs("dtype", dtype, str(tensor.dtype))
    yield from differs("requires-grad", facts["requires_grad"], tensor.requires_grad)
    sizes, strides = facts["size"], facts["stride"]
    if len(sizes) != tensor.dim():
        yield _made("rank", source, f"rank of {_pretty(source)}", str(len(sizes)), str(tensor.dim()), version)
        return
    changed = [dim for dim, size in enumerate(sizes) if size is not None and size != tensor.shape[dim]]
    for dim in changed:
        old, new = int(sizes[dim]), int(tensor.shape[dim])
        text = f"tensor '{_pretty(source)}' size mismatch at index {dim}. expected {old}, actual {new}"
        cause = "size-one" if min(old, new) < 2 else "size"
        yield _made(cause, f"{source}.size()[{dim}]", text, str(old), str(new), version)
    if not changed and any(a is not None and a != b for a, b in zip(strides, tensor.stride(), strict=True)):
        now = ", ".join(map(str, tensor.stride()))
        before = ", ".join("any" if stride is None else str(stride) for stride in strides)
        yield _made("strides", source, f"strides of {_pretty(source)}", f"({before})", f"({now})", version)


def _compared(part: str, value_of: Callable[[str], Any], frame: Any, version: str) -> Guard:
    """Return a guard that is an expression in Python."""
    text = _pretty(part)
    cause, subject = _in_call(classify_guard(text), guard_subject(text), frame), guard_subject(text)
    source, before, now = "", "", ""
    if compared := re.match(r"(?:not )?([^=<>!]+?) (?:==|is) (.+)$", part):
        source, before = compared[1], compared[2]
        now = _shown(value_of(source))
    if sized := re.search(r"([\w.\[\]']+\.size\(\)\[\d+\])", part):
        source = sized[1]
        now = str(value_of(source))
        before = before if cause == "size-fixed" else _needs(text)
        if cause == "size-one" and int(now) > 1:  # beyond the other end of the range
            cause = "size-again"
    elif cause in ("keys", "keywords", "length"):
        forms = r"^(?:not )?(?:len\((.+)\) == \d+|___dict_contains\(.+, (.+)\)|list\((.+?)\.keys.*)$"
        source = re.sub(forms, r"\1\2\3", part)
        source = source.removeprefix("not ")
        value = value_of(source)
        before = _contents(part, text)
        now = ", ".join(map(str, value)) or "none" if isinstance(value, dict) else f"{len(value)} long"
    return Guard(cause, subject, text, before, now, source, version)


def _needs(text: str) -> str:
    """Return what a version needs of sizes, as its user would write it."""
    text = re.sub(
        r"\.(size|stride)\(\)\[(\d+)\]", lambda of: f".{'shape' if of[1] == 'size' else 'stride()'}[{of[2]}]", text
    )
    return f"needs {text}"


def _contents(part: str, text: str) -> str:
    """Return what a guard on a list or dict expects of it."""
    if length := re.search(r"^len\(.+\) == (\d+)$", part):
        return f"{length[1]} long"
    if held := re.match(r"(not )?___dict_contains\('(.+?)'", part):
        return f"no {held[2]}" if held[1] else str(held[2])
    return "empty" if part.startswith("not ") else text


def _made(cause: str, source: str, text: str, before: str, now: str, version: str) -> Guard:
    subject = _from_before(re.sub(r"\.size\(\)\[(\d+)\]$", r".shape[\1]", _pretty(source)))
    return Guard(cause, subject, text, _cut(before), _cut(now), source, version)


def _shown(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else _cut(repr(value))


def _cut(text: str) -> str:
    text = text.removeprefix("torch.")
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _pretty(source: str) -> str:
    """Return torch's expression for a value as its user would write it."""
    source = re.sub(r"\b[LG]\[\s*['\"](.*?)['\"]\s*\]", r"\1", source)
    source = re.sub(r"\._(?:modules|parameters|buffers)\['(\d+)'\]", r"[\1]", source)
    source = re.sub(r"\._(?:modules|parameters|buffers)\['(\w+)'\]", r".\1", source)
    return re.sub(r"\bkwargs\['(\w+)'\]", r"\1", source)
