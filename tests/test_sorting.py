"""The order in which choices are served: by expert, stably, in integers."""

from functools import partial

import jax
import numpy as np
import pytest

from moejax._sorting import sort_by_expert


def test_sorting_is_exact_where_one_integer_does_not_hold_expert_and_choice():
    experts = np.random.default_rng(0).integers(0, 2**26, (50, 2), dtype=np.int32)
    weights = np.ones(experts.shape)
    order, _ = jax.eval_shape(partial(sort_by_expert, num_experts=2**26), experts, weights)
    assert order.shape == (100,)
    small = sort_by_expert(experts % 7, weights, 6)
    ids = np.asarray(experts % 7).T.reshape(-1)
    assert small.order.tolist() == np.argsort(ids, kind="stable").tolist()
    assert small.starts.tolist() == np.searchsorted(np.sort(ids), np.arange(7)).tolist()


@pytest.mark.parametrize("num_experts", [3, 2**20])  # where one integer holds both, and where not
def test_choices_of_weight_zero_come_last_of_their_expert(num_experts):
    experts, weights = np.full((2000, 1), num_experts), np.zeros((2000, 1))
    experts[:5, 0], weights[:5, 0] = [1, 0, 1, 0, 1], [0, 1, 2, 0, -1]
    order, starts = sort_by_expert(experts, weights, num_experts)
    assert order[:5].tolist() == [1, 3, 2, 4, 0]
    assert starts[:3].tolist() == [0, 2, 5]
