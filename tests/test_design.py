"""docs/design.md says of the code what is so: its signatures, and the files of the registry."""

import inspect
import re

from mamba_ops.registry import ops
from tests.pages import ROOT

PAGE = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")


def signatures() -> dict[str, list[str]]:
    """The words between the parentheses of each front that section 5 shows."""
    block = PAGE[PAGE.index("\ncausal_conv1d(x, ") :].partition("\n```")[0]
    code = "\n".join(line.partition("#")[0] for line in block.splitlines())
    [plan] = re.findall(r"^<plan>: (.*)", code, re.MULTILINE)
    found = re.findall(r"^(\w+)\(([^()]*)\)", code.replace("<plan>", plan), re.MULTILINE)
    return {name: [word.strip() for word in words.split(",")] for name, words in found}


def words_of(signature: inspect.Signature) -> list[str]:
    """A signature as the page writes it: a keyword without a value defaults to None."""
    words: list[str] = []
    for p in signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        words.append(p.name if p.default is p.empty or p.default is None else f"{p.name}={p.default}")
    return words


def test_the_signatures_are_those_of_the_fronts() -> None:
    shown = signatures()
    fronts = {name: op for name, op in ops().items() if op.namespace == "mamba_ops" and not op.returns}
    assert shown.keys() == fronts.keys()
    for name, words in shown.items():
        stated = [word.removesuffix("=None") for word in words]
        found = words_of(fronts[name].__signature__)
        until = stated.index("...") if "..." in stated else None  # the rest is another op's
        assert stated[:until] == found[:until], name


def test_the_tree_has_every_file_of_the_registry() -> None:
    tree = PAGE[PAGE.index("\nregistry/") : PAGE.index("\nmamba_ops/\n")]
    named = set(re.findall(r"\w+\.py", tree))
    assert named == {path.name for path in (ROOT / "registry").glob("*.py")} - {"__init__.py"}
