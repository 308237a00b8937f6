"""Which prefixes are cached: a tree of full blocks, found by their contents.

A child is looked up by the tokens of one block, so a path from the root spells a prefix.  The
dictionary hashes the tokens and then compares them, and the parent stands for all that came
before: a chained content hash in which no collision can go unnoticed.  Groups share the tree;
a node says for each group which block holds its keys and values, if any does.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyllmlite_plugins.cache.plan import Kept


class Node:
    """One full block of tokens behind the tokens of its parents.

    Attributes:
        blocks: Per group the block that holds the keys and values, -1: none.
        owner: Id of the sequence that is computing it, or None.
        uses: Children, blocks, owner and sequences that stand on it; at 0 the node goes.
    """

    __slots__ = ("blocks", "children", "key", "owner", "parent", "uses")

    def __init__(self, parent: Node | None, key: tuple[int, ...] | int, num_groups: int) -> None:
        self.parent = parent
        self.key = key
        self.children: dict[tuple[int, ...], Node] = {}
        self.blocks = [-1] * num_groups
        self.owner: int | None = None
        self.uses = 0


class PrefixTree:
    """The cached and the in-flight prefixes, a root for each salt."""

    def __init__(self, block_size: int, kept: Sequence[Kept]) -> None:
        """``kept``: what each group keeps of a sequence."""
        self._block_size = block_size
        self._kept = list(kept)
        self._roots: dict[int, Node] = {}

    # -- growing and shrinking ---------------------------------------------------------------
    def root(self, salt: int) -> Node:
        """Where the sequences of this salt begin; to be used at once (see :meth:`use`)."""
        root = self._roots.get(salt)
        if root is None:
            root = self._roots[salt] = Node(None, salt, len(self._kept))
        return root

    def child(self, node: Node, tokens: tuple[int, ...]) -> Node:
        """The node behind ``node`` with these tokens, made if there is none; to be used at
        once."""
        child = node.children.get(tokens)
        if child is None:
            child = node.children[tokens] = Node(node, tokens, len(self._kept))
            node.uses += 1
        return child

    def use(self, node: Node) -> None:
        node.uses += 1

    def leave(self, node: Node) -> None:
        """One use fewer; nodes without use go, upwards."""
        node.uses -= 1
        while node.uses == 0:
            parent = node.parent
            if parent is None:
                del self._roots[node.key]  # type: ignore[arg-type]
                return
            del parent.children[node.key]  # type: ignore[arg-type]
            parent.uses -= 1
            node = parent

    def attach(self, node: Node, group: int, block: int) -> None:
        """The block's contents are this node's."""
        node.blocks[group] = block
        node.uses += 1

    def detach(self, node: Node, group: int) -> None:
        node.blocks[group] = -1
        self.leave(node)

    # -- finding -----------------------------------------------------------------------------
    def match(self, token_ids: Sequence[int], salt: int) -> tuple[list[Node], int]:
        """The longest usable prefix of ``token_ids``, and how much longer it will soon be.

        A prefix of d blocks is usable if each group has what the next token sees of it: a
        group without a window all d blocks, one with a window those that the window of the
        token behind them touches, and those of its sinks.  At least one token is left to run.

        Returns:
            The nodes of the usable prefix, and how many blocks behind it another sequence is
            computing just now.
        """
        size = self._block_size
        node = self._roots.get(salt)
        path: list[Node] = []
        if node is None:
            return path, 0
        usable = 0
        runs = [0] * len(self._kept)  # per group: consecutive blocks present, up to here
        sinking = [True] * len(self._kept)  # per group: no block of the sinks is missing
        for start in range(0, len(token_ids) - size, size):
            node = node.children.get(tuple(token_ids[start : start + size]))
            if node is None:
                break
            path.append(node)
            depth = len(path)
            good = True
            for group, (window, sinks) in enumerate(self._kept):
                present = node.blocks[group] >= 0
                runs[group] = runs[group] + 1 if present else 0
                sinking[group] &= present or depth > sinks
                first = 0 if window is None else max(0, depth * size - window + 1) // size
                good = good and runs[group] >= depth - first and sinking[group]
            if good:
                usable = depth
        in_flight = 0
        for depth in range(usable, len(path)):
            if path[depth].owner is not None:
                in_flight = depth + 1 - usable
            elif min(path[depth].blocks) < 0:
                break  # evicted: what is computed behind it is out of reach
        return path[:usable], in_flight

    def nodes(self) -> list[Node]:
        """All nodes, for the integrity check."""
        found = list(self._roots.values())
        for node in found:
            found.extend(node.children.values())
        return found
