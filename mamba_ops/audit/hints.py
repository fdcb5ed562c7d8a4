"""What torch's message about a graph break says can be done: its hints, and the address of its page."""

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
