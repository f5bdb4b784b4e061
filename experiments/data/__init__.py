"""Data for the experiments: the toy problem, MNIST from wherever it is, and layouts for both.

Every loader returns images as they are stored, uint8 ``[N, 28, 28]``, and integer labels. A layout
is a pure function of such images, on numpy and on JAX arrays, inside ``jit`` as well: keep the
uint8 images on the device and lay out each batch where it is used.

Example:
    >>> from data import flat, mnist_sample, one_hot
    >>> train = mnist_sample().train
    >>> flat(train.images).shape, one_hot(train.labels).shape
    ((4000, 784), (4000, 10))
"""

from data.dataset import Dataset, Split
from data.digits import digits
from data.images import channels_first, channels_last, flat, one_hot
from data.loaders import load, mnist
from data.points import Points, toy
from data.sample import mnist_sample

__all__ = [
    "Dataset",
    "Points",
    "Split",
    "channels_first",
    "channels_last",
    "digits",
    "flat",
    "load",
    "mnist",
    "mnist_sample",
    "one_hot",
    "toy",
]
