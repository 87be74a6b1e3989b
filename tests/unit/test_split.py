import csv
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.ml.findings import fold
from service.ml.labels import LabelSet
from service.ml.split import PARTS, growing_order, split_as_given, split_rows, stratified_subset

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
WORDS = st.sampled_from(
    ["Card", "card", " card ", "CARD  lost", "card lost", "ß", "SS", "İ", "a", "A\t", "b", "c", "d", "é"]
)
SHARED = {"max_examples": 60, "deadline": None}


@st.composite
def labelled_rows(draw, most=60):
    """Texts that often fold to the same key, now and then with different labels."""
    texts = draw(st.lists(st.one_of(WORDS, st.text("xyz ", min_size=1, max_size=4)), min_size=1, max_size=most))
    return [(text, draw(st.integers(0, 4))) for text in texts]


@st.composite
def some_shares(draw):
    validation, test = draw(st.floats(0.05, 0.45)), draw(st.floats(0.05, 0.45))
    return {"train": 1 - validation - test, "validation": validation, "test": test}


def parts_of(rows, seed, shares=SHARES):
    texts, labels = [text for text, _ in rows], np.array([label for _, label in rows], dtype=np.int64)
    return split_rows(texts, labels, shares, seed)


def as_sets(rows, seed, shares=SHARES):
    split = parts_of(rows, seed, shares)
    return {part: Counter(rows[i] for i in split.part(part)) for part in PARTS}


@settings(**SHARED)
@given(labelled_rows(), st.integers(0, 2**32 - 1), st.randoms(use_true_random=False), some_shares())
def test_the_split_does_not_depend_on_row_order(rows, seed, rng, shares):
    before = as_sets(rows, seed, shares)
    rng.shuffle(rows)
    assert as_sets(rows, seed, shares) == before


@settings(**SHARED)
@given(labelled_rows(), st.integers(0, 2**32 - 1), some_shares())
def test_every_row_stands_in_exactly_one_part(rows, seed, shares):
    split = parts_of(rows, seed, shares)
    assert sorted(i for part in PARTS for i in split.part(part)) == list(range(len(rows)))
    assert all(list(split.part(part)) == sorted(split.part(part)) for part in PARTS)


@settings(**SHARED)
@given(labelled_rows(), st.integers(0, 2**32 - 1))
def test_texts_that_are_equal_once_folded_stand_in_one_part(rows, seed):
    split = parts_of(rows, seed)
    stands_in = defaultdict(set)
    for part in PARTS:
        for i in split.part(part):
            stands_in[fold(rows[i][0])].add(part)
    assert all(len(parts) == 1 for parts in stands_in.values())


@settings(**SHARED)
@given(st.dictionaries(st.text("abcdefgh", min_size=1, max_size=5), st.integers(0, 5), min_size=1),
       st.integers(0, 2**32 - 1), st.integers(1, 3), some_shares())  # fmt: skip
def test_a_label_with_three_different_texts_stands_in_every_part(label_of, seed, copies, shares):
    rows = [(text, label) for text, label in label_of.items() for _ in range(copies)]
    split = parts_of(rows, seed, shares)
    texts_of = Counter(label_of.values())
    for part in PARTS:
        present = {rows[i][1] for i in split.part(part)}
        assert {label for label, n in texts_of.items() if n >= 3} <= present


@settings(**SHARED)
@given(st.lists(st.integers(3, 60), min_size=1, max_size=30), st.integers(0, 99), some_shares())
def test_a_labels_rows_are_dealt_in_proportion(sizes, seed, shares):
    rows = [(f"{label} {i}", label) for label, size in enumerate(sizes) for i in range(size)]
    split = parts_of(rows, seed, shares)
    for part in PARTS:
        dealt = Counter(rows[i][1] for i in split.part(part))
        for label, size in enumerate(sizes):
            assert abs(dealt[label] - size * shares[part]) < 2 or dealt[label] == 1


def test_seeds_give_different_splits_and_a_seed_the_same():
    rows = [(f"text {i}", i % 4) for i in range(400)]
    one, again, other = (parts_of(rows, seed) for seed in (42, 42, 43))
    assert one.test.tolist() == again.test.tolist() != other.test.tolist()


def test_rows_added_to_a_file_leave_most_of_its_test_rows_where_they_were():
    rows = [(f"text {i}", i % 4) for i in range(400)]
    before = {rows[i] for i in parts_of(rows, 42).test}
    more = rows + [(f"more {i}", i % 4) for i in range(20)]
    assert len(before & {more[i] for i in parts_of(more, 42).test}) >= 0.8 * len(before)


def test_a_lone_surrogate_is_no_reason_to_fail():
    assert len(parts_of([("\ud800 a", 0), ("b", 0), ("c", 0)], 1).test) == 1


@pytest.mark.parametrize("seed", [0, 42])
def test_banking77_is_cut_80_10_10_within_a_few_rows(shared_data, seed):
    with (shared_data / "banking77.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    names = [row["label"] if "label" in row else row["category"] for row in table]
    texts = [row["text"] for row in table]
    labels = LabelSet.of(names)
    split = split_rows(texts, labels.ids(names), SHARES, seed)
    n = len(texts)
    for part, share in SHARES.items():
        assert abs(len(split.part(part)) - share * n) <= 12, part
        dealt = np.bincount(labels.ids([names[i] for i in split.part(part)]), minlength=len(labels))
        assert dealt.min() >= 1
        whole = np.bincount(labels.ids(names))
        assert np.abs(dealt - whole * share).max() <= 4  # equal texts go together
    test_texts = [texts[i] for i in split.test]
    subset = stratified_subset(test_texts, labels.ids([names[i] for i in split.test]), 300, seed)
    assert len(subset) == 300
    assert len({names[split.test[i]] for i in subset}) == 77


# The file's own split ------------------------------------------------------------------------------


def test_the_files_own_split_is_honoured():
    given_parts = ["train", "test", "validation", "train", "test"]
    split = split_as_given(list("abcde"), np.zeros(5, dtype=np.int64), given_parts, SHARES, 1)
    assert [split.part(part).tolist() for part in PARTS] == [[0, 3], [2], [1, 4]]


@settings(**SHARED)
@given(labelled_rows(), st.integers(0, 2**32 - 1), st.data())
def test_without_validation_rows_they_are_cut_from_the_files_train_rows(rows, seed, data):
    given_parts = data.draw(st.lists(st.sampled_from(["train", "test"]), min_size=len(rows), max_size=len(rows)))
    texts, labels = [text for text, _ in rows], np.array([label for _, label in rows], dtype=np.int64)
    split = split_as_given(texts, labels, given_parts, SHARES, seed)
    assert split.test.tolist() == [i for i, part in enumerate(given_parts) if part == "test"]
    assert sorted([*split.train, *split.validation]) == [i for i, part in enumerate(given_parts) if part == "train"]


def test_the_cut_from_the_files_train_rows_is_one_to_eight():
    texts, labels = [f"text {i}" for i in range(1000)], np.arange(1000) % 5
    given_parts = ["test" if i < 100 else "train" for i in range(1000)]
    split = split_as_given(texts, labels, given_parts, SHARES, 1)
    assert (len(split.train), len(split.validation), len(split.test)) == (800, 100, 100)
    assert np.bincount(labels[split.validation]).tolist() == [20] * 5


# The subset ----------------------------------------------------------------------------------------


@settings(**SHARED)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=120), st.integers(1, 130), st.integers(0, 2**32 - 1))
def test_the_subset_is_stratified_deterministic_and_as_large_as_asked(labels, size, seed):
    labels = np.array(labels, dtype=np.int64)
    texts = [f"text {i}" for i in range(len(labels))]
    subset = stratified_subset(texts, labels, size, seed)
    n = min(size, len(labels))
    assert len(subset) == n
    assert subset.tolist() == sorted(set(subset.tolist()))
    assert subset.tolist() == stratified_subset(texts, labels, size, seed).tolist()
    drawn, whole = Counter(labels[subset].tolist()), Counter(labels.tolist())
    if n >= len(whole):
        assert set(drawn) == set(whole)
    for label, count in whole.items():
        assert drawn[label] <= count
        exact = count * n / len(labels)
        # One row for each label comes before proportion, so a frequent label may give some up for the rare ones.
        assert drawn[label] <= np.floor(exact) + 1
        assert drawn[label] >= np.floor(exact) - len(whole)


@settings(**SHARED)
@given(labelled_rows(), st.integers(1, 40), st.integers(0, 2**32 - 1), st.randoms(use_true_random=False))
def test_the_subset_does_not_depend_on_row_order(rows, size, seed, rng):
    def drawn(rows):
        chosen = stratified_subset([text for text, _ in rows], np.array([label for _, label in rows]), size, seed)
        return Counter(rows[i] for i in chosen)

    before = drawn(rows)
    rng.shuffle(rows)
    assert drawn(rows) == before


def test_under_one_row_per_label_the_frequent_labels_get_theirs():
    labels = np.repeat(np.arange(10), np.arange(1, 11))
    subset = stratified_subset([f"text {i}" for i in range(len(labels))], labels, 5, 1)
    assert sorted(labels[subset].tolist()) == [5, 6, 7, 8, 9]


# The learning curve's order ------------------------------------------------------------------------


@settings(**SHARED)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=120), st.integers(0, 2**32 - 1))
def test_every_beginning_of_the_growing_order_is_stratified_with_a_row_of_each_label_first(labels, seed):
    labels = np.array(labels, dtype=np.int64)
    texts = [f"text {i}" for i in range(len(labels))]
    order = growing_order(texts, labels, seed)
    assert sorted(order.tolist()) == list(range(len(labels)))
    assert order.tolist() == growing_order(texts, labels, seed).tolist()
    whole = Counter(labels.tolist())
    for size in range(1, len(labels) + 1):
        drawn = Counter(labels[order[:size]].tolist())
        assert len(drawn) == min(size, len(whole))
        if size >= len(whole):
            for label, count in whole.items():
                assert abs(drawn[label] - count * size / len(labels)) <= len(whole)
    assert labels[order[0]] in [label for label, count in whole.items() if count == max(whole.values())]


@settings(**SHARED)
@given(st.dictionaries(st.text("xyz", min_size=1), st.integers(0, 3), min_size=2), st.randoms(use_true_random=False))
def test_the_growing_order_of_a_label_depends_on_its_texts_and_the_seed_alone(label_of, rng):
    rows = list(label_of.items())

    def by_label(rows, seed):
        order = growing_order([text for text, _ in rows], np.array([label for _, label in rows]), seed)
        return {label: [rows[i][0] for i in order if rows[i][1] == label] for label in range(4)}

    before = by_label(rows, 1)
    rng.shuffle(rows)
    assert by_label(rows, 1) == before


def test_another_seed_is_another_growing_order():
    texts, labels = [f"text {i}" for i in range(60)], np.arange(60) % 3
    assert growing_order(texts, labels, 1).tolist() != growing_order(texts, labels, 2).tolist()
