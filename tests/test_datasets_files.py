"""IDX files and image folders: right data, or one error that names the file."""

import gzip
import hashlib
import os
import shutil
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import cache, flat, idx, load, mnist, tree
from mnist_files import idx_bytes, random_split, write_small_mnist

IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = idx.NAMES


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEJAX_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A small data set in four raw files, which counts as MNIST."""
    small = write_small_mnist(tmp_path / "small", compress=False)
    monkeypatch.setattr(idx, "MNIST_SHA256", small.digests)
    return small


def assert_same(data, train, test):
    for split, expected in ((data.train, train), (data.test, test)):
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
        np.testing.assert_array_equal(split.images, expected.images)
        np.testing.assert_array_equal(split.labels, expected.labels)


def value_or_error(function, *args):
    try:
        return function(*args)
    except ValueError as error:
        return error


# IDX files


def in_members(content):
    """As two files that were compressed by themselves, joined and padded."""
    return gzip.compress(content[:9]) + gzip.compress(content[9:]) + bytes(512)


PACKED = [("", bytes), (".gz", gzip.compress), (".gz", in_members)]


@pytest.mark.parametrize(("end", "pack"), PACKED)
@pytest.mark.parametrize("spelling", ["-idx", ".idx"])
def test_idx_files_in_every_spelling(small, tmp_path, end, pack, spelling):
    folder = tmp_path / "other"
    folder.mkdir()
    for name, content in small.contents.items():
        path = folder / (name.replace("-idx", spelling) + end)
        path.write_bytes(pack(content))
    for loader in (mnist, load):
        data = loader(folder)
        assert data.name == "mnist"
        assert_same(data, small.train, small.test)


def test_the_environment_names_the_folder(small, monkeypatch):
    monkeypatch.setenv("MOEJAX_DATA_DIR", str(small.folder))
    assert_same(mnist(), small.train, small.test)


def truncated(content):
    return content[:-1]


def damaged(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def wrong_magic(content):
    return b"\0\0\x0c" + content[3:]


def too_long(content):
    return content + b"\0"


def truncated_gzip(content):
    return gzip.compress(content)[:-9]


def damaged_gzip(content):
    packed = bytearray(gzip.compress(content, 0))
    packed[len(packed) // 2] ^= 1
    return bytes(packed)


def empty(content):
    return b""


def header_only(content):
    return content[:6]


def no_entries(content):
    return content[:4] + bytes(4) + content[8:]


DAMAGES = [
    truncated,
    damaged,
    wrong_magic,
    too_long,
    truncated_gzip,
    damaged_gzip,
    empty,
    header_only,
    no_entries,
]


@pytest.mark.parametrize("name", idx.NAMES)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("loader", [mnist, load])
def test_a_damaged_file_is_named(small, name, damage, loader):
    path = small.folder / name
    path.write_bytes(damage(small.contents[name]))
    with pytest.raises(ValueError, match=f"{path}.* must "):
        loader(small.folder)


@pytest.mark.parametrize("name", idx.NAMES)
def test_a_missing_file_is_named(small, name):
    (small.folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}.*missing"):
        mnist(small.folder)


def test_an_empty_folder_is_told_what_it_lacks(tmp_path):
    with pytest.raises(
        ValueError, match=f"{IMAGES}.gz, or the folders train and test.*got nothing"
    ):
        load(tmp_path)


def test_a_folder_of_something_else_is_told_what_is_in_it(tmp_path):
    for name in "abcdefg":
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"{IMAGES}.*train and test.*got a, b, c, d, e and 2 more"):
        load(tmp_path)


def test_the_folder_above_is_as_good(small):
    (small.folder.parent / "__MACOSX").mkdir()
    loaded = mnist(small.folder.parent)
    assert str(small.folder) in loaded.source
    assert_same(loaded, small.train, small.test)


def test_a_folder_above_two_data_sets_is_not_guessed(small):
    shutil.copytree(small.folder, small.folder.with_name("copy"))
    with pytest.raises(ValueError, match=r"got (cache, )?copy, small"):
        load(small.folder.parent)


@pytest.mark.parametrize(
    ("first", "second"),
    [(IMAGES, LABELS), (IMAGES, TEST_IMAGES), (LABELS, TEST_LABELS), (IMAGES, TEST_LABELS)],
)
@pytest.mark.parametrize("is_mnist", [True, False])
def test_mixed_up_files_are_named(small, first, second, is_mnist, monkeypatch):
    if not is_mnist:
        monkeypatch.setattr(idx, "MNIST_SHA256", dict.fromkeys(idx.NAMES, "another"))
    for name, content in ((first, small.contents[second]), (second, small.contents[first])):
        (small.folder / name).write_bytes(content)
    with pytest.raises(ValueError, match="ubyte must hold "):
        load(small.folder)


def test_both_splits_exchanged_are_named(small):
    for name, other in zip(idx.NAMES, idx.NAMES[2:] + idx.NAMES[:2], strict=True):
        (small.folder / name).write_bytes(small.contents[other])
    with pytest.raises(ValueError, match=f"{IMAGES} must hold MNIST's {IMAGES}.*{TEST_IMAGES}"):
        load(small.folder)


def test_the_training_set_twice_is_refused(tmp_path):
    small = write_small_mnist(tmp_path / "custom", compress=False)
    for name, other in ((TEST_IMAGES, IMAGES), (TEST_LABELS, LABELS)):
        (small.folder / name).write_bytes(small.contents[other])
    with pytest.raises(ValueError, match=f"{TEST_IMAGES} must hold other images"):
        load(small.folder)


@pytest.mark.parametrize("shape", [(5, 28, 27), (5, 14, 56), (0, 28, 28)])
def test_images_of_another_shape_are_named(small, shape):
    (small.folder / IMAGES).write_bytes(idx_bytes(np.zeros(shape, np.uint8)))
    with pytest.raises(ValueError, match=rf"{IMAGES} must hold IDX images of shape \[N, 28, 28\]"):
        load(small.folder)


def test_labels_beyond_nine_are_named(small):
    (small.folder / TEST_LABELS).write_bytes(idx_bytes(np.full(20, 10)))
    with pytest.raises(ValueError, match=f"{TEST_LABELS} must hold labels from 0 to 9, got 10"):
        load(small.folder)


def test_files_as_kaggle_unpacks_them(small):
    for name, content in small.contents.items():
        (small.folder / name).unlink()
        (small.folder / name).mkdir()
        (small.folder / name / name).write_bytes(content)
    assert_same(mnist(small.folder), small.train, small.test)


def test_a_folder_in_place_of_a_file_is_named(small):
    (small.folder / LABELS).unlink()
    (small.folder / LABELS).mkdir()
    with pytest.raises(ValueError, match=f"{LABELS} must be a file, got a folder"):
        mnist(small.folder)


def test_a_broken_link_is_named(small):
    (small.folder / LABELS).unlink()
    (small.folder / LABELS).symlink_to("nowhere")
    with pytest.raises(ValueError, match=f"{LABELS} must be a readable file.*No such file"):
        mnist(small.folder)


@pytest.mark.parametrize("announced", [30, 2**32 - 1])
def test_a_gzip_bomb_is_not_inflated_beyond_what_its_header_announces(small, announced):
    header = (
        small.contents[IMAGES][:4] + announced.to_bytes(4, "big") + small.contents[IMAGES][8:16]
    )
    (small.folder / IMAGES).write_bytes(gzip.compress(header + bytes(10**8), 9))
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"{IMAGES} must hold .* got (more|fewer)"):
        load(small.folder)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 10**6


def test_members_of_gzip_are_not_without_number(small, monkeypatch):
    (small.folder / IMAGES).write_bytes(in_members(small.contents[IMAGES]))
    monkeypatch.setattr(idx, "MOST_MEMBERS", 2)
    load(small.folder)
    monkeypatch.setattr(idx, "MOST_MEMBERS", 1)
    with pytest.raises(ValueError, match=f"{IMAGES} must be .* got: more than 1 members of gzip"):
        load(small.folder)


def test_another_data_set_is_custom_and_never_mnist(tmp_path):
    small = write_small_mnist(tmp_path / "mnist")
    data = load(small.folder)
    assert data.name == "custom"
    assert_same(data, small.train, small.test)
    for folder in (small.folder, small.folder.parent):  # the folder above is as good
        with pytest.raises(ValueError, match=f"{IMAGES}.gz must be MNIST's file by SHA-256"):
            mnist(folder)


def test_one_file_of_another_data_set_is_named(small, tmp_path):
    other = write_small_mnist(tmp_path / "other", seed=7)
    (small.folder / TEST_LABELS).write_bytes(other.contents[TEST_LABELS])
    with pytest.raises(ValueError, match=f"{TEST_LABELS} must be MNIST's"):
        load(small.folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A data set of three images, in raw files and in compressed ones."""
    return {
        compress: write_small_mnist(tmp_path_factory.mktemp("tiny"), 2, 1, compress=compress)
        for compress in (False, True)
    }


@contextmanager
def holding(path, content):
    """The file holds something else for a while."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(idx.NAMES), data=st.data(), compress=st.booleans())
def test_no_changed_byte_goes_unnoticed(tiny, name, data, compress):
    path = idx.find(tiny[compress].folder, name)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with holding(path, content), pytest.MonkeyPatch.context() as patch:
        patch.setattr(idx, "MNIST_SHA256", tiny[compress].digests)
        loaded = value_or_error(mnist, path.parent)
    if isinstance(loaded, ValueError):
        assert str(path.parent) in str(loaded)
    else:  # a byte of the gzip header that says nothing about the content
        assert compress
        assert_same(loaded, tiny[compress].train, tiny[compress].test)


# Image folders


def write_tree(folder, train, test, ending="png", names=("train", "test")):
    from PIL import Image

    for name, split in zip(names, (train, test), strict=True):
        for i, (image, label) in enumerate(zip(*split, strict=True)):
            directory = folder / name / str(label)
            directory.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(directory / f"{i:03d}.{ending}")
    return folder


def taking_turns(split):
    """The first image of every digit, then the second, by a loop."""
    seen, places = [0] * 10, []
    for label in split.labels:
        places.append((seen[label], label))
        seen[label] += 1
    order = sorted(range(len(places)), key=places.__getitem__)
    return split._replace(images=split.images[order], labels=split.labels[order])


@pytest.fixture
def splits():
    return random_split(0, 24), random_split(1, 12)


@pytest.fixture
def folder(tmp_path, splits):
    return write_tree(tmp_path / "tree", *splits)


@pytest.fixture
def decoded(monkeypatch):
    """The images decoded so far, to tell a cached load from another."""
    paths, decode = [], tree.decode
    monkeypatch.setattr(tree, "decode", lambda path: paths.append(path) or decode(path))
    return paths


def test_images_are_decoded_once(folder, splits, decoded, capsys):
    for loader in (mnist, load, mnist):
        data = loader(folder)
        assert data.name == "custom"
        assert_same(data, *map(taking_turns, splits))
    assert len(decoded) == 36
    assert capsys.readouterr().err.count("decoding images: 36/36") == 1


@pytest.mark.parametrize("ending", ["jpg", "JPEG"])
def test_jpeg_and_the_other_folder_names(tmp_path, ending):
    flat_grey = random_split(0, 20)._replace(
        images=np.full((20, 28, 28), np.arange(20, dtype=np.uint8)[:, None, None] * 12)
    )
    folder = write_tree(tmp_path / "t", flat_grey, flat_grey, ending, ("training", "testing"))
    data = mnist(folder)
    assert np.abs(data.train.images - taking_turns(flat_grey).images.astype(int)).max() <= 1
    np.testing.assert_array_equal(data.test.labels, taking_turns(flat_grey).labels)


def test_images_that_are_mnist_are_named_so(folder, splits, monkeypatch):
    records = [
        sorted(bytes([label]) + image.tobytes() for image, label in zip(*split, strict=True))
        for split in splits
    ]
    digests = [hashlib.sha256(b"".join(r)).hexdigest() for r in records]
    monkeypatch.setattr(tree, "MNIST_SHA256", tuple(digests))
    assert [mnist(folder).name for _ in range(2)] == ["mnist", "mnist"]


@pytest.mark.parametrize("change", ["content", "label", "removed", "added"])
def test_a_changed_image_is_decoded_again(folder, decoded, change):
    from PIL import Image

    load(folder)
    image = next((folder / "train" / "4").iterdir())
    before = image.stat()
    if change == "content":  # same size, modification time set back
        content = image.read_bytes()
        white = np.full((28, 28), 255, np.uint8)
        Image.fromarray(white).save(image)
        assert image.stat().st_size <= len(content)
        with image.open("ab") as file:  # PNG ends at its last chunk
            file.write(bytes(len(content) - image.stat().st_size))
        os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert image.stat().st_size == before.st_size
    elif change == "label":
        image.rename(folder / "train" / "5" / "moved.png")
    elif change == "removed":
        image.unlink()
    else:
        shutil.copy(image, image.with_name("copy.png"))
    data = load(folder)
    expected = {"content": 24, "label": 24, "removed": 23, "added": 25}[change]
    assert len(data.train.labels) == expected
    assert len(decoded) == 36 + expected + 12
    if change == "content":
        assert (data.train.images == 255).all(axis=(1, 2)).sum() == 1
    if change == "label":
        assert (np.bincount(data.train.labels)[4:6] == [1, 3]).all()


@pytest.mark.parametrize("position", [0, 40, 100, -1])
@pytest.mark.parametrize("cut", [False, True])
def test_a_damaged_cache_is_built_again(folder, splits, decoded, tmp_path, position, cut, caplog):
    load(folder)
    (cached,) = (tmp_path / "cache" / "images").iterdir()
    content = bytearray(cached.read_bytes())
    content[position] ^= 1
    cached.write_bytes(content[:position] if cut else content)
    assert_same(load(folder), *map(taking_turns, splits))
    assert len(decoded) == 72
    assert "damaged" in caplog.text
    assert_same(load(folder), *map(taking_turns, splits))
    assert len(decoded) == 72


def test_a_cache_that_cannot_be_written_does_not_matter(folder, splits, monkeypatch, caplog):
    monkeypatch.setenv("MOEJAX_CACHE_DIR", str(next(folder.glob("train/3/*"))))
    assert_same(load(folder), *map(taking_turns, splits))
    assert "could not be cached" in caplog.text


def test_readers_see_whole_files_while_many_write(tmp_path):
    path = tmp_path / "cache" / "file"
    contents = [bytes([i]) * 1_000_000 for i in range(4)]
    cache.store_checked(path, contents[0])
    with ThreadPoolExecutor(4) as pool:
        writes = pool.map(lambda content: cache.store_checked(path, content), contents * 20)
        for _ in range(50):
            assert cache.read_checked(path)[0] in range(4)
        list(writes)
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_nothing(tmp_path, caplog):
    target = tmp_path / "cache" / "file"
    (target / "in the way").mkdir(parents=True)
    cache.store(target, b"content")
    assert [p.name for p in target.parent.iterdir()] == ["file"]
    assert "could not be cached" in caplog.text


def test_every_changed_bit_of_a_png_is_noticed_or_harmless(tmp_path):
    from PIL import Image

    image = np.zeros((28, 28), np.uint8)
    image[10:18, 12:16] = np.arange(32, dtype=np.uint8).reshape(8, 4) * 7
    path = tmp_path / "image.png"
    Image.fromarray(image).save(path)
    content = path.read_bytes()
    noticed = 0
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        decoded = value_or_error(tree.decode, path)
        if isinstance(decoded, ValueError):
            assert "image.png must be" in str(decoded)
            noticed += 1
        else:
            np.testing.assert_array_equal(decoded, image)
    assert noticed > 7 * len(content)


@pytest.mark.parametrize("bad", ["text", "truncated", "size", "alpha", "sixteen"])
def test_a_bad_image_is_named(folder, bad):
    from PIL import Image

    path = folder / "test" / "7" / "bad.png"
    if bad == "text":
        path.write_text("no image")
    elif bad == "truncated":
        path.write_bytes(next((folder / "train" / "1").iterdir()).read_bytes()[:200])
    elif bad == "size":
        Image.new("L", (28, 27)).save(path)
    else:
        Image.new({"alpha": "RGBA", "sixteen": "I;16"}[bad], (28, 28)).save(path)
    with pytest.raises(ValueError, match=f"{path} must be a"):
        load(folder)


def test_a_missing_digit_a_stray_folder_and_a_missing_split_are_named(folder):
    (folder / "train" / "eleven").mkdir()
    with pytest.raises(ValueError, match=r"train must hold one folder per digit.*'eleven'"):
        load(folder)
    (folder / "train" / "eleven").rmdir()
    (folder / "test" / "Thumbs.db").touch()
    (folder / "test" / "3" / ".hidden.png").touch()
    load(folder)
    for path in (folder / "test" / "0").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"test/0 must hold PNG or JPEG images"):
        load(folder)
    shutil.rmtree(folder / "test" / "0")
    with pytest.raises(ValueError, match=r"test must hold one folder per digit.*\['0'\] missing"):
        load(folder)
    shutil.rmtree(folder / "test")
    with pytest.raises(ValueError, match="tree must hold exactly one folder named test or testing"):
        load(folder)


@pytest.mark.parametrize("ending", ["bmp", "GIF", "webp"])
def test_an_image_of_another_kind_is_not_passed_over(folder, ending):
    path = folder / "train" / "3" / f"image.{ending}"
    path.touch()
    with pytest.raises(ValueError, match=f"{path} must be a PNG or JPEG image"):
        load(folder)


def test_a_folder_among_the_images_is_not_passed_over(folder):
    path = folder / "train" / "3" / "more"
    path.mkdir()
    with pytest.raises(ValueError, match=f"{path} must be a PNG or JPEG image"):
        load(folder)


def test_what_archivers_and_systems_leave_is_passed_over(folder, splits):
    for path in (folder, folder / "train", folder / "test", folder / "test" / "3"):
        for name in ("__MACOSX", ".ipynb_checkpoints", "@eaDir"):
            (path / name).mkdir()
    (folder / "train" / "3" / "._000.png").touch()
    assert_same(load(folder), *map(taking_turns, splits))


def test_an_image_whose_name_begins_with_a_line_is_read(folder, splits):
    image = min((folder / "train" / "3").iterdir())
    image.rename(image.with_name("_" + image.name))
    assert len(load(folder).train.labels) == len(splits[0].labels)


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_is_refused(folder, mode):
    from PIL import Image

    path = folder / "train" / "3" / "transparent.png"
    image = Image.new(mode, (28, 28))
    if mode == "P":
        image.putpalette([0] * 768)  # black, only more or less of it
    image.save(path, transparency={"P": bytes(range(256)), "L": 0, "RGB": (0, 0, 0)}[mode])
    with pytest.raises(ValueError, match=f"{path} must be an opaque image"):
        load(folder)


@pytest.mark.parametrize("names", [("Train", "Test"), ("TRAINING", "testing")])
def test_the_case_of_folder_names_does_not_matter(tmp_path, splits, names):
    folder = write_tree(tmp_path / "t", *splits, names=names)
    assert_same(load(folder), *map(taking_turns, splits))


def test_the_folder_above_the_images_is_as_good(folder, splits):
    assert_same(load(folder.parent), *map(taking_turns, splits))


def test_a_folder_of_digits_names_the_one_above(folder):
    with pytest.raises(ValueError, match=f"train and test.* got .*0, 1.*name .*{folder}"):
        load(folder / "train")


def test_a_broken_link_to_an_image_is_named(folder):
    path = folder / "train" / "3" / "link.png"
    path.symlink_to("nowhere")
    with pytest.raises(ValueError, match=rf"{path} must be readable, got: No such file"):
        load(folder)


def test_an_image_that_vanishes_is_named(folder, monkeypatch):
    path, decode = folder / "train" / "3" / "gone.png", tree.decode
    shutil.copy(min(path.parent.iterdir()), path)
    monkeypatch.setattr(tree, "decode", lambda p: path.unlink(missing_ok=True) or decode(p))
    with pytest.raises(ValueError, match=f"{path} must be"):
        load(folder)


@pytest.mark.parametrize("place", ["train", "train/3"])
def test_what_may_not_be_read_is_named(folder, monkeypatch, place):
    path = str(folder / place)

    def scandir(where):
        if str(where) == path:
            raise PermissionError(13, "Permission denied", path)
        return scan(where)

    scan = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=f"{path} must be readable, got: Permission denied"):
        load(folder)


def test_pillow_missing_is_named_with_its_command(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install 'moejax\[experiments\]'"):
        load(folder)


# The real files

REAL = os.environ.get("MOEJAX_DATA_DIR")
real = pytest.mark.skipif(not REAL, reason="needs MNIST's four files in $MOEJAX_DATA_DIR")


@real
def test_mnist_is_mnist():
    data = mnist(REAL)
    assert data.name == "mnist"
    assert data.train.images.shape == (60000, 28, 28)
    assert data.test.images.shape == (10000, 28, 28)
    np.testing.assert_array_equal(data.train.labels[:8], [5, 0, 4, 1, 9, 2, 1, 3])
    np.testing.assert_allclose(flat(data.train.images).mean(), 0.1307, atol=1e-4)


@real
def test_the_checksums_belong_to_the_files_of_the_catalogue():
    import tensorflow_datasets as tfds

    catalogue = {i.filename: i.checksum for i in tfds.builder_cls("mnist").url_infos.values()}
    assert set(catalogue) == {f"{name}.gz" for name in idx.NAMES}
    for name, sha256 in idx.MNIST_SHA256.items():
        content = Path(REAL, f"{name}.gz").read_bytes()
        assert hashlib.sha256(content).hexdigest() == catalogue[f"{name}.gz"]
        assert hashlib.sha256(gzip.decompress(content)).hexdigest() == sha256


@real
def test_the_checksums_of_image_folders_belong_to_mnist():
    data = mnist(REAL)
    shuffled = [
        split._replace(images=split.images[::-1], labels=split.labels[::-1])
        for split in (data.train, data.test)
    ]
    assert tuple(map(tree.fingerprint, shuffled)) == tree.MNIST_SHA256


@real
def test_mnist_loads_in_half_a_second():
    seconds = []
    for _ in range(3):
        start = time.process_time()  # of both threads: no less than the time on an idle machine
        mnist(REAL)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.5
