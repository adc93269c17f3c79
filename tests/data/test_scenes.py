"""The embedded data set: naming its objects does take global context."""

import numpy as np
import pytest
import torch

from encnet_triton.data import DataError, Scenes, create_dataset
from encnet_triton.data.scenes import (
    AMBIGUOUS,
    CLASSES,
    CUE_DISTANCE,
    CUES,
    KINDS,
    RECEPTIVE_FIELD_LIMIT,
    SIDE,
    draw_scene,
    stream_key,
)

CUE_IDS = [CLASSES.index(name) for name in CUES]
AMBIGUOUS_IDS = [CLASSES.index(name) for names in AMBIGUOUS.values() for name in names]
SAMPLES = range(48)


def near(mask, distance):
    """Pixels within `distance` of the mask in both x and y."""
    for _ in range(2):  # along one axis, then along the other
        total = np.cumsum(np.pad(mask, ((distance + 1, distance), (0, 0))), axis=0)
        mask = (total[2 * distance + 1 :] > total[: -2 * distance - 1]).T
    return mask


def test_near_is_a_square_neighbourhood():
    mask = np.zeros((20, 20), bool)
    mask[10, 10] = True
    rows, columns = np.nonzero(near(mask, 3))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (7, 13, 7, 13)


def test_limits_are_a_third_of_the_side():
    assert SIDE == 160
    assert SIDE / 3 >= RECEPTIVE_FIELD_LIMIT < CUE_DISTANCE
    assert SIDE / 3 <= CUE_DISTANCE


@pytest.mark.parametrize("index", SAMPLES)
def test_every_ambiguous_pixel_is_farther_than_a_third_from_every_cue_pixel(index):
    label = Scenes("train")[index].label
    cue = np.isin(label, CUE_IDS)
    assert cue.sum() > 1000
    assert not (near(cue, CUE_DISTANCE) & np.isin(label, AMBIGUOUS_IDS)).any()


def test_one_layout_in_two_kinds_differs_in_the_cue_alone():
    for index in range(24):
        key = stream_key(5, "train", index)
        drawn = [draw_scene(kind, key) for kind in range(len(KINDS))]
        images = [np.asarray(sample.image) for sample in drawn]
        cues = [np.isin(sample.label, CUE_IDS) for sample in drawn]
        # The brushes do not fill their common box alike, and smoothing reaches one pixel further.
        may_differ = near(np.logical_or.reduce(cues), 3)
        for image, sample in zip(images[1:], drawn[1:], strict=True):
            assert np.array_equal(image[~may_differ], images[0][~may_differ])
            assert not np.array_equal(image, images[0])
            assert not (np.isin(sample.label, AMBIGUOUS_IDS) & may_differ).any()
        for names in AMBIGUOUS.values():
            ids = [CLASSES.index(name) for name in names]
            masks = [np.isin(s.label, ids) for s in drawn]
            assert all(np.array_equal(mask, masks[0]) for mask in masks)
            for kind, sample in enumerate(drawn):
                assert set(np.unique(sample.label[masks[kind]])) <= {ids[kind]}


def test_labels_of_a_kind_are_its_own_classes():
    dataset = Scenes("val", size=16)
    for index in range(16):
        kind = index % len(KINDS)
        own = {0, 1, CUE_IDS[kind]}
        own |= {CLASSES.index(names[kind]) for names in AMBIGUOUS.values()}
        found = set(np.unique(dataset[index].label).tolist())
        assert found <= own
        assert {0, CUE_IDS[kind]} <= found


def test_every_class_occurs_often_enough_to_be_learned():
    dataset = Scenes("train", size=120)
    pixels = sum(np.bincount(dataset[i].label.ravel(), minlength=18) for i in range(120))
    share = pixels / pixels.sum()
    assert len(CLASSES) == len(set(CLASSES)) == 18
    assert share.min() > 0.003
    assert share[0] < 0.8
    assert len(AMBIGUOUS_IDS) == 12


def test_train_and_val_never_share_a_random_stream():
    keys = {
        split: {stream_key(seed, split, index) for seed in range(4) for index in range(2000)}
        for split in ("train", "val")
    }
    assert not keys["train"] & keys["val"]
    assert len(keys["train"]) == len(keys["val"]) == 8000
    train, val = Scenes("train"), Scenes("val")
    pictures = {split[i].image.tobytes() for split in (train, val) for i in range(12)}
    assert len(pictures) == 24


def test_an_image_depends_on_seed_split_and_index_alone():
    first, again, other = Scenes("train"), Scenes("train", size=10), Scenes("train", seed=1)
    assert first[7].image.tobytes() == again[7].image.tobytes()
    assert np.array_equal(first[7].label, again[7].label)
    assert first[7].image.tobytes() != other[7].image.tobytes()


def test_data_set_facts():
    train, val = create_dataset("scenes", "train"), create_dataset("scenes", "val", size=8)
    assert (len(train), len(val)) == (2000, 8)
    assert train.ignore_index == 255
    assert train.palette.shape == (18, 3)
    assert len(np.unique(train.palette, axis=0)) == 18
    assert train.name_of(17) == "scenes train 17"
    sample = train[0]
    assert (sample.image.mode, sample.image.size, sample.label.shape) == (
        "RGB",
        (SIDE, SIDE),
        (SIDE, SIDE),
    )
    assert sample.label.dtype == np.uint8
    pixels = np.stack([np.asarray(train[i].image) for i in range(60)]).reshape(-1, 3) / 255
    np.testing.assert_allclose(pixels.mean(0), train.mean, atol=0.03)
    np.testing.assert_allclose(pixels.std(0), train.std, atol=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"split": "test"}, "no split 'test'.*train, val", id="unknown split"),
        pytest.param({"size": 0}, "at least 1 image, got 0", id="empty"),
        pytest.param({"seed": -1}, "must not be negative, got -1", id="negative seed"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(DataError, match=message):
        Scenes(**arguments)


def test_create_dataset_names_what_exists():
    with pytest.raises(DataError, match="unknown data set 'sceens'; there are scenes, folder"):
        create_dataset("sceens", "train")
    with pytest.raises(DataError, match="no option 'colour'; it has size, seed"):
        create_dataset("scenes", "train", colour=1)
    with pytest.raises(DataError, match="'folder' reads files: give its folder"):
        create_dataset("folder", "train")
    with pytest.raises(DataError, match="'scenes' is drawn and has no folder, but /x was given"):
        create_dataset("scenes", "train", "/x")


@pytest.mark.parametrize("place", [(80, 80), (40, 121), (3, 77)], ids=str)
def test_demo_fcn_sees_at_most_a_third_of_the_side(place):
    from encnet_triton.models import create_model

    torch.manual_seed(0)
    model = create_model("fcn", len(CLASSES), backbone="demo", head_channels=64).eval()
    image = np.asarray(Scenes("val")[0].image)
    x = torch.tensor(image).permute(2, 0, 1)[None].float().div(255).sub(0.7).requires_grad_()
    logits = torch.nn.functional.interpolate(
        model(x).logits, size=x.shape[2:], mode="bilinear", align_corners=model.align_corners
    )
    row, column = place
    # A random combination of the classes, so that no path cancels out.
    (logits[0, :, row, column] * torch.randn(len(CLASSES))).sum().backward()
    rows, columns = torch.nonzero(x.grad[0].abs().sum(0), as_tuple=True)
    window = (rows.min().item(), rows.max().item(), columns.min().item(), columns.max().item())
    assert window[1] - window[0] + 1 <= RECEPTIVE_FIELD_LIMIT
    assert window[3] - window[2] + 1 <= RECEPTIVE_FIELD_LIMIT
    # What the gap between cues and objects relies on: nothing farther than it is seen.
    assert max(row - window[0], window[1] - row) < CUE_DISTANCE
    assert max(column - window[2], window[3] - column) < CUE_DISTANCE
    assert window[0] <= row <= window[1]
    assert window[2] <= column <= window[3]
