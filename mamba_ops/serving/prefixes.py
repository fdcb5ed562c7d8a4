"""Which slots have the states after the beginnings of texts, for requests that begin alike."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from operator import index
from typing import Any

from mamba_ops.serving.pieces import is_number
from mamba_ops.serving.pools import StatePool


class PrefixCache:
    """Keeps states in slots of a pool, each after a whole number of blocks of tokens, and finds them again.

    In a step: `find` a source for each request that is new, ask `keep` where states of prompts go, give both to
    `Plan.of`, and after the step `commit`, or `discard` if it failed. What a step reads or writes is not evicted until
    then; else the states that were not used for longest go first.

    A state is of all layers. Tokens are compared by a hash of 32 bytes.

    Attributes:
        pool: where the states are.
        block_size: tokens of a block.
    """

    def __init__(self, pool: StatePool, block_size: int) -> None:
        if not isinstance(block_size, int) or isinstance(block_size, bool) or block_size < 1:
            raise ValueError(f"PrefixCache: block_size: got {block_size!r}, expected a whole number, 1 at least")
        self.pool, self.block_size = pool, block_size
        self._slots: OrderedDict[bytes, int] = OrderedDict()  # the latest used one last
        self._pending: dict[bytes, int] = {}
        self._pinned: set[bytes] = set()

    def __len__(self) -> int:
        """Return how many states can be found."""
        return len(self._slots)

    @property
    def slots(self) -> frozenset[int]:
        """The slots that it has in the pool."""
        return frozenset([*self._slots.values(), *self._pending.values()])

    def find(self, tokens: Sequence[int]) -> tuple[int, int | None]:
        """Return how many of a request's tokens a state is known after, and the slot of that; 0 and None: none.

        At least the last token is left to be read, so that there is an output to go on from.

        Raises:
            ValueError: a token is no whole number.
        """
        best: tuple[int, int | None] = 0, None
        found = b""
        for stop, key in self._keys(tokens, len(tokens) - 1):
            if key in self._slots:
                self._slots.move_to_end(key)
                best, found = (stop, self._slots[key]), key
        if best[1] is not None:
            self._pinned.add(found)
        return best

    def keep(self, tokens: Sequence[int], computed: int, stop: int, *, most: int) -> dict[int, int]:
        """Return slots for the states at ends of blocks after `computed` tokens, up to `stop`: an entry for `Plan.of`.

        Those that are known, or kept by another request of the step, are left out. There are fewer where no slot is
        free and nothing can be evicted, and no more than `most`, the last ones.

        Raises:
            ValueError: before a slot is taken: a token is no whole number, or a number is below 0 or beyond the tokens.
        """
        read = f"0 to the {len(tokens)} tokens"
        for name, number, last, expected in (
            ("computed", computed, len(tokens), read),
            ("stop", stop, len(tokens), read),
            ("most", most, float("inf"), "0 or more"),
        ):
            if not is_number(number) or not 0 <= index(number) <= last:
                raise ValueError(f"PrefixCache: {name}: got {number!r}, expected {expected}")
        found: dict[int, int] = {}
        keys = [(end, key) for end, key in self._keys(tokens, stop) if end > computed]
        for end, key in reversed(keys):
            if key in self._slots or key in self._pending:
                continue
            if len(found) == most or not (self.pool.num_free or self.evict()):
                break
            found[end] = self._pending[key] = self.pool.allocate()
        return found

    def commit(self) -> None:
        """Say that the step has run: what it kept can be found."""
        self._slots.update(self._pending)
        self._pending, self._pinned = {}, set()

    def discard(self) -> None:
        """Say that the step has failed: what it was to keep is not there."""
        for slot in self._pending.values():
            self.pool.free(slot)
        self._pending, self._pinned = {}, set()

    def allocate(self) -> int:
        """Return a slot for a request; evict a state where none is free.

        Raises:
            NoFreeSlot: there is none, and nothing to evict.
        """
        if not self.pool.num_free:
            self.evict()
        return self.pool.allocate()

    def evict(self) -> bool:
        """Free the slot of the state that was not used for longest; return whether there was one."""
        for key in self._slots:
            if key not in self._pinned:
                self.pool.free(self._slots.pop(key))
                return True
        return False

    def _keys(self, tokens: Sequence[int], stop: int) -> Iterator[tuple[int, bytes]]:
        """Yield the ends of whole blocks up to `stop`, and a hash of all tokens before each."""
        key = b""
        given: Any = tokens[: max(stop, 0)]
        try:  # the numbers of a tensor or an array are those of a list
            numbers = [index(token) for token in (given.tolist() if hasattr(given, "tolist") else given)]
        except TypeError:
            raise ValueError(f"PrefixCache: tokens: got {given[:8]!r}, expected whole numbers") from None
        for end in range(self.block_size, stop + 1, self.block_size):
            block = ",".join(map(str, numbers[end - self.block_size : end]))
            key = hashlib.blake2b(key + block.encode(), digest_size=32).digest()
            yield end, key
