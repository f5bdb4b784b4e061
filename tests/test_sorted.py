"""The engine of the sparse schedules: slots by load."""

import jax
import jax.numpy as jnp
import pytest

from moejax._sorting import sort_by_expert
from moejax.schedules._sorted.slots import Group, assign_slots
from moejax.schedules.dropless import mean_and_blocks


@pytest.mark.parametrize("num_experts", [1, 3, 16, 18, 64, 256])
@pytest.mark.parametrize("num_choices", [1, 20, 1023, 1500, 8192, 65_537])
def test_groups_hold_every_choice_and_have_a_whole_mean(num_choices, num_experts):
    groups = mean_and_blocks(num_choices, num_experts).groups
    slots = sum(group.size * group.capacity for group in groups)
    assert sum(group.size for group in groups) == num_experts
    assert slots % num_experts == 0
    assert slots >= num_choices or num_choices < num_experts


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the order by load is for CPU")
def test_experts_with_most_choices_have_most_slots():
    experts = jnp.array([[1], [3], [1], [0], [3], [1], [1]])  # loads 1, 4, 0, 2
    slots = assign_slots(sort_by_expert(experts, 4), len(experts), (Group(2, 3), Group(2, 1)))
    assert slots.expert.tolist() == [1, 3, 0, 2]
    assert slots.capacity.tolist() == [1, 3, 1, 3]
    assert slots.filled.tolist() == [*[True] * 5, False, True, False]
    assert slots.slot[0].tolist() == [0, 3, 1, 6, 4, 2, 8]  # expert 1's fourth token has none
