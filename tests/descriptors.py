"""Where matrix units of a Hopper GPU read shared memory at wrong addresses: `python -m tests.descriptors DTYPE SIZES`.

A product of tiles in shared memory is told by a descriptor where a tile lies. Assemblers were seen to compile some of
these wrongly: the address came from a register that held something else, or nothing. Results were right by chance, or
the launch failed. Here the machine code is read: on every path to a product, the address must be made of the address
of shared memory, and of nothing else but where a thread stands among others, as each group of warps has its own rows;
of no argument of the kernel and nothing loaded.

Prints a line of JSON for each kernel and launch that has such products: the kernel's name, how many descriptors there
are, and where the code of the wrong ones lies. SIZES is JSON, and replaces sizes of `fitting.SIZES`.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

Taint = frozenset[str]
State = dict[str, Taint]
NOTHING: Taint = frozenset()
SHARED: Taint = frozenset({"shared"})
POSITION: Taint = frozenset({"position"})
WRITES_NO_REGISTER = (
    "ST BRA EXIT BAR WARP RED ISETP UISETP FSETP MEMBAR FENCE NOP HGMMA LDGSTS PLOP UPLOP BSSY BSYNC DEPBAR"
)
INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
LOCAL = re.compile(r"\[R1(?:\+0x([0-9a-f]+))?\]")


class Instruction(NamedTuple):
    """One line of machine code."""

    address: str
    predicate: str | None
    name: str
    operands: list[str]

    @property
    def width(self) -> int:
        """How many registers it writes, or stores."""
        return 4 if ".128" in self.name else 2 if ".64" in self.name or "WIDE" in self.name else 1

    @property
    def successors(self) -> tuple[bool, str | None]:
        """Whether the next instruction can follow, and the label that it can jump to."""
        if self.name.startswith("BRA"):
            conditional = self.predicate is not None or len(self.operands) > 1
            return conditional, re.findall(r"\.L_x_\d+", self.operands[-1])[0]
        return self.predicate is not None or not self.name.startswith(("EXIT", "RET")), None


def parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions of one function, and the index that each label names."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            operands = [operand.strip() for operand in found[4].split(",")]
            predicates = re.compile(r"!?U?P[T0-9]+$")
            kept = [operand for operand in operands if not predicates.match(operand)] if found[3] != "BRA" else operands
            instructions.append(Instruction(found[1], found[2], found[3], kept))
    return instructions, labels


def numbered(register: str, offset: int) -> str:
    """Return the name of a register some numbers on; RZ and URZ, which are zero, have none."""
    return re.sub(r"\d+$", lambda number: str(int(number[0]) + offset), register)


def after(instruction: Instruction, state: State) -> State:
    """Return what registers, and places on the stack, are made of after an instruction."""
    name, operands, width = instruction.name, instruction.operands, instruction.width
    if name.startswith("STL") and (place := LOCAL.match(operands[0])):
        start = int(place[1] or "0", 16)
        stored = {f"stack {start + 4 * i}": state.get(numbered(operands[1], i), NOTHING) for i in range(width)}
        return state | stored
    if name.startswith(tuple(WRITES_NO_REGISTER.split())) or not operands or not re.match(r"U?R\d", operands[0]):
        return state
    if name.startswith("LDL") and (place := LOCAL.match(operands[1])):
        start = int(place[1] or "0", 16)
        loaded = {numbered(operands[0], i): state.get(f"stack {start + 4 * i}", NOTHING) for i in range(width)}
        return state | loaded
    sources = ",".join(operands[1:])
    if name.startswith("LD"):
        made = frozenset({"memory"})
    elif name.startswith(("S2UR", "S2R")):
        made = SHARED if "CgaCtaId" in sources else POSITION
    else:
        made = frozenset({"argument"}) if "c[" in sources else NOTHING
        for register in re.findall(r"\bU?R\d+\b", sources):
            for i in range(2 if ".64" in name else 1):
                made |= state.get(numbered(register, i), NOTHING)
    written = {numbered(operands[0], i): made for i in range(width)}
    if instruction.predicate:
        written = {register: made | state.get(register, NOTHING) for register in written}
    return state | written


def wrong(sass: str) -> tuple[int, list[str]]:
    """Return how many descriptors one function has, and the addresses of products that have a wrong one."""
    instructions, labels = parse(sass)
    begins = sorted({0, *labels.values(), *(i + 1 for i, each in enumerate(instructions) if each.successors[1])})
    blocks = {begin: instructions[begin:end] for begin, end in itertools.pairwise([*begins, len(instructions)])}
    states: dict[int, State] = {0: {}}  # at the begin of each block
    work = [0]
    while work:
        begin = work.pop()
        state, block = states[begin], blocks.get(begin, [])
        for instruction in block:
            state = after(instruction, state)
        follows, label = block[-1].successors if block else (False, None)
        for successor in [begin + len(block)] * follows + ([] if label is None else [labels[label]]):
            before = states.get(successor)
            merged = state if before is None else before | {k: v | before.get(k, NOTHING) for k, v in state.items()}
            if merged != before:
                states[successor] = merged
                work.append(successor)
    found = [product for begin, state in states.items() for product in products(blocks.get(begin, []), state)]
    return len(found), sorted(address for address, is_right in found if not is_right)


def products(block: list[Instruction], state: State) -> Iterator[tuple[str, bool]]:
    """Yield each descriptor of a block's products: the address of the product, and whether it is right."""
    for instruction in block:
        if "GMMA" in instruction.name:
            [first] = re.findall(r"gdesc\[(UR\d+)\]", ",".join(instruction.operands))
            for offset in (2,) if re.match(r"R\d", instruction.operands[1]) else (0, 2):
                yield instruction.address, state.get(numbered(first, offset), NOTHING) - POSITION == SHARED
        state = after(instruction, state)


def functions(cubin: bytes) -> Iterator[str]:
    """Yield the machine code of each function, as NVIDIA's disassembler shows it."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        sass = subprocess.run([knobs.nvidia.nvdisasm.path, "-c", file], capture_output=True, text=True, check=True)
    yield from sass.stdout.split("\n.text.")[1:]


def main() -> None:
    """Print what is wrong in the kernels that the first samples of ops launch."""
    from tests.spills import compiled, launched

    dtype, sizes, *ops = sys.argv[1:]
    for kernel, variant in launched("sm_90", dtype, ops, json.loads(sizes), 2):
        for function in functions(compiled(variant.kernel, variant.asked)[0]):
            count, addresses = wrong(function)
            if count:
                print(json.dumps([kernel, count, addresses]), flush=True)  # noqa: T201


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported, which decides as it decorates
    main()
