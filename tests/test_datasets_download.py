"""The download of MNIST and its cache, with scripts of the test's own in place of the network."""

import hashlib
import http.server
import threading

import numpy as np
import pytest

from data import download, idx, load, mnist
from mnist_files import write_small_mnist

BRING = """
import sys, shutil
for name in {names!r}:
    shutil.copy({source!r} + "/" + name + ".gz", sys.argv[1])
"""


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("MOEJAX_DATA_DIR", raising=False)
    monkeypatch.setenv("MOEJAX_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def small(tmp_path):
    return write_small_mnist(tmp_path / "small")


@pytest.fixture
def script(monkeypatch, tmp_path, small):
    """In place of the download: brings the small data set."""
    path = tmp_path / "script.py"
    path.write_text(BRING.format(names=idx.NAMES, source=str(small.folder)))
    monkeypatch.setattr(download, "SCRIPT", path)
    return path


@pytest.fixture
def small_mnist(monkeypatch, small, script):
    """The data set that is downloaded, which counts as MNIST."""
    monkeypatch.setattr(idx, "MNIST_SHA256", small.digests)
    return small


def test_download_is_cached_and_not_repeated(small_mnist, script):
    first = mnist()
    script.unlink()
    for data in (first, mnist(), load()):
        assert data.name == "mnist"
        np.testing.assert_array_equal(data.train.images, small_mnist.train.images)
        np.testing.assert_array_equal(data.test.labels, small_mnist.test.labels)


@pytest.mark.parametrize("damage", [b"", b"\x1f\x8bnonsense", None])
def test_a_damaged_cache_is_downloaded_again(small_mnist, tmp_path, damage, caplog):
    mnist()
    cached = tmp_path / "cache" / "mnist" / f"{idx.NAMES[2]}.gz"
    cached.unlink() if damage is None else cached.write_bytes(damage)
    data = mnist()
    assert idx.NAMES[2] in caplog.text
    np.testing.assert_array_equal(data.test.images, small_mnist.test.images)
    assert cached.read_bytes() == (small_mnist.folder / cached.name).read_bytes()


def test_a_cache_that_cannot_be_written_does_not_matter(small_mnist, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOEJAX_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert mnist().name == "mnist"
    assert "could not be cached" in caplog.text


def test_a_wrong_download_is_never_taken_for_mnist(script, tmp_path):
    with pytest.raises(ConnectionError, match="not MNIST"):
        mnist()
    assert not list(tmp_path.glob("cache/**/*.gz"))


def test_a_failing_download_gives_its_reason(script):
    script.write_text("import sys; print('noise'); sys.exit('no such host')")
    with pytest.raises(ConnectionError, match="could not be downloaded: no such host"):
        mnist()


def test_a_hanging_download_is_ended(script, monkeypatch):
    script.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(download, "SECONDS_WITHOUT_PROGRESS", 0.5)
    with pytest.raises(ConnectionError, match="nothing arrived"):
        mnist()


# The real script, with tensorflow-datasets, against a server on this machine

CATALOGUE_OF_ITS_OWN = """
import importlib.util, sys
from pathlib import Path
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.checksums import UrlInfo

class Builder:
    url_infos = {{url: UrlInfo(*info) for url, info in {infos!r}.items()}}

tfds.builder_cls = lambda name: Builder
spec = importlib.util.spec_from_file_location("fetch", {script!r})
fetch = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fetch)
fetch.main(Path(sys.argv[1]))
"""


@pytest.fixture
def server(small):
    class Files(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=small.folder)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("intact", [True, False])
def test_the_catalogue_verifies_what_is_downloaded(server, small, monkeypatch, tmp_path, intact):
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    infos = {}
    for name in idx.NAMES:
        content = (small.folder / f"{name}.gz").read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        infos[f"{server}/{name}.gz"] = (len(content), digest, f"{name}.gz")
    if not intact:
        (small.folder / f"{idx.NAMES[1]}.gz").write_bytes(b"not what the catalogue says")
    script = tmp_path / "catalogue.py"
    script.write_text(CATALOGUE_OF_ITS_OWN.format(infos=infos, script=str(download.SCRIPT)))
    monkeypatch.setattr(download, "SCRIPT", script)
    folder = tmp_path / "downloads"
    folder.mkdir()
    if intact:
        download.download(folder)
        train, _, _ = idx.read_idx_folder(folder)
        np.testing.assert_array_equal(train.images, small.train.images)
    else:
        with pytest.raises(ConnectionError, match="could not be downloaded"):
            download.download(folder)
