"""prefetch_one: the same items, at most one computed early, errors in order, concurrent with the caller."""

import threading

import pytest

from mmbert_core.data.prefetch import prefetch_one


def test_the_same_items_in_order():
    assert list(prefetch_one(iter(range(100)))) == list(range(100))
    assert list(prefetch_one(iter([]))) == []
    assert list(prefetch_one(iter([None, False, 0]))) == [None, False, 0]


def test_at_most_one_item_is_computed_early():
    computed = []
    items = prefetch_one(computed.append(number) or number for number in range(10))
    for number in range(5):
        assert next(items) == number
        assert len(computed) <= number + 2
    items.close()
    assert len(computed) <= 6


def test_an_error_is_raised_after_the_items_before_it():
    def items():
        yield 1
        yield 2
        raise ValueError("the third")

    fetched = prefetch_one(items())
    assert [next(fetched), next(fetched)] == [1, 2]
    with pytest.raises(ValueError, match="the third"):
        next(fetched)


def test_the_next_item_is_computed_while_this_one_is_used():
    is_used = threading.Event()

    def items():
        yield 1
        assert is_used.wait(20), "the caller waited for the second item"
        yield 2

    fetched = prefetch_one(items())
    assert next(fetched) == 1
    is_used.set()
    assert next(fetched) == 2
