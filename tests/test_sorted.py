"""The engine of the sparse schedules: slots by load."""

import jax
import numpy as np

from moejax._sorting import sort_by_expert
from moejax.schedules._sorted.policy import Group
from moejax.schedules._sorted.slots import assign_slots


def test_experts_with_most_choices_have_most_slots():
    experts = np.array([[1], [3], [1], [0], [3], [1], [1]])  # loads 1, 4, 0, 2
    choices = sort_by_expert(experts, np.ones(experts.shape), 4)
    groups = Group(2, 3), Group(2, 1)
    slots = jax.jit(assign_slots, static_argnums=(1, 2))(choices, len(experts), groups)
    assert slots.expert.tolist() == [1, 3, 0, 2]
    assert slots.capacity.tolist() == [1, 3, 1, 3]
    assert slots.filled.tolist() == [*[True] * 5, False, True, False]
    assert slots.slot[0].tolist() == [0, 3, 1, 6, 4, 2, 8]  # expert 1's fourth token has none
