"""Which steps the trial before step 1 looks at. That it finds what does not fit is F19's."""

import numpy as np
import pytest

from mmbert_core.training.memory import heaviest_steps


@pytest.mark.parametrize("batch_size", (7, 32))
def test_the_heaviest_steps_of_all_epochs_are_among_the_candidates(batch_size):
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 200, size=3001)
    orders = [generator.permutation(len(lengths)) for _ in range(5)]
    found = heaviest_steps(iter(orders), lengths, batch_size)
    steps = [order[start : start + batch_size] for order in orders for start in range(0, len(order), batch_size)]
    for weight in (np.sum, np.max):
        assert max(weight(lengths[rows]) for rows in found) == max(weight(lengths[rows]) for rows in steps)
    every = {tuple(rows) for rows in steps}
    assert all(tuple(rows) in every for rows in found) and len(found) <= 128
