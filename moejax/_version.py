"""The version, in a file that the build and the checkpoints read."""

__version__ = "0.1.0"
