"""A disk that is full, for a while."""

import resource
from contextlib import contextmanager


@contextmanager
def file_size_limit(size):
    """No file can grow beyond a size in bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
