"""The labels as paths of tokens: what may follow at each place, and where only one label is left."""

from collections.abc import Sequence

ROOT = 0


class LabelTrie:
    """K labels by their token ids; a label that is a prefix of another is told apart by an end token.

    Args:
        paths: K lists of token ids, as they would follow the prompt; all differ.
        ends: Tokens that end an answer.
    """

    def __init__(self, paths: Sequence[Sequence[int]], ends: Sequence[int]) -> None:
        self.ends = frozenset(ends)
        self.longest = max(map(len, paths))
        self._children: list[dict[int, int]] = [{}]
        self._ending: list[int | None] = [None]
        self._below: list[set[int]] = [set()]
        for label, path in enumerate(paths):
            node = ROOT
            self._below[node].add(label)
            for token in path:
                node = self._children[node].setdefault(token, len(self._children))
                if node == len(self._children):
                    self._children.append({})
                    self._ending.append(None)
                    self._below.append(set())
                self._below[node].add(label)
            self._ending[node] = label

    def allowed(self, node: int) -> list[int]:
        """The tokens that may follow, in rising order, as `argmax` breaks ties over a whole vocabulary."""
        ends = self.ends if self._ending[node] is not None else frozenset()
        return sorted({*self._children[node], *ends})

    def label(self, node: int, token: int) -> int | None:
        """The label that is settled by `token` at `node`; None where several are left."""
        if token not in self._children[node]:
            return self._ending[node]
        below = self._below[self._children[node][token]]
        return next(iter(below)) if len(below) == 1 else None

    def forced(self, node: int) -> tuple[list[int], int]:
        """The tokens that can only follow one another from `node`, and the node they lead to."""
        tokens: list[int] = []
        while self._ending[node] is None and len(self._children[node]) == 1:
            token, node = next(iter(self._children[node].items()))
            tokens.append(token)
        return tokens, node

    def step(self, node: int, token: int) -> tuple[list[int], int]:
        """`token` and those it forces, and the node they lead to."""
        forced, node_after = self.forced(self._children[node][token])
        return [token, *forced], node_after

    def allowed_after(self, generated: Sequence[int]) -> list[int]:
        """As `allowed`, by the path from the root; the end tokens alone once it has left the trie."""
        node, is_whole = self._walk(generated)
        return self.allowed(node) if is_whole else sorted(self.ends)

    def label_of(self, generated: Sequence[int]) -> int | None:
        """The label that a generated path spells, up to its end token."""
        return self._ending[self._walk(generated)[0]]

    def _walk(self, generated: Sequence[int]) -> tuple[int, bool]:
        """The node that a path leads to from the root, and whether it stayed in the trie to its end."""
        node = ROOT
        for token in generated:
            if token not in self._children[node]:
                return node, False
            node = self._children[node][token]
        return node, True
