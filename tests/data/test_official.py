"""Data sets in their official layouts, made small."""

import json

import numpy as np
import pytest
from PIL import Image

from encnet_triton.data import DataError, create_dataset, pascal_context, prepare
from encnet_triton.data.__main__ import main
from encnet_triton.data.check import check_split
from encnet_triton.data.voc import voc_palette


def jpeg(path, height=6, width=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(path)


def png(path, label):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(label, np.uint8)).save(path)


def lines(path, *names):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def ramp(values, height=6, width=8):
    """A label map of this size that goes through the values."""
    return np.resize(np.asarray(values), (height, width))


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("a", "b", "c", "d"):
        jpeg(root / "JPEGImages" / f"{name}.jpg")
    png(root / "SegmentationClass" / "a.png", ramp([0, 20, 255]))
    png(root / "SegmentationClass" / "b.png", ramp([15]))
    lists = root / "ImageSets" / "Segmentation"
    lines(lists / "train.txt", "a")
    lines(lists / "val.txt", "b")
    lines(lists / "trainval.txt", "a", "b")
    lines(lists / "test.txt", "d")
    return root


@pytest.fixture
def sbd(tmp_path):
    savemat = pytest.importorskip("scipy.io").savemat
    root = tmp_path / "dataset"
    (root / "cls").mkdir(parents=True)
    for name, value in (("a", 3), ("b", 4), ("c", 5)):
        label = ramp([0, value]).astype(np.uint8)
        savemat(root / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": label}})
    lines(root / "train.txt", "a", "c")
    lines(root / "val.txt", "b")
    return root


def test_voc_values_are_classes_and_255_is_ignored(voc, tmp_path):
    train = create_dataset("voc", "train", voc)
    assert len(train) == 1 and len(train.classes) == 21
    assert set(np.unique(train[0].label)) == {0, 20, 255}
    # The folder that VOCdevkit was unpacked in does as well.
    assert create_dataset("voc", "val", tmp_path)[0].label.max() == 15


def test_voc_test_images_have_no_label(voc):
    sample = create_dataset("voc", "test", voc)[0]
    assert (sample.label == 255).all() and sample.label.shape == (6, 8)


def test_voc_palette_has_the_colours_of_the_official_files():
    # aeroplane, bicycle, tvmonitor and the outline, as any PNG of the data set has them.
    palette = voc_palette(256)
    assert palette[[0, 1, 2, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [0, 64, 128], [224, 224, 192],
    ]  # fmt: skip


def test_colour_coded_masks_are_refused(voc):
    Image.new("RGB", (8, 6)).save(voc / "SegmentationClass" / "a.png")
    with pytest.raises(DataError, match="pixel format RGB"):
        create_dataset("voc", "train", voc)[0]


def test_voc_aug_takes_sbd_without_voc_val_and_voc_labels_first(voc, sbd):
    assert prepare.prepare_voc_aug(voc, sbd) == {"trainvalaug": 3, "trainaug": 2}
    train = create_dataset("voc_aug", "train", voc)
    assert [train.name_of(i)[-5:] for i in range(2)] == ["a.jpg", "c.jpg"]
    assert set(np.unique(train[0].label)) == {0, 20, 255}  # VOC's own, with its outline
    assert set(np.unique(train[1].label)) == {0, 5}  # SBD's
    assert len(create_dataset("voc_aug", "trainval", voc)) == 3
    assert create_dataset("voc_aug", "val", voc)[0].label.max() == 15


def test_interrupted_preparation_is_not_taken_for_finished(voc, sbd):
    (sbd / "cls" / "c.mat").write_bytes(b"half a file")
    with pytest.raises(DataError, match=r"c\.mat cannot be read"):
        prepare.prepare_voc_aug(voc, sbd)
    with pytest.raises(DataError, match=r"trainaug\.txt does not exist.*prepare voc_aug"):
        create_dataset("voc_aug", "train", voc)


def test_ade20k_shifts_labels_and_ignores_zero(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for split, name in (("training", "ADE_train_1"), ("validation", "ADE_val_1")):
        jpeg(root / "images" / split / f"{name}.jpg")
        png(root / "annotations" / split / f"{name}.png", ramp([0, 1, 150]))
    train = create_dataset("ade20k", "train", tmp_path)
    assert len(train.classes) == 150 and train.classes[0] == "wall" and train.classes[149] == "flag"
    assert train[0].label.ravel()[:3].tolist() == [255, 0, 149]
    assert len(create_dataset("ade20k", "trainval", root)) == 2
    png(root / "annotations" / "training" / "ADE_train_1.png", ramp([151]))
    with pytest.raises(DataError, match=r"value 151, but ADE20K's annotations have 0"):
        create_dataset("ade20k", "train", root)[0]
    (root / "annotations" / "validation" / "ADE_val_1.png").unlink()
    with pytest.raises(DataError, match=r"ADE_val_1\.jpg has no annotation"):
        create_dataset("ade20k", "val", root)


def test_cityscapes_numbers_become_19_classes(tmp_path):
    jpeg_of = tmp_path / "leftImg8bit" / "train" / "ulm" / "ulm_000000_000019_leftImg8bit.png"
    jpeg(jpeg_of)
    label = tmp_path / "gtFine" / "train" / "ulm" / "ulm_000000_000019_gtFine_labelIds.png"
    png(label, ramp([0, 7, 33, 29]))
    train = create_dataset("cityscapes", "train", tmp_path)
    assert train[0].label.ravel()[:4].tolist() == [255, 0, 18, 255]
    assert train.classes[0] == "road" and train.classes[18] == "bicycle"
    label.unlink()
    with pytest.raises(DataError, match="has no label .*labelIds"):
        create_dataset("cityscapes", "train", tmp_path)


@pytest.fixture
def voc2010(tmp_path):
    root = tmp_path / "VOC2010"
    for name in ("2008_000001", "2008_000002"):
        jpeg(root / "JPEGImages" / f"{name}.jpg")
    lines(root / "ImageSets" / "Main" / "train.txt", "2008_000001")
    lines(root / "ImageSets" / "Main" / "val.txt", "2008_000002")
    return root


def test_pascal_context_from_459_label_mats(voc2010, tmp_path):
    savemat = pytest.importorskip("scipy.io").savemat
    mats = tmp_path / "trainval"
    mats.mkdir()
    # aeroplane, wood, a label outside the 59, unlabelled
    raw = ramp([2, 458, 1, 0]).astype(np.uint16)
    for name in ("2008_000001", "2008_000002"):
        savemat(mats / f"{name}.mat", {"LabelMap": raw})
    found = prepare.prepare_pascal_context(voc2010, mat=mats)
    assert found == {"train": 1, "val": 1}
    train = create_dataset("pascal_context", "train", voc2010)
    assert train[0].label.ravel()[:4].tolist() == [0, 58, 255, 255]
    assert (train.classes[0], train.classes[58]) == ("aeroplane", "wood")
    with_background = create_dataset("pascal_context", "train", voc2010, num_classes=60)
    assert with_background[0].label.ravel()[:4].tolist() == [1, 59, 0, 0]
    assert with_background.classes[:2] == ("background", "aeroplane")
    with pytest.raises(DataError, match=r"label_order is 'voc_first', but .* says 'alphabetical'"):
        create_dataset("pascal_context", "train", voc2010, label_order="voc_first")


def test_pascal_context_from_the_detail_json(voc2010, tmp_path):
    coco_mask = pytest.importorskip("pycocotools.mask")

    def segment(image, category, rows):
        mask = np.zeros((6, 8), np.uint8, order="F")
        mask[rows] = 1
        runs = coco_mask.encode(mask)
        runs["counts"] = runs["counts"].decode()
        return {"image_id": image, "category_id": category, "segmentation": runs}

    images = [
        {"file_name": f"{name}.jpg", "image_id": i, "phase": phase, "height": 6, "width": 8}
        for i, (name, phase) in enumerate((("2008_000001", "train"), ("2008_000002", "val")))
    ]
    # The later annotation lies on top; 427 is tvmonitor, 25 is bird, which image 1 has alone.
    segments = [segment(0, 427, slice(0, 4)), segment(0, 2, slice(3, 5)), segment(1, 25, slice(2))]
    path = tmp_path / "trainval_merged.json"
    path.write_text(json.dumps({"images": images, "annos_segmentation": segments}))
    prepare.prepare_pascal_context(voc2010, detail=path)
    train = create_dataset("pascal_context", "train", voc2010)
    monitor = train.classes.index("tvmonitor")
    assert train[0].label[:, 0].tolist() == [monitor, monitor, monitor, 0, 0, 255]
    val = create_dataset("pascal_context", "val", voc2010)
    assert val[0].label[0, 0] == val.classes.index("bird") == 6


def test_ready_pascal_context_pngs_need_their_order(voc2010):
    labels = voc2010 / "SegmentationClassContext"
    png(labels / "2008_000001.png", ramp([0, 1, 2, 59]))
    with pytest.raises(DataError, match="label_order is not given.*alphabetical, voc_first or"):
        create_dataset("pascal_context", "train", voc2010)

    def names(**options):
        data = create_dataset("pascal_context", "train", voc2010, **options)
        values = data[0].label.ravel()[:4]
        return [None if v == 255 else data.classes[v] for v in values]

    assert names(label_order="alphabetical") == [None, "aeroplane", "bag", "wood"]
    assert names(label_order="voc_first") == [None, "aeroplane", "bicycle", "wood"]
    with pytest.raises(DataError, match=r"59_labels\.txt .* neither in"):
        names(label_order="stanford")
    official = {"table": "diningtable", "bedclothes": "bedcloth", "cloth": "clothes"}
    order = list(reversed(pascal_context.CLASSES))
    listed = [f"{i}: {official.get(name, name)}" for i, name in enumerate(order, start=1)]
    lines(voc2010 / "59_labels.txt", *listed)
    assert names(label_order="stanford") == [None, "wood", "window", "aeroplane"]
    png(labels / "2008_000001.png", ramp([255, 0, 1, 58]))
    assert names(label_order="alphabetical", background_label=255)[1:] == [
        "aeroplane", "bag", "wood",
    ]  # fmt: skip


def test_the_two_fixed_orders_name_the_same_59_classes():
    assert sorted(pascal_context.VOC_FIRST) == sorted(pascal_context.CLASSES)
    assert len(pascal_context.CLASSES) == 59
    numbers = list(pascal_context.OFFICIAL.values())
    assert (
        numbers == sorted(numbers)
        and tuple(sorted(pascal_context.CLASSES)) == pascal_context.CLASSES
    )


def test_coco_keeps_images_with_more_than_1000_pixels_and_the_first_instance_on_top(tmp_path):
    def box(x, y, width, height):
        return [[x, y, x + width, y, x + width, y + height, x, y + height]]

    annotations = [
        {"image_id": 1, "category_id": 1, "segmentation": box(0, 0, 40, 30)},  # person
        {"image_id": 1, "category_id": 18, "segmentation": box(20, 0, 40, 30)},  # dog
        {"image_id": 2, "category_id": 18, "segmentation": box(0, 0, 40, 25)},  # 1,000 pixels
        {"image_id": 3, "category_id": 13, "segmentation": box(0, 0, 60, 40)},  # not VOC's
    ]
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 40, "width": 64} for i in (1, 2, 3)]
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations" / "instances_train2017.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    for image in images:
        jpeg(tmp_path / "train2017" / image["file_name"], 40, 64)
    assert prepare.prepare_coco_voc(tmp_path, "train") == {"train2017": 1}
    train = create_dataset("coco_voc", "train", tmp_path)
    label = train[0].label
    assert (train.classes[label[10, 30]], train.classes[label[10, 50]]) == ("person", "dog")
    assert label[39, 0] == 0 and len(train) == 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[]", "does not hold a JSON object"),
        ("{}", "have no 'images'"),
        ("[" * 100_000, "is not JSON"),
        ('{"images": 3, "annotations": []}', "is not of the published form"),
        ('{"images": [{"id": 1}], "annotations": [{"category_id": 1}]}', "'image_id'"),
        (
            '{"images": [{"id": 1, "file_name": "a", "height": -1, "width": 2}], '
            '"annotations": [{"category_id": 1, "image_id": 1, "segmentation": 3}]}',
            "is not of the published form",
        ),
    ],
    ids=["list", "empty", "deep", "number", "no image", "size"],
)
def test_annotations_of_another_form(tmp_path, content, sentence):
    pytest.importorskip("pycocotools.mask")
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations" / "instances_val2017.json"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"instances_val2017\.json .*{sentence}"):
        prepare.prepare_coco_voc(tmp_path, "val")


@pytest.mark.parametrize(
    "content", [{"LabelMap": np.zeros((2, 2))}, {"LabelMap": "a"}, {"other": 1}]
)
def test_mat_files_of_another_form(voc2010, tmp_path, content):
    savemat = pytest.importorskip("scipy.io").savemat
    savemat(tmp_path / "2008_000001.mat", content)
    with pytest.raises(DataError, match=r"2008_000001\.mat|of 2008_000001"):
        prepare.prepare_pascal_context(voc2010, mat=tmp_path)


@pytest.mark.parametrize("name", ["voc", "voc_aug", "ade20k", "cityscapes", "pascal_context"])
def test_missing_data_says_where_people_get_it(tmp_path, name):
    with pytest.raises(DataError, match="https?://"):
        create_dataset(name, "train", tmp_path)


def test_check_counts_and_finds_what_cannot_be_used(voc):
    png(voc / "SegmentationClass" / "b.png", ramp([15], height=5))
    report = check_split(create_dataset("voc", "trainval", voc), (2913,))
    assert (report.images, report.bad) == (2, 1)
    assert report.sizes == ((6, 8), (6, 8))
    assert report.pixels[20] == 16 and report.ignored == 16
    assert "2,913" in report.problems[0] and "b.png is 8 x 5" in report.problems[1]
    assert "19 of 21 classes do not occur" in report.notes[0]


def test_check_command_fails_with_sentences(voc, capsys):
    assert main(["check", "voc", "--data", str(voc)]) == 1
    assert "1 images, but the published split has 1,464" in capsys.readouterr().out
