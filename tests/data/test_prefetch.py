"""One item ahead: the same items, no more than one early, errors in their turn, and at the same time as the caller's work."""

import threading

import pytest

from mmbert_core.data.prefetch import prefetch_one


def test_the_same_items_in_order():
    assert list(prefetch_one(iter(range(100)))) == list(range(100))
    assert list(prefetch_one(iter([]))) == []
    assert list(prefetch_one(iter([None, False, 0]))) == [None, False, 0]


def test_at_most_one_is_made_before_it_is_asked_for():
    made = []
    items = prefetch_one(made.append(number) or number for number in range(10))
    for number in range(5):
        assert next(items) == number
        assert len(made) <= number + 2
    items.close()
    assert len(made) <= 6


def test_an_error_comes_after_the_items_before_it():
    def items():
        yield 1
        yield 2
        raise ValueError("the third")

    made = prefetch_one(items())
    assert [next(made), next(made)] == [1, 2]
    with pytest.raises(ValueError, match="the third"):
        next(made)


def test_the_next_item_is_made_while_this_one_is_used():
    is_used = threading.Event()

    def items():
        yield 1
        assert is_used.wait(20), "the caller was not let on"
        yield 2

    made = prefetch_one(items())
    assert next(made) == 1
    is_used.set()
    assert next(made) == 2
