"""Joining what block borders cut: objects of neighbouring blocks that are the same in the pixels that both see."""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

MIN_COVERAGE = 0.5


def matching_objects(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Find the objects that are the same in two label images of the same pixels.

    Two objects match if each overlaps with no other one more, and if they share at least half of the smaller one.

    Args:
        a: Labels (Y, X), integers, 0 is background.
        b: Labels of the same shape.

    Returns:
        Pairs of ids (N, 2), int64.
    """
    inside = (a > 0) & (b > 0)
    if not inside.any():
        return np.zeros((0, 2), dtype=np.int64)
    pairs, overlap = np.unique(np.stack([a[inside], b[inside]]).astype(np.int64), axis=1, return_counts=True)
    of_a, of_b = pairs
    size_a, size_b = np.bincount(a.ravel()), np.bincount(b.ravel())
    best_a, best_b = np.zeros(len(size_a), dtype=np.int64), np.zeros(len(size_b), dtype=np.int64)
    np.maximum.at(best_a, of_a, overlap)
    np.maximum.at(best_b, of_b, overlap)
    is_best = (overlap == best_a[of_a]) & (overlap == best_b[of_b])
    covers = overlap >= MIN_COVERAGE * np.minimum(size_a[of_a], size_b[of_b])
    return pairs[:, is_best & covers].T


def joined_ids(
    counts: np.ndarray, inner: list[np.ndarray], matches: list[tuple[int, int, np.ndarray]]
) -> list[np.ndarray]:
    """Give objects that match, directly or through others, one id.

    Args:
        counts: Number of objects in each block, which are counted from 1 there.
        inner: The ids of each block that reach into its inner part. What only lies in halos gets no id.
        matches: Two blocks (their places in `counts`) and the pairs of ids (N, 2) that match, see `matching_objects`.

    Returns:
        For each block the final id of each of its ids, `final[0]` = 0. Ids are consecutive from 1 in the order of
        blocks and ids; 0 for objects of which nothing lies in an inner part.
    """
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    edges = [pairs - 1 + first[[a, b]] for a, b, pairs in matches]
    rows, columns = np.concatenate([np.zeros((0, 2), dtype=np.int64), *edges]).T
    n = int(first[-1])
    graph = coo_array((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(n, n))
    groups = connected_components(graph, directed=False)[1] if n else np.zeros(0, dtype=np.int64)
    is_inner = np.zeros(n, dtype=bool)
    for start, ids in zip(first, inner):
        is_inner[ids - 1 + start] = True
    shown, starts = np.unique(np.where(is_inner, groups, -1), return_index=True)
    shown, starts = shown[shown >= 0], starts[shown >= 0]
    rank = np.zeros(n, dtype=np.uint64)
    rank[shown[np.argsort(starts)]] = np.arange(1, len(shown) + 1)
    final = rank[groups]
    zero = np.zeros(1, dtype=np.uint64)
    return [np.concatenate([zero, final[start:stop]]) for start, stop in zip(first[:-1], first[1:])]
