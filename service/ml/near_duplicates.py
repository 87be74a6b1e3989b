"""Texts of different parts that are nearly equal: all pairs, exactly, by their shared character shingles."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from service.ml.findings import fold

SHINGLE_CHARS = 5
# One word of a ten-word sentence changed leaves about 0.7 of the shingles of both in common.
THRESHOLD = 0.7
_SHARED = 4  # rare shingles two texts must share to be compared; more of them, fewer comparisons
_CHUNK = 5_000_000
_MAX_COMPARED = 200_000_000  # shingles, some ten seconds: a file of one template repeated has N² near-duplicates
_MAX_FOUND = 2_000_000  # pairs, 350 MB at the peak: one word repeated has N² too, and hardly a shingle to compare


@dataclass(frozen=True)
class Pairs:
    """P pairs of rows, of which the first stands in the earlier part; the most similar come first.

    Args:
        first: `(P,)` positions.
        second: `(P,)` positions.
        similarity: `(P,)`, Jaccard, `THRESHOLD` to 1.
        complete: False where the search was cut short.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    similarity: NDArray[np.float64]
    complete: bool


def pairs_across(
    texts: Sequence[str], parts: NDArray[np.int64], max_compared: int = _MAX_COMPARED, max_found: int = _MAX_FOUND
) -> Pairs:
    """Every pair of texts of different parts whose shingles have a Jaccard similarity of `THRESHOLD` or more.

    Shingles are the runs of `SHINGLE_CHARS` characters of a text with case and white space folded. Where two texts
    reach the threshold, their rarest ones are shared: only pairs that share `_SHARED` of those are compared.

    Args:
        texts: N texts, at least one.
        parts: `(N,)` 0, 1 or 2.
        max_compared: Shingles to compare before the search is cut short.
        max_found: Pairs to find before it is.

    Source: prefix filtering, Chaudhuri et al. 2006 and Bayardo et al. 2007; several shared ones, Wang et al. 2012.
    """
    shingles = _shingles([fold(text) for text in texts])
    size = np.diff(shingles.indptr).astype(np.int64)
    found: list[tuple[Any, ...]] = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    compared = n_found = 0
    complete = True
    for first, second in _candidates(shingles, size, parts):
        shared = shingles[first].multiply(shingles[second]).sum(axis=1)
        similarity = shared / (size[first] + size[second] - shared)
        near = similarity >= THRESHOLD
        found.append((first[near], second[near], similarity[near]))
        compared += int(size[first].sum())
        n_found += int(near.sum())
        if compared > max_compared or n_found > max_found:
            complete = False
            break
    first, second, similarity = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((second, first, -similarity))
    return Pairs(first[order], second[order], similarity[order], complete)


def _shingles(texts: Sequence[str]) -> Any:
    """`(N, V)` CSR of ones. Columns go from rare to frequent, so each row's indices, ascending, begin with its rarest.

    A text shorter than a shingle is one shingle, filled up with spaces.
    """
    padded = [text.ljust(SHINGLE_CHARS) for text in texts]
    length = np.array([len(text) for text in padded], dtype=np.int64)
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    n = len(codes) - SHINGLE_CHARS + 1
    # A polynomial modulo 2^64: ten million different shingles collide with a chance of about 3e-6.
    hashes = np.zeros(n, dtype=np.uint64)
    for i in range(SHINGLE_CHARS):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[i : n + i]
    row = np.repeat(np.arange(len(texts)), length)[:n]
    inside = np.arange(n) <= (np.cumsum(length) - SHINGLE_CHARS)[row]
    _, column, counts = np.unique(hashes[inside], return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), dtype=np.int32)
    rank[np.argsort(counts, kind="stable")] = np.arange(len(counts), dtype=np.int32)
    ones = np.ones(len(column), dtype=np.int32)
    matrix: Any = sparse.csr_array((ones, (row[inside], rank[column])), shape=(len(texts), len(counts)))
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def _candidates(
    shingles: Any, size: NDArray[np.int64], parts: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs that may be near, some at a time; every pair that is near is among them.

    Texts with `least` shingles in common share at least k among the first `size - least + k` of each, in whatever
    order both are put, for k up to `least`.
    """
    least = np.ceil(THRESHOLD * size - 1e-9).astype(np.int64)
    row = np.repeat(np.arange(len(size)), size)
    is_prefix = np.arange(len(row)) - shingles.indptr[row] < (size - least + _SHARED)[row]
    prefixes: Any = sparse.csr_array((shingles.data[is_prefix], (row[is_prefix], shingles.indices[is_prefix])),
                                     shape=shingles.shape)  # fmt: skip
    for part in (2, 1):
        earlier, later = np.flatnonzero(parts < part), np.flatnonzero(parts == part)
        columns = prefixes[earlier].T.tocsr()
        step = max(1, _CHUNK // max(1, len(earlier)))
        for start in range(0, len(later), step):
            product = (prefixes[later[start : start + step]] @ columns).tocoo()
            first, second = earlier[product.col], later[start + product.row]
            smaller = np.minimum(size[first], size[second])
            enough = product.data >= np.minimum(_SHARED, np.minimum(least[first], least[second]))
            may_be_near = enough & (smaller >= THRESHOLD * np.maximum(size[first], size[second]))
            first, second = first[may_be_near], second[may_be_near]
            n_slices = -(-max(int(size[first].sum()), 5 * len(first)) // _CHUNK)  # a million pairs each at most
            if n_slices:
                yield from zip(np.array_split(first, n_slices), np.array_split(second, n_slices), strict=True)
