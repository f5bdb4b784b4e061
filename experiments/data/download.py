"""Downloads MNIST, and gives up when nothing arrives."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from parts.ending import before_the_end

SECONDS_WITHOUT_PROGRESS = 8.0
SCRIPT = Path(__file__).with_name("_fetch.py")


def download(folder: Path) -> None:
    """Downloads MNIST's four IDX files, verified by SHA-256, into an empty folder.

    Raises:
        ConnectionError: if that fails for any reason, at the latest when nothing has arrived for
            ``SECONDS_WITHOUT_PROGRESS``.
    """
    print("downloading MNIST (12 MB)", file=sys.stderr, flush=True)
    with (folder / "log").open("w+") as log:
        command = [sys.executable, "-P", str(SCRIPT), str(folder)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            with before_the_end(process.kill):
                _wait(process, folder)
        finally:
            process.kill()
            process.wait()
        if process.returncode != 0:
            log.seek(0)
            reason = (log.read().strip().splitlines() or ["no reason given"])[-1]
            raise ConnectionError(f"MNIST could not be downloaded: {reason}")


def _wait(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Returns when the process has ended; raises when it stops making progress."""
    size, since = -1, time.monotonic()
    while process.poll() is None:
        if (new_size := _bytes_in(folder)) != size:
            size, since = new_size, time.monotonic()
        elif time.monotonic() - since > SECONDS_WITHOUT_PROGRESS:
            raise ConnectionError(
                "MNIST could not be downloaded: nothing arrived for "
                f"{SECONDS_WITHOUT_PROGRESS:.0f} seconds"
            )
        time.sleep(0.05)


def _bytes_in(folder: Path) -> int:
    """Total size of the files; one that is renamed while they are listed counts as gone."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total
