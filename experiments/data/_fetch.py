"""A script that downloads MNIST's four files into the folder given as its argument.

It runs in a process of its own, because a download that hangs can be ended no other way: the
library has no timeout, and its threads would keep the interpreter from leaving.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path


def main(folder: Path) -> None:
    """Downloads from the catalogue of tensorflow-datasets, which verifies each SHA-256."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import downloader

    logging.disable(logging.WARNING)  # each retry would be announced
    downloader.MAX_RETRIES = 2  # its default makes it retry for minutes without a network
    tfds.disable_progress_bar()
    catalogue = tfds.builder_cls("mnist").url_infos
    manager = tfds.download.DownloadManager(
        download_dir=folder, dataset_name="mnist", url_infos=catalogue
    )
    for url, path in manager.download({url: url for url in catalogue}).items():
        Path(path).rename(folder / catalogue[url].filename)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed: pip install 'moejax[experiments]'")
    except Exception as error:
        cause = getattr(error.args[0], "reason", error) if error.args else error
        sys.exit(" ".join(str(cause).split()) or type(cause).__name__)
