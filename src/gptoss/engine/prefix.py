"""What was computed before: slots that hold prefixes, in a radix tree over their tokens.

Every sequence that ends leaves its slot here; so does every boundary a request names, as a fork.
A later prompt continues the longest prefix it shares. A sliding layer keeps its window only, so a
long sequence cannot serve a prompt that leaves it in the middle: the boundaries are there for that.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from gptoss.backends.protocol import Cache
from gptoss.backends.rows import Made, load_row, save_row
from gptoss.errors import CacheFull, CacheMiss


class Node:
    """The tokens of ``edge`` behind those of its parent; ``depth`` counts both."""

    __slots__ = ("children", "depth", "edge", "parent", "slot", "stays")

    def __init__(self, parent: "Node | None", edge: tuple[int, ...]) -> None:
        self.parent, self.edge = parent, edge
        self.depth: int = len(edge) + (parent.depth if parent else 0)
        self.children: dict[int, Node] = {}  # by first token
        self.slot: int | None = None  # holds exactly these tokens
        self.stays = False  # a boundary: who continues here takes a copy

    def slots(self) -> Iterator["Node"]:
        """Itself and all below that have a slot, shorter ones first on each branch."""
        stack = [self]
        while stack:
            node = stack.pop()
            if node.slot is not None:
                yield node
            stack += node.children.values()


class Prefixes:
    """Least recently used first out. Invariant: every leaf but the root has a slot."""

    def __init__(self, cache: Cache) -> None:
        self.cache, self.root = cache, Node(None, ())
        self.used: dict[Node, None] = {}  # nodes with a slot, least recently used first
        self.tokens = 0  # that these hold, shared ones counted each time

    def __len__(self) -> int:
        return len(self.used)

    def take(self, tokens: Sequence[int]) -> tuple[int, int] | None:
        """A slot that holds as many of the first tokens as possible, and how many; or None.

        The slot is the caller's.
        """
        shared, node = self._walk(tokens)
        above: Node | None = node
        while above is not None:
            if shared and (found := min(above.slots(), key=lambda n: n.depth, default=None)):
                slot = self._continue(found, min(shared, found.depth))
                if slot is not None:
                    self._touch(above)
                    return slot, min(shared, found.depth)
            above = above.parent
            shared = min(shared, above.depth if above else 0)
        return None

    def add(self, tokens: Sequence[int], slot: int, *, stays: bool = False) -> None:
        """Give a slot whose first tokens are ``tokens``; of two alike the older one stays."""
        try:
            self.cache.truncate(slot, len(tokens))  # gives back what was reserved beyond
        except CacheMiss:
            return self.cache.close(slot)
        node = self._place(tokens)
        if node.slot is None:
            node.slot = slot
            self.tokens += node.depth
        else:
            self.cache.close(slot)
        node.stays |= stays
        self._touch(node)

    def copy(self, tokens: Sequence[int], slot: int) -> None:
        """Remember the first ``tokens`` of a slot that holds more, if that can be done."""
        shared, node = self._walk(tokens)
        if shared == len(tokens) == node.depth and node.slot is not None:
            node.stays = True
            return self._touch(node)
        while True:
            try:
                return self.add(tokens, self.cache.fork(slot, len(tokens)), stays=True)
            except CacheMiss:
                return None
            except CacheFull:
                if not self.evict():
                    return None

    def evict(self, spare: Node | None = None) -> bool:
        """Forget the prefix that was not used for the longest time. False: there is none."""
        victim = next((node for node in self.used if node is not spare), None)
        if victim is not None:
            self.cache.close(self._remove(victim))
        return victim is not None

    def clear(self) -> None:
        """Forget all."""
        while self.evict():
            pass

    def save(self, tokens: Sequence[int], path: Path, made: Made) -> int:
        """Write the longest known beginning of ``tokens`` -> its length; 0: nothing is written.

        Raises GptOssError if it cannot be written.
        """
        if (found := self.take(tokens)) is None:
            return 0
        slot, length = found
        try:
            save_row(self.cache, slot, tokens[:length], path, made)
        finally:
            self.add(tokens[:length], slot, stays=True)
        return length

    def load(self, path: Path, made: Made) -> int:
        """Know what ``save`` wrote -> how many tokens. Raises CheckpointError, CacheFull."""
        slot, tokens = load_row(self.cache, path, made)
        self.add(tokens, slot, stays=True)
        return len(tokens)

    def _continue(self, node: Node, length: int) -> int | None:
        """A slot with the first ``length`` tokens of a node's; None: its window is gone.

        It is the node's own where a conversation goes on at its end, and where there is no room.
        """
        assert node.slot is not None
        try:
            while node.stays or length < node.depth:
                try:
                    return self.cache.fork(node.slot, length)
                except CacheFull:
                    if not self.evict(spare=node):
                        break
            self.cache.truncate(node.slot, length)
        except CacheMiss:
            return None
        return self._remove(node)

    def _walk(self, tokens: Sequence[int]) -> tuple[int, Node]:
        """How many first tokens the tree knows, and the node on whose edge that ends."""
        node, at = self.root, 0
        while at < len(tokens) and (child := node.children.get(tokens[at])) is not None:
            n = common(child.edge, tokens[at : at + len(child.edge)])
            node, at = child, at + n
            if n < len(child.edge):
                break
        return at, node

    def _place(self, tokens: Sequence[int]) -> Node:
        """The node of exactly ``tokens``, made if need be."""
        shared, node = self._walk(tokens)
        if shared < node.depth:
            node = self._split(node, shared)
        if shared < len(tokens):
            rest = tuple(tokens[shared:])
            node.children[rest[0]] = node = Node(node, rest)
        return node

    def _split(self, node: Node, depth: int) -> Node:
        """A node in the middle of another's edge."""
        assert node.parent is not None
        n = depth - node.parent.depth
        upper = Node(node.parent, node.edge[:n])
        node.parent.children[node.edge[0]] = upper
        node.parent, node.edge = upper, node.edge[n:]
        upper.children[node.edge[0]] = node
        return upper

    def _remove(self, node: Node) -> int:
        """Take a node's slot out, and what is left without purpose."""
        slot, node.slot, node.stays = node.slot, None, False
        assert slot is not None
        del self.used[node]
        self.tokens -= node.depth
        while node.parent is not None and node.slot is None and len(node.children) < 2:
            parent = node.parent
            if node.children:
                [child] = node.children.values()
                child.parent, child.edge = parent, node.edge + child.edge
                parent.children[node.edge[0]] = child
            else:
                del parent.children[node.edge[0]]
            node = parent
        return slot

    def _touch(self, node: Node | None) -> None:
        """A prefix that is continued was used as well, and more recently than what continues it."""
        while node is not None:
            if node in self.used:
                del self.used[node]
                self.used[node] = None
            elif node.slot is not None:
                self.used[node] = None
            node = node.parent


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens ``a`` and ``b`` begin with together."""
    n = min(len(a), len(b))
    if tuple(a[:n]) == tuple(b[:n]):  # the usual case, at the speed of a memory comparison
        return n
    return next(i for i in range(n) if a[i] != b[i])
