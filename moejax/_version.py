"""The version, in a file that the build and the checkpoints read."""

VERSION = "0.1.0"
