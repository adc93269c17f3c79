"""CIFAR-10 in its official layouts, made small; pickles cannot run code."""

import pickle

import numpy as np
import pytest
from PIL import Image

from encnet_triton.data.base import DataError
from encnet_triton.data.cifar10 import CLASSES, load_cifar10


@pytest.fixture
def arrays():
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (10, 3, 32, 32), dtype=np.uint8)
    return images, np.arange(10, dtype=np.uint8)


def test_binary_layout(tmp_path, arrays):
    images, labels = arrays
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    records = np.concatenate([labels[:, None], images.reshape(10, -1)], 1)
    for i in range(5):
        records[2 * i : 2 * i + 2].tofile(folder / f"data_batch_{i + 1}.bin")
    train = load_cifar10(tmp_path, "train")
    np.testing.assert_array_equal(train.images, images)
    np.testing.assert_array_equal(train.labels, labels)
    records[:2].reshape(-1)[:-5].tofile(folder / "test_batch.bin")
    with pytest.raises(DataError, match=r"test_batch\.bin is cut short"):
        load_cifar10(folder, "test")


def test_python_layout_without_running_code(tmp_path, arrays):
    images, labels = arrays
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    batch = {b"data": images.reshape(10, -1), b"labels": labels.tolist(), b"batch_label": b"test"}
    # Protocol 2, as the official files have.
    (folder / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
    test = load_cifar10(tmp_path, "test")
    np.testing.assert_array_equal(test.images, images)
    np.testing.assert_array_equal(test.labels, labels)

    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    (folder / "test_batch").write_bytes(pickle.dumps({b"data": Harmful(), b"labels": [0]}))
    with pytest.raises(DataError, match=r"is not a batch of CIFAR-10: it asks for .*open"):
        load_cifar10(tmp_path, "test")
    assert not (tmp_path / "made").exists()


def test_folder_of_pngs(tmp_path, arrays):
    images, labels = arrays
    for image, label in zip(images, labels, strict=True):
        place = tmp_path / "train" / CLASSES[label]
        place.mkdir(parents=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(place / "0001.png")
    train = load_cifar10(tmp_path, "train")
    np.testing.assert_array_equal(train.images, images)
    np.testing.assert_array_equal(train.labels, labels)
    Image.new("RGB", (31, 32)).save(tmp_path / "train" / "frog" / "0002.png")
    with pytest.raises(DataError, match=r"0002\.png is 31 x 32, but must be 32 x 32"):
        load_cifar10(tmp_path, "train")


def test_missing_data_says_where_people_get_it(tmp_path):
    with pytest.raises(DataError, match="neither cifar-10-batches-bin .*https"):
        load_cifar10(tmp_path, "train")


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        pytest.param([1], "it does not hold a dictionary", id="list"),
        pytest.param({b"labels": [0]}, "its 'data' are not numbers", id="no images"),
        pytest.param(
            {b"data": np.zeros((1, 3072), np.uint8), b"labels": [256]}, "its 'labels' are no",
            id="large label",
        ),
        pytest.param(
            {b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, "the label 10", id="label 10"
        ),
        pytest.param(
            {b"data": np.zeros((1, 32, 32, 3), np.uint8), b"labels": [1]}, "must be N x 3072",
            id="channels last",
        ),
        pytest.param(
            {b"data": np.array([[{}, []]], object), b"labels": [1]}, "asks for|other than num",
            id="objects",
        ),
    ],
)  # fmt: skip
def test_other_contents_are_refused(tmp_path, document, sentence):
    (tmp_path / "test_batch").write_bytes(pickle.dumps(document))
    with pytest.raises(DataError, match=sentence):
        load_cifar10(tmp_path, "test")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_batches_that_people_wrote_again(tmp_path, arrays, protocol):
    images, labels = arrays
    batch = {"data": images.reshape(10, -1).astype(np.int64), "labels": labels}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(batch, protocol))
    np.testing.assert_array_equal(load_cifar10(tmp_path, "test").images, images)
