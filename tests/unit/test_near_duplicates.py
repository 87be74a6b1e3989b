import itertools
import re
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.ml.findings import fold
from service.ml.near_duplicates import SHINGLE_CHARS, THRESHOLD, pairs_across
from tests.tiny import labelled_texts


def shingles(text):
    text = fold(text).ljust(SHINGLE_CHARS)
    return {text[i : i + SHINGLE_CHARS] for i in range(len(text) - SHINGLE_CHARS + 1)}


def by_brute_force(texts, parts):
    """Every pair of different parts with its Jaccard similarity, by Python's own sets."""
    sets, found = [shingles(text) for text in texts], {}
    for a, b in itertools.combinations(range(len(texts)), 2):
        if parts[a] != parts[b]:
            similarity = len(sets[a] & sets[b]) / len(sets[a] | sets[b])
            if similarity >= THRESHOLD:
                found[(a, b) if parts[a] < parts[b] else (b, a)] = similarity
    return found


def as_found(texts, parts, **given):
    pairs = pairs_across(texts, np.array(parts, dtype=np.int64), **given)
    found = zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)
    return dict(zip(found, pairs.similarity.tolist(), strict=True)), pairs


def with_a_typo(text, rng):
    at = rng.integers(len(text))
    return text[:at] + rng.choice(list(string.ascii_lowercase)) + text[at + 1 :]


def with_other_punctuation(text, rng):
    return re.sub(r"$", rng.choice(["!", "?", " ...", "!!"]), text.upper()).replace(" ", "  ", 1)


def with_one_word_changed(text, rng):
    words = text.split()
    words[rng.integers(len(words))] = rng.choice(["something", "else", "of", "the"])
    return " ".join(words)


def test_planted_typos_punctuation_and_changed_words_are_found_exactly_as_by_brute_force():
    rng = np.random.default_rng(3)
    halves = labelled_texts(400, seed=5)[0]
    originals = [f"{a} and {b}" for a, b in zip(halves[::2], halves[1::2], strict=True)]
    changes = (with_a_typo, with_other_punctuation, with_one_word_changed)
    planted = [change(text, rng) for change in changes for text in originals]
    texts, parts = originals + planted, [0] * len(originals) + [1 + i % 2 for i in range(len(planted))]
    found, pairs = as_found(texts, parts)
    assert found == pytest.approx(by_brute_force(texts, parts))
    assert pairs.complete
    assert pairs.similarity.tolist() == sorted(pairs.similarity.tolist(), reverse=True)
    recall = np.mean([(i % len(originals), len(originals) + i) in found for i in range(len(planted))])
    assert recall >= 0.95


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_short_odd_and_repeated_texts_are_compared_as_by_brute_force(data):
    word = st.sampled_from(["ab", "abc", "ß", "SS", "日本", "\U0001f600", "\ud800", "a", "b"])
    texts = data.draw(st.lists(st.lists(word, max_size=12).map(" ".join), min_size=1, max_size=25))
    parts = data.draw(st.lists(st.integers(0, 2), min_size=len(texts), max_size=len(texts)))
    assert as_found(texts, parts)[0] == pytest.approx(by_brute_force(texts, parts))


def test_a_file_of_one_template_repeated_is_cut_short_and_says_so():
    texts = [f"Your parcel number {i:04} is on its way and will be with you tomorrow." for i in range(2000)]
    parts = [0] * 1600 + [1] * 200 + [2] * 200
    found, pairs = as_found(texts, parts, max_compared=1_000_000)
    assert not pairs.complete
    assert 0 < len(found) < 1600 * 400
    assert min(found.values()) >= THRESHOLD


def test_one_word_repeated_is_cut_short_by_the_pairs_found_as_it_has_hardly_a_shingle_to_compare():
    found, pairs = as_found(["ok"] * 9_000, [0] * 6_000 + [1] * 3_000, max_found=100_000)
    assert not pairs.complete
    assert 100_000 < len(found) < 6_000 * 3_000 / 2
