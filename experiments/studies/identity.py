"""What makes a resumed run of a study the same run: its options."""

from __future__ import annotations

import argparse

# What may differ when a run is resumed: its place, its data's place, which cells and seeds, and
# what is done afterwards.
FREE_TO_DIFFER = {"out", "resume", "docs", "no_cache", "data_dir"} | {
    "settings",
    "correlations",
    "heads",
    "batches",
}


def identity_of(args: argparse.Namespace) -> dict[str, str]:
    """The options that decide what is measured."""
    return {
        f"--{name.replace('_', '-')}": str(value)
        for name, value in vars(args).items()
        if name not in FREE_TO_DIFFER and not name.endswith("seeds")
    }
