"""The engine of `expert_parallel`: rounds of an exchange between devices."""
