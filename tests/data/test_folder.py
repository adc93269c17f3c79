"""Data sets from your own files: both layouts, label values, a sentence for every error."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from encnet_triton.data import Augment, DataError, Folder, TrainLoader, create_dataset
from encnet_triton.data.check import check_split, first_look

NAMES = ("sky", "road", "car")
LABEL = np.array([[0, 1, 2, 255], [2, 2, 1, 0], [0, 0, 0, 1]], np.uint8)


def write_pair(root, image, label, values=LABEL, mode=None):
    rng = np.random.default_rng(len(str(image)))
    for path in (root / image, root / label):
        path.parent.mkdir(parents=True, exist_ok=True)
    height, width = np.shape(values)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / image)
    picture = Image.fromarray(np.asarray(values))
    if mode == "P":
        picture.putpalette(bytes(range(256)) * 3)
    picture.save(root / label)
    return pixels


@pytest.fixture
def root(tmp_path):
    """Two images with a list file each for train (both) and val (one)."""
    write_pair(tmp_path, "photos/a.png", "masks/a.png")
    write_pair(tmp_path, "photos/b.jpg", "masks/b.png")
    (tmp_path / "classes.txt").write_text("\n".join(NAMES) + "\n")
    pairs = ["photos/a.png masks/a.png", "photos/b.jpg masks/b.png"]
    (tmp_path / "train.txt").write_text("\n".join(pairs) + "\n\n")
    (tmp_path / "val.txt").write_text(pairs[1])
    return tmp_path


def assert_refused(*parts):
    """The error must name all of these, in order."""
    return pytest.raises(DataError, match=".*".join(re.escape(str(part)) for part in parts))


def test_list_file(root):
    pixels = np.asarray(Image.open(root / "photos/a.png"))
    train, val = create_dataset("folder", "train", root), create_dataset("folder", "val", str(root))
    assert (len(train), len(val)) == (2, 1)
    assert train.classes == NAMES
    assert train.palette.shape == (3, 3)
    assert train.ignore_index == 255
    assert train.name_of(0) == str(root / "photos/a.png")
    image, label = train[0]
    np.testing.assert_array_equal(np.asarray(image), pixels)
    np.testing.assert_array_equal(label, LABEL)
    assert label.dtype == np.uint8
    assert label.flags.writeable


def test_list_file_separated_by_tabs_may_have_spaces(root):
    write_pair(root, "my photos/one two.png", "masks/one two.png")
    (root / "val.txt").write_text("my photos/one two.png\tmasks/one two.png\n")
    assert Folder(root, "val")[0].image.size == (4, 3)


def test_open_leaves_the_image_undecoded(root):
    image, label = Folder(root).open(1)
    assert image.filename == str(root / "photos/b.jpg")
    image.draft("RGB", (2, 1))
    assert image.size == (2, 2)
    np.testing.assert_array_equal(label, LABEL)


def test_split_folders(root):
    write_pair(root, "images/train/x.png", "labels/train/x.png")
    write_pair(root, "images/val/y.png", "labels/val/y.png")
    write_pair(root, "images/val/deep/er/z.jpg", "labels/val/deep/er/z.png")
    (root / "images/val/.hidden.png").write_bytes(b"")
    (root / "train.txt").unlink()
    (root / "val.txt").unlink()
    train, val = Folder(root, "train"), Folder(root, "val")
    assert [train.name_of(0)] == [str(root / "images/train/x.png")]
    assert [val.name_of(i) for i in range(len(val))] == [
        str(root / "images/val/deep/er/z.jpg"),
        str(root / "images/val/y.png"),
    ]


def _names(root: Path, split: str) -> set[str]:
    data = Folder(root, split)
    return {Path(data.name_of(i)).stem for i in range(len(data))}


def _flat(root: Path, stems: Iterable[str]) -> None:
    (root / "classes.txt").write_text("\n".join(NAMES))
    for stem in stems:
        write_pair(root, f"images/{stem}.png", f"labels/{stem}.png")


def test_folders_without_split_keep_a_tenth_for_validation(tmp_path):
    _flat(tmp_path, (f"{number:03}" for number in range(200)))
    train, val = _names(tmp_path, "train"), _names(tmp_path, "val")
    assert len(train | val) == 200 and not train & val
    assert 10 <= len(val) <= 30
    with assert_refused("has no split 'test'"):
        Folder(tmp_path, "test")


def test_a_file_that_is_added_moves_no_other_between_splits(tmp_path):
    _flat(tmp_path, (f"{number:03}" for number in range(50)))
    train, val = _names(tmp_path, "train"), _names(tmp_path, "val")
    _flat(tmp_path, ["000a", "00", "zz", "0"])
    assert train <= _names(tmp_path, "train") and val <= _names(tmp_path, "val")


def test_a_few_pairs_have_one_for_validation(tmp_path):
    _flat(tmp_path, "bde")
    assert len(_names(tmp_path, "val")) == 1 and len(_names(tmp_path, "train")) == 2


@pytest.mark.parametrize("names", [("training", "validation"), ("Train", "Val"), ("trn", "test")])
def test_splits_by_other_names_are_not_mixed(names, tmp_path):
    _flat(tmp_path, [f"{name}/a" for name in names])
    said = f"images has the folders {', '.join(sorted(names))}: name those that are meant train"
    for split in ("train", "val"):
        with assert_refused(said):
            Folder(tmp_path, split)


def test_what_is_left_out_is_said(tmp_path):
    _flat(tmp_path, "abcdef")
    assert Folder(tmp_path).notes == []
    write_pair(tmp_path, "images/g.heic.png", "labels/g.png")
    (tmp_path / "images/g.heic.png").rename(tmp_path / "images/g.heic")
    found = [
        f"1 file in {tmp_path}/images left out, whose suffix is none of a known picture: g.heic",
        f"1 file in {tmp_path}/labels without an image: g.png",
    ]
    assert Folder(tmp_path).notes == found
    assert first_look(Folder(tmp_path))[-2:] == found
    assert check_split(Folder(tmp_path)).notes[-2:] == found


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "JPG", "gif", "ppm"])
def test_every_suffix_of_a_known_format_is_an_image(suffix, tmp_path):
    _flat(tmp_path, ["a"])
    write_pair(tmp_path, f"images/b.{suffix}", "labels/b.png")
    assert _names(tmp_path, "train") | _names(tmp_path, "val") == {"a", "b"}


def test_a_split_has_a_name(tmp_path):
    _flat(tmp_path, "ab")
    with assert_refused("the split has no name"):
        Folder(tmp_path, "")


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(LABEL, id="8 bits"),
        pytest.param(LABEL.astype(np.uint16), id="16 bits"),
        pytest.param(LABEL.astype(np.int32), id="32 bits"),
    ],
)
def test_label_depths(root, values):
    suffix = "tif" if values.dtype == np.int32 else "png"
    write_pair(root, "photos/c.png", f"masks/c.{suffix}", values)
    (root / "val.txt").write_text(f"photos/c.png masks/c.{suffix}")
    np.testing.assert_array_equal(Folder(root, "val")[0].label, LABEL)


def test_palette_labels_are_read_as_indices(root):
    write_pair(root, "photos/c.png", "masks/c.png", mode="P")
    (root / "val.txt").write_text("photos/c.png masks/c.png")
    assert Image.open(root / "masks/c.png").mode == "P"
    np.testing.assert_array_equal(Folder(root, "val")[0].label, LABEL)


def test_two_valued_labels_are_zero_and_one(root):
    write_pair(root, "photos/c.png", "masks/c.png", LABEL == 2)
    (root / "val.txt").write_text("photos/c.png masks/c.png")
    np.testing.assert_array_equal(Folder(root, "val")[0].label, LABEL == 2)


def test_ignored_value_at_the_end_of_the_class_names(root):
    # As in CamVid: the last of the names is "void", and 255 does not occur.
    (root / "classes.txt").write_text("sky\nroad\nvoid\n")
    raw = np.where(LABEL == 255, 2, LABEL)
    write_pair(root, "photos/a.png", "masks/a.png", raw)
    dataset = Folder(root, ignore_label=2)
    assert dataset.classes == ("sky", "road")
    np.testing.assert_array_equal(dataset[0].label, np.where(raw == 2, 255, raw))


@pytest.mark.parametrize("depth", [np.uint8, np.uint16], ids=["8 bits", "16 bits"])
def test_label_offset_and_several_ignored_values(root, depth):
    # As in ADE20K: 0 is no class and classes start at 1.
    raw = np.array([[0, 1, 2, 3], [3, 99, 99, 1], [0, 0, 2, 2]], depth)
    write_pair(root, "photos/a.png", "masks/a.png", raw)
    dataset = Folder(root, ignore_label=(0, 99), label_offset=-1)
    expected = [[255, 0, 1, 2], [2, 255, 255, 0], [255, 255, 1, 1]]
    np.testing.assert_array_equal(dataset[0].label, expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "LA"])
def test_images_of_other_modes_become_rgb(root, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    path = root / f"photos/c.{suffix}"
    Image.open(root / "photos/a.png").convert(mode).save(path)
    (root / "val.txt").write_text(f"{path} masks/a.png")
    image, label = Folder(root, "val")[0]
    assert (image.mode, image.size) == ("RGB", (4, 3))
    cropped, _ = Augment(8)(*Folder(root, "val").open(0), np.random.default_rng(0))
    assert cropped.shape == (8, 8, 3)


def test_missing_root(tmp_path):
    with assert_refused("data folder", tmp_path / "nowhere", "does not exist"):
        Folder(tmp_path / "nowhere")


def test_missing_split(root):
    with assert_refused(root, "has no split 'test'", "test.txt", "images/test and labels/test"):
        Folder(root, "test")


def test_empty_list(root):
    (root / "val.txt").write_text("\n")
    with assert_refused("the data set is empty", root / "val.txt"):
        Folder(root, "val")


def test_empty_folders(root):
    (root / "val.txt").unlink()
    (root / "images/val").mkdir(parents=True)
    (root / "labels/val").mkdir(parents=True)
    with assert_refused("the data set is empty", "'val'", root):
        Folder(root, "val")


def test_missing_image_is_found_at_the_start(root):
    (root / "photos/a.png").unlink()
    (root / "masks/b.png").unlink()
    with assert_refused(
        root / "train.txt", root / "photos/a.png", "does not exist (nor do 1 others)"
    ):
        Folder(root)


def test_image_that_vanishes_later(root):
    dataset = Folder(root)
    (root / "photos/a.png").unlink()
    with assert_refused("image", root / "photos/a.png", "does not exist"):
        dataset[0]


def test_image_without_label(root):
    write_pair(root, "images/val/y.png", "labels/val/y.png")
    write_pair(root, "images/val/z.png", "labels/val/other.png")
    (root / "val.txt").unlink()
    with assert_refused(
        root / "images/val/z.png", "has no label of the same name", root / "labels/val"
    ):
        Folder(root, "val")


def test_two_images_of_one_name(root):
    write_pair(root, "images/val/y.png", "labels/val/y.png")
    write_pair(root, "images/val/y.jpg", "labels/val/y.png")
    (root / "val.txt").unlink()
    with assert_refused("y.jpg", "y.png", "have the same name but for the suffix"):
        Folder(root, "val")


def test_list_line_of_one_word(root):
    (root / "val.txt").write_text("photos/a.png masks/a.png\nphotos/b.jpg\n")
    with assert_refused(root / "val.txt", "line 2", "photos/b.jpg"):
        Folder(root, "val")


def damage(path, keep=0.7):
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])


@pytest.mark.parametrize("name", ["a.png", "b.jpg"])
@pytest.mark.parametrize("lazily", [False, True], ids=["decoded", "augmented"])
def test_truncated_image(root, name, lazily):
    path = root / "photos" / name
    Image.effect_noise((64, 48), 90).convert("RGB").save(path)
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(root / "masks" / f"{path.stem}.png")
    damage(path)
    dataset = Folder(root)
    index = 0 if name == "a.png" else 1
    with assert_refused(path, "the image is truncated or damaged"):
        if lazily:
            Augment(32)(*dataset.open(index), np.random.default_rng(0))
        else:
            dataset[index]


def test_truncated_label(root):
    values = np.random.default_rng(0).integers(0, 3, (48, 64), dtype=np.uint8)
    write_pair(root, "photos/a.png", "masks/a.png", values)
    damage(root / "masks/a.png")
    with assert_refused("label", root / "masks/a.png", "is truncated or damaged"):
        Folder(root)[0]


@pytest.mark.parametrize("what", ["photos/a.png", "masks/a.png"], ids=["image", "label"])
def test_file_that_is_no_image(root, what):
    (root / what).write_text("not a picture")
    with assert_refused(root / what, "is not an image of a known format"):
        Folder(root)[0]


def test_image_and_label_of_different_size(root):
    Image.new("L", (5, 3)).save(root / "masks/a.png")
    parts = ("photos/a.png", "is 4 x 3 pixels", "masks/a.png", "is 5 x 3")
    with assert_refused(*parts):
        Folder(root)[0]


@pytest.mark.parametrize("depth", [np.uint8, np.uint16], ids=["8 bits", "16 bits"])
@pytest.mark.parametrize(
    ("value", "offset", "allowed"),
    [
        pytest.param(3, 0, "0..2", id="one too large"),
        pytest.param(254, 0, "0..2", id="just below the ignored one"),
        pytest.param(0, -1, "1..3", id="zero with an offset"),
    ],
)
def test_label_value_outside_the_classes(root, depth, value, offset, allowed):
    raw = np.full((3, 4), 1, depth)
    raw[2, 3] = value
    write_pair(root, "photos/a.png", "masks/a.png", raw)
    parts = (root / "masks/a.png", f"has the value {value}", root / "classes.txt", allowed)
    with assert_refused(*parts):
        Folder(root, label_offset=offset)[0]


def test_deep_label_value_outside_the_classes(root):
    write_pair(root, "photos/a.png", "masks/a.png", np.full((3, 4), 1000, np.uint16))
    with assert_refused(root / "masks/a.png", "has the value 1000", "0..2"):
        Folder(root)[0]


def test_colour_label(root):
    Image.new("RGB", (4, 3)).save(root / "masks/a.png")
    with assert_refused(root / "masks/a.png", "pixel format RGB", "single-channel"):
        Folder(root)[0]


@pytest.mark.parametrize(
    ("name", "map_", "expected"),
    [
        ("one", "255=1", [[0, 1], [1, 0]]),
        ("two", {0: 1, 255: 0}, [[1, 0], [0, 1]]),
        ("none", "0=255,255=0", [[255, 0], [0, 255]]),
    ],
)
@pytest.mark.parametrize("depth", [np.uint8, np.uint16], ids=["8 bits", "16 bits"])
def test_label_map(root, depth, name, map_, expected):
    """Masks of 0 and 255, as most tools paint them."""
    write_pair(root, "photos/a.png", "masks/a.png", np.array([[0, 255], [255, 0]], depth))
    np.testing.assert_array_equal(Folder(root, label_map=map_)[0].label, expected)


def test_a_class_of_the_label_map_has_no_other_values(root):
    write_pair(root, "photos/a.png", "masks/a.png", np.array([[0, 1], [255, 0]], np.uint8))
    with assert_refused("masks/a.png has the value 1", "label_map: 255=1"):
        Folder(root, label_map="255=1")[0]
    mapped = Folder(root, label_map="255=1,1=1", ignore_label="2,7")[0].label
    np.testing.assert_array_equal(mapped, [[0, 1], [1, 0]])


@pytest.mark.parametrize("given", ["0,255", [0, 255], (0, 255)])
def test_several_ignored_values_in_any_form(root, given):
    expected = np.where(LABEL == 0, 255, LABEL.astype(int) - 1)
    (root / "classes.txt").write_text("a\nb\n")
    dataset = Folder(root, ignore_label=given, label_offset=-1)
    np.testing.assert_array_equal(dataset[0].label, np.where(LABEL == 255, 255, expected))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"ignore_label": "a"}, ("ignore_label is 'a'", "255 or 0,255")),
        ({"ignore_label": 1.5}, ("ignore_label is 1.5",)),
        ({"ignore_label": True}, ("ignore_label is True",)),
        ({"label_offset": "1,2"}, ("label_offset is '1,2'", "a whole number")),
        ({"label_map": "255"}, ("label_map is '255'", "255=1,7=0")),
        ({"label_map": "255=1,255=2"}, ("names a label value twice",)),
        ({"label_map": "255=3"}, ("label_map names the class 3", "0..2")),
        ({"label_map": "255=1", "ignore_label": 255}, ("both name the label value 255",)),
        ({"mean": "0.5"}, ("mean is '0.5'", "three numbers")),
        ({"std": (0, 1, 1)}, ("std is (0, 1, 1)", "three numbers")),
        ({"classes_file": "none.txt"}, ("none.txt", "does not exist")),
    ],
)
def test_options_that_mean_nothing(root, options, parts):
    with assert_refused(*parts):
        Folder(root, **options)


def link(target, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def test_linked_folders_count_and_hidden_ones_do_not(root, tmp_path_factory):
    (root / "val.txt").unlink()
    store = tmp_path_factory.mktemp("store")
    write_pair(root, "images/val/a.jpg", "labels/val/a.png")
    write_pair(store, "images/b.jpg", "labels/b.png")
    link(store / "images", root / "images/val/city")
    link(store / "labels", root / "labels/val/city")
    for folder in (".ipynb_checkpoints", "city/.cache"):
        for place in ("images", "labels"):
            (root / place / "val" / folder).mkdir()
        write_pair(root, f"images/val/{folder}/c.jpg", f"labels/val/{folder}/d.png")
    dataset = Folder(root, "val")
    assert [dataset.name_of(i) for i in range(len(dataset))] == [
        str(root / "images/val/a.jpg"), str(root / "images/val/city/b.jpg"),
    ]  # fmt: skip


def test_links_that_lead_nowhere_or_round(root):
    (root / "val.txt").unlink()
    write_pair(root, "images/val/a.jpg", "labels/val/a.png")
    link(root / "gone.jpg", root / "images/val/b.jpg")
    with assert_refused("images/val/b.jpg is a link to", "gone.jpg, which is not there"):
        Folder(root, "val")
    (root / "images/val/b.jpg").unlink()
    link(root / "images", root / "images/val/again")
    with assert_refused("images/val/again", "is a link to a folder that it lies in"):
        Folder(root, "val")


COMPOSED, APART = "Stra\u00dfe caf\u00e9", "Stra\u00dfe cafe\u0301"


@pytest.mark.parametrize(("image", "label"), [(COMPOSED, APART), (APART, COMPOSED)])
def test_accents_are_one_letter_or_two(root, image, label):
    """macOS takes them apart, and archives carry that to other systems."""
    write_pair(root, f"images/test/{image}.jpg", f"labels/test/{label}.png")
    assert len(Folder(root, "test")) == 1
    write_pair(root, f"photos {image}/{image}.png", f"masks {image}/{label}.png")
    listed = f"photos {label}/{label}.png\tmasks {label}/{image}.png\n"
    (root / "val.txt").write_text(listed, encoding="utf-8")
    dataset = Folder(root, "val")
    assert dataset.name_of(0) == str(root / f"photos {image}/{image}.png")
    np.testing.assert_array_equal(dataset[0].label, LABEL)
    (root / "classes.txt").write_text(f"a\n{image}\nc\n", encoding="utf-8")
    assert Folder(root).classes[1] == COMPOSED


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_files_as_editors_write_them(root, encoding, end):
    names = ("sky", "caf\u00e9", "\u9053\u8def")
    (root / "classes.txt").write_bytes(end.join(names).encode(encoding))
    listed = (root / "val.txt").read_text() + end
    (root / "val.txt").write_bytes(listed.encode(encoding))
    assert Folder(root, "val").classes == names


def test_text_files_of_other_encodings_are_refused(root):
    (root / "classes.txt").write_bytes("sky\ncaf\u00e9\n".encode("latin-1"))
    with assert_refused("classes.txt is not UTF-8 text: line 2 has the byte 0xe9"):
        Folder(root)
    (root / "classes.txt").write_bytes("sky\nroad".encode("utf-16-le"))
    with assert_refused("classes.txt is not text"):
        Folder(root)
    (root / "classes.txt").write_bytes(b"sky\n\x1b[31mroad")
    with assert_refused("classes.txt names the class", "cannot be printed"):
        Folder(root)


def test_a_pipe_in_place_of_a_file_is_refused_at_once(root):
    for name in ("photos/a.png", "classes.txt"):
        (root / name).unlink()
        os.mkfifo(root / name)
    with assert_refused("classes.txt is not a file"):
        Folder(root)
    (root / "classes.txt").unlink()
    (root / "classes.txt").write_text("\n".join(NAMES))
    with assert_refused("image", root / "photos/a.png", "is not a file"):
        Folder(root)[0]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        pytest.param(None, ("class names file", "classes.txt", "does not exist"), id="missing"),
        pytest.param("", ("classes.txt", "names 0 classes; 1 to 254"), id="empty"),
        pytest.param("a\nb\na\n", ("classes.txt", "names the class 'a' twice"), id="repeated"),
        pytest.param(
            "\n".join(map(str, range(255))), ("names 255 classes; 1 to 254",), id="too many"
        ),
    ],
)
def test_class_names(root, content, parts):
    (root / "classes.txt").unlink()
    if content is not None:
        (root / "classes.txt").write_text(content)
    with assert_refused(*parts):
        Folder(root)


def test_unknown_option(root):
    with assert_refused("no option 'ignore_index'", "classes_file, ignore_label, label_offset,"):
        create_dataset("folder", "train", root, ignore_index=3)


def test_a_bad_file_reaches_the_trainer_as_its_sentence(root):
    damage(root / "photos/b.jpg", 0.3)
    loader = TrainLoader(Folder(root), Augment(4), batch_size=2, seed=0, workers=1)
    with assert_refused("photos/b.jpg"):
        next(loader.epoch(0))
    loader.close()
