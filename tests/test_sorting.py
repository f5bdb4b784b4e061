"""The order in which choices are served: by expert, stably, in integers."""

from functools import partial

import jax
import numpy as np

from moejax._sorting import sort_by_expert


def test_sorting_is_exact_where_one_integer_does_not_hold_expert_and_choice():
    experts = jax.random.randint(jax.random.key(0), (50, 2), 0, 2**26)
    order, _ = jax.eval_shape(partial(sort_by_expert, num_experts=2**26), experts)
    assert order.shape == (100,)
    small = sort_by_expert(experts % 7, 6)
    ids = np.asarray(experts % 7).T.reshape(-1)
    assert small.order.tolist() == np.argsort(ids, kind="stable").tolist()
    assert small.starts.tolist() == np.searchsorted(np.sort(ids), np.arange(7)).tolist()
