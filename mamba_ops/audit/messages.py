"""What torch's message about a graph break says: what it is about, what can be done, and the address of its page."""

import re


def hints(message: str) -> tuple[str, ...]:
    """Return what torch says can be done about a graph break, each a sentence on one line."""
    told = message.partition("Developer debug context:")[0]
    found = re.findall(r"^\s*Hint: (.*?)(?=^\s*Hint: |\n\s*\n|\Z)", told, re.MULTILINE | re.DOTALL)
    return tuple(dict.fromkeys(" ".join(hint.split()) for hint in found))


def link(message: str) -> str | None:
    """Return the address of torch's page about a graph break, where its message has one."""
    found = re.search(r"please visit: (https://\S+)", message)
    return found[1] if found else None


def sentence(message: str) -> str:
    """Shorten torch's message to its heading and its explanation."""
    message = re.sub(r" at 0x[0-9a-f]+", "", message)  # addresses differ from run to run
    message = re.sub(r"\.pybind11_detail_\w+", "", message)  # the prefix of functions of pybind11
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    explained = [line.removeprefix("Explanation: ") for line in lines if line.startswith("Explanation: ")]
    heading = lines[0] if lines else ""
    return f"{heading}: {explained[0]}" if explained and explained[0] != "Explanation:" else heading


def subject_of(cause: str, message: str, source: str, called: str | None = None) -> str:
    """Return the function or op that a break is about; `called` is what the line calls where it broke."""
    if cause == "item" and called in ("bool", "complex", "float", "int"):
        return f"{called}()"
    patterns = {
        "item": r"call_method \S+ (item)\b",
        "dynamic-shape": r"`(aten\.\w+)",
        "no-fake": r"unsupported operator: ([\w:.]+)|`([\w:.]+)`",
        "disable": r"<(?:bound method|function) ([\w.]+)",
        "builtin": r"builtin `([\w.]+?)\.?`|builtin (?:operator )?`?([\w.]+)",
    }
    fallback = r"<built-in (?:method|function) (\w+)|<(?:function|bound method) ([\w.]+)|call_function ([\w.]+)"
    for pattern in (patterns.get(cause), fallback):
        if pattern and (found := re.search(pattern, message)):
            name = next(group for group in found.groups() if group)
            return f".{name}()" if cause in ("item", "tolist") else name
    if cause == "branch":
        return "if"
    if called:
        return called
    if entered := re.search(r"\bwith ([\w.]+)", source):
        return entered[1]
    first = re.search(r"([\w.]+)\(", source)
    return first[1] if first else cause
