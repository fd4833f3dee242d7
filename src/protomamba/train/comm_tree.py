"""The order in which the gradients of a step's shards are added: one binary tree, whichever rank computes which leaf.

    level 0: the leaves 0 .. count - 1      level k + 1: pairs (0, 1), (2, 3), ... of level k; a lone one is carried up

A node is named by the leaves below it, (start, stop). Floating-point sums depend on their order: with the order fixed
by `count` alone, a sum has the same bits on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")
Node = tuple[int, int]


def share(count: int, parts: int, index: int) -> range:
    """The items that part `index` of `parts` gets of `count` in order: sizes as numpy.array_split's."""
    size, larger = divmod(count, parts)
    start = index * size + min(index, larger)
    return range(start, start + size + (index < larger))


def children(node: Node) -> tuple[Node, Node]:
    """The two nodes that are added to make `node`, which has more than one leaf."""
    start, stop = node
    half = 1 << ((stop - start - 1).bit_length() - 1)
    return (start, start + half), (start + half, stop)


def nodes(leaves: range, count: int) -> list[Node]:
    """The fewest nodes of the tree over `count` leaves that cover a run of them, in order."""

    def inside(node: Node) -> Iterator[Node]:
        start, stop = node
        if leaves.start <= start and stop <= leaves.stop:
            yield node
        elif start < leaves.stop and leaves.start < stop:
            for child in children(node):
                yield from inside(child)

    return list(inside((0, count))) if leaves else []


def fold(parts: Mapping[Node, T], count: int, add: Callable[[T, T], T]) -> T:
    """The root's value from those of nodes that cover all leaves."""
    return _value(parts, (0, count), add)


def _value(parts: Mapping[Node, T], node: Node, add: Callable[[T, T], T]) -> T:
    # A function that calls itself by a name of its own scope would keep `parts` until the garbage collector comes.
    if node in parts:
        return parts[node]
    left, right = children(node)
    return add(_value(parts, left, add), _value(parts, right, add))


class Partials(Generic[T]):
    """Adds the values of a run of leaves, handed in one after another, as far as the tree allows without the others."""

    def __init__(self, leaves: range, count: int, add: Callable[[T, T], T]) -> None:
        self.leaves, self._add = leaves, add
        self._final = set(nodes(leaves, count))
        self._count = count
        self._open: list[tuple[Node, T]] = []
        self.done: dict[Node, T] = {}
        self.next = leaves.start

    def push(self, value: T) -> dict[Node, T]:
        """Take the value of leaf `next`; the nodes, none or one, that the other ranks now wait for."""
        self._open.append(((self.next, self.next + 1), value))
        self.next += 1
        while len(self._open) > 1 and self._is_node((self._open[-2][0][0], self.next)):
            (_, right), (left_node, left) = self._open.pop(), self._open.pop()
            self._open.append(((left_node[0], self.next), self._add(left, right)))
        if self._open[-1][0] not in self._final:
            return {}
        fresh = dict([self._open.pop()])
        self.done |= fresh
        return fresh

    def _is_node(self, node: Node) -> bool:
        """Whether the tree has it, and none of its parents is wholly within this run (then it is still to come)."""
        start, stop = node
        size = 1 << (stop - start - 1).bit_length()
        return start % size == 0 and stop == min(start + size, self._count)
