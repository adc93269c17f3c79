"""The one-warp augmentation against a plain float64 warp, and its conventions one by one."""

import io
import math

import numpy as np
import pytest
from PIL import Image, ImageFilter

from encnet_triton.data import Augment, DataError
from encnet_triton.data.augment import Warp, make_warp, warp_image, warp_label

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

FILL = (124, 116, 104)
PLAIN = {"scale": (1.0, 1.0), "rotation": 0.0, "flip": 0.0}


def rng(seed=0):
    return np.random.default_rng(seed)


def smooth_image(height, width, seed=0):
    """Waves of about ten pixels in three channels."""
    y, x = np.mgrid[:height, :width] + rng(seed).uniform(0, 9, (2, 1, 1))
    waves = [np.sin(x / 5 + c) + np.cos(y / (4 + c)) for c in range(3)]
    return np.round(127 + 60 * np.stack(waves, axis=2)).astype(np.uint8)


def noise_image(height, width, seed=0):
    return rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def reference_positions(warp, size):
    """Continuous source coordinates of the output pixels' centres, in float64."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    return warp.a * x + warp.b * y + warp.c, warp.d * x + warp.e * y + warp.f


def reference_image(image, warp, size, fill):
    """Bilinear warp written from the definition: outside are pixels of colour `fill`."""
    x, y = (p - 0.5 for p in reference_positions(warp, size))  # in steps between pixel centres
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    total = np.zeros((*size, 3))
    for row in (top, top + 1):
        for column in (left, left + 1):
            weight = (1 - np.abs(y - row)) * (1 - np.abs(x - column))
            inside = (row >= 0) & (row < image.shape[0]) & (column >= 0) & (column < image.shape[1])
            colour = np.full((*size, 3), fill, float)
            colour[inside] = image[row[inside], column[inside]]
            total += weight[..., None] * colour
    return total


def reference_label(label, warp, size):
    x, y = (np.floor(p).astype(int) for p in reference_positions(warp, size))
    inside = (x >= 0) & (y >= 0) & (x < label.shape[1]) & (y < label.shape[0])
    sampled = np.full(size, 255)
    sampled[inside] = label[y[inside], x[inside]]
    return sampled


@pytest.mark.parametrize("picture", [smooth_image, noise_image], ids=["waves", "noise"])
@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    scale=st.floats(0.61, 3.0),
    degrees=st.floats(-180, 180),
    flip=st.booleans(),
    offset=st.tuples(st.integers(-40, 60), st.integers(-40, 60)),
)
def test_image_equals_the_float64_warp(picture, height, width, size, scale, degrees, flip, offset):
    warp = make_warp((height, width), scale=scale, degrees=degrees, flip=flip, offset=offset)
    image = picture(height, width)
    expected = reference_image(image, warp, size, FILL)
    actual = warp_image(Image.fromarray(image), warp, size, FILL)
    # Half a level of rounding, and float32 coordinates.
    assert np.abs(actual - expected).max() <= 0.51


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    scale=st.floats(0.2, 3.0),
    degrees=st.floats(-180, 180),
    flip=st.booleans(),
    offset=st.tuples(st.integers(-40, 60), st.integers(-40, 60)),
)
def test_label_equals_the_float64_warp(size, scale, degrees, flip, offset):
    label = rng().integers(0, 20, (41, 57), dtype=np.uint8)
    warp = make_warp(label.shape, scale=scale, degrees=degrees, flip=flip, offset=offset)
    actual = warp_label(label, warp, size)
    # Where a centre falls on a pixel's edge either neighbour is right.
    x, y = reference_positions(warp, size)
    clear = (np.abs(x - np.round(x)) > 0.01) & (np.abs(y - np.round(y)) > 0.01)
    np.testing.assert_array_equal(actual[clear], reference_label(label, warp, size)[clear])
    assert set(np.unique(actual)) <= set(np.unique(label)) | {255}


def test_without_scale_and_rotation_the_result_is_the_source():
    image, label = noise_image(37, 53), rng().integers(0, 9, (37, 53), dtype=np.uint8)
    pixels, classes = Augment((37, 53), **PLAIN)(Image.fromarray(image), label, rng())
    np.testing.assert_array_equal(pixels, image)
    np.testing.assert_array_equal(classes, label)
    assert pixels.dtype == classes.dtype == np.uint8


def test_flip_mirrors_left_and_right():
    image, label = noise_image(12, 17), rng().integers(0, 9, (12, 17), dtype=np.uint8)
    options = PLAIN | {"flip": 1.0}
    pixels, classes = Augment((12, 17), **options)(Image.fromarray(image), label, rng())
    np.testing.assert_array_equal(pixels, image[:, ::-1])
    np.testing.assert_array_equal(classes, label[:, ::-1])


@pytest.mark.parametrize("degrees", [90, -90, 180])
def test_rotation_turns_as_in_pillow(degrees):
    image, label = noise_image(16, 16), rng().integers(0, 9, (16, 16), dtype=np.uint8)
    warp = make_warp((16, 16), scale=1, degrees=degrees, flip=False, offset=(0, 0))
    turned = Image.fromarray(image).rotate(degrees)
    np.testing.assert_array_equal(
        warp_image(Image.fromarray(image), warp, (16, 16), FILL), np.asarray(turned)
    )
    np.testing.assert_array_equal(warp_label(label, warp, (16, 16)), np.rot90(label, degrees // 90))


def test_scale_by_two_has_half_pixel_centres():
    label = rng().integers(0, 9, (10, 14), dtype=np.uint8)
    warp = make_warp((10, 14), scale=2, degrees=0, flip=False, offset=(0, 0))
    np.testing.assert_array_equal(
        warp_label(label, warp, (20, 28)), np.kron(label, np.ones((2, 2)))
    )
    image = smooth_image(10, 14)
    enlarged = warp_image(Image.fromarray(image), warp, (20, 28), FILL).astype(int)
    peer = Image.fromarray(image).resize((28, 20), Image.Resampling.BILINEAR)
    inner = np.s_[1:-1, 1:-1]  # at the edge Pillow repeats pixels where we blend with the outside
    assert np.abs(enlarged - np.asarray(peer).astype(int))[inner].max() <= 1


def test_flip_comes_before_rotation():
    image = smooth_image(21, 31)
    mirrored = np.ascontiguousarray(image[:, ::-1])
    options = {"scale": 1.3, "degrees": 25, "offset": (3, -2)}
    flipped = warp_image(
        Image.fromarray(image), make_warp((21, 31), flip=True, **options), (30, 40), FILL
    )
    plain = warp_image(
        Image.fromarray(mirrored), make_warp((21, 31), flip=False, **options), (30, 40), FILL
    )
    assert np.abs(flipped.astype(int) - plain).max() <= 1


@pytest.mark.parametrize("seed", range(8))
def test_image_and_label_stay_together(seed):
    # The image's grey value says the label, in blocks large enough to have an inside.
    label = np.kron(rng(seed).integers(0, 5, (9, 12)), np.ones((12, 12))).astype(np.uint8)
    image = Image.fromarray(np.repeat(50 * label[..., None], 3, axis=2))
    augment = Augment(90, base_size=100, fill=(255, 255, 255))
    pixels, classes = augment(image, label, rng(seed))
    picture = Image.fromarray(classes)
    lowest, highest = (picture.filter(f(7)) for f in (ImageFilter.MinFilter, ImageFilter.MaxFilter))
    inside = np.zeros(classes.shape, bool)  # a block may end right beyond the crop
    inside[3:-3, 3:-3] = (np.asarray(lowest) == np.asarray(highest))[3:-3, 3:-3]
    assert inside.sum() > 500
    grey = np.where(classes == 255, 255, 50.0 * classes)
    np.testing.assert_array_equal(pixels[inside], np.repeat(grey[inside][:, None], 3, axis=1))


def test_outside_is_fill_and_ignored():
    image = Image.new("RGB", (20, 10), (9, 8, 7))
    label = np.full((10, 20), 3, np.uint8)
    augment = Augment((40, 60), **PLAIN, ignore_index=200, fill=(1, 2, 3))
    pixels, classes = augment(image, label, rng(3))
    assert (classes == 3).sum() == 200
    assert (classes == 200).sum() == 40 * 60 - 200
    np.testing.assert_array_equal(pixels[classes == 200], np.tile([1, 2, 3], (2200, 1)))
    np.testing.assert_array_equal(pixels[classes == 3], np.tile([9, 8, 7], (200, 1)))


def test_a_small_image_lies_at_the_top_left_on_request():
    image, label = Image.new("RGB", (80, 10), (9, 8, 7)), np.full((10, 80), 3, np.uint8)
    augment = Augment((40, 60), **PLAIN, fill=(0, 0, 0), top_left=True)
    for seed in range(4):
        pixels, classes = augment(image, label, rng(seed))
        assert (classes[:10] == 3).all() and (classes[10:] == 255).all()
        assert (pixels[10:] == 0).all()
    columns = {augment.draw((10, 80), rng(seed)).c for seed in range(200)}
    assert columns == set(range(21))  # the long side is cut anywhere, as ever


def test_a_crop_that_misses_the_image_is_all_fill():
    warp = make_warp((8, 8), scale=1, degrees=0, flip=False, offset=(100, -300))
    pixels = warp_image(Image.new("RGB", (8, 8)), warp, (5, 6), (1, 2, 3))
    np.testing.assert_array_equal(pixels, np.tile([1, 2, 3], (5, 6, 1)))
    assert (warp_label(np.zeros((8, 8), np.uint8), warp, (5, 6)) == 255).all()


@pytest.mark.parametrize(("image", "crop"), [((30, 50), 20), ((20, 30), 50)], ids=["cut", "padded"])
def test_crops_lie_at_every_whole_pixel(image, crop):
    # An image of its own coordinates says where the crop was taken.
    augment = Augment(crop, **PLAIN)
    offsets = [(augment.draw(image, rng(s)).f, augment.draw(image, rng(s)).c) for s in range(4000)]
    for axis in (0, 1):
        seen = {offset[axis] for offset in offsets}
        slack = image[axis] - crop
        assert seen == set(range(min(0, slack), max(0, slack) + 1))


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        pytest.param({"base_size": 100, "scale_by": "short"}, 0.5, 2.0, id="short edge"),
        pytest.param({"base_size": 100, "scale_by": "long"}, 0.25, 1.0, id="long edge"),
        pytest.param({"base_size": 77, "scale_by": "image"}, 0.5, 2.0, id="image"),
        pytest.param({"base_size": None, "scale_by": "long"}, 0.5, 2.0, id="no base size"),
    ],
)
def test_range_of_scales(options, low, high):
    augment = Augment(64, **options)
    scales = [augment.draw((100, 200), rng(seed)).scale for seed in range(400)]
    assert low <= min(scales) < low * 1.1
    assert high / 1.1 < max(scales) <= high * (1 + 1e-12)


def test_range_of_angles_and_share_of_flips():
    augment = Augment(64, rotation=10, flip=0.5)
    warps = [augment.draw((90, 120), rng(seed)) for seed in range(600)]
    angles = [math.degrees(math.atan2(w.d, w.e)) for w in warps]
    assert -10 <= min(angles) < -9.5
    assert 9.5 < max(angles) <= 10
    flips = sum(w.a < 0 for w in warps)
    assert 0.4 < flips / 600 < 0.6


def test_one_state_of_the_generator_gives_one_crop():
    image, label = Image.fromarray(noise_image(60, 80)), np.zeros((60, 80), np.uint8)
    augment = Augment(48)
    first, again, other = (augment(image, label, rng(s)) for s in (5, 5, 6))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])
    # Options do not shift what is drawn next from one generator.
    states = []
    for options in ({}, PLAIN):
        generator = rng(1)
        Augment(48, **options)(image, label, generator)
        states.append(generator.random())
    assert states[0] == states[1]


@pytest.mark.parametrize("encoded", ["jpeg", "png"])
def test_strong_shrinking_averages_instead_of_skipping(encoded):
    # Columns that alternate between black and white must become grey, not stripes.
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    memory = io.BytesIO()
    Image.fromarray(stripes).save(memory, encoded, **({"quality": 98} if encoded == "jpeg" else {}))
    for scale in (0.5, 0.3, 0.13):
        image = Image.open(memory)
        size = (int(256 * scale) - 2,) * 2
        warp = make_warp((256, 256), scale=scale, degrees=3, flip=False, offset=(1, 1))
        inner = warp_image(image, warp, size, (127, 127, 127))[4:-4, 4:-4]
        assert np.abs(inner.astype(int) - 127).max() <= 12


@pytest.mark.parametrize("flip", [False, True], ids=["plain", "flipped"])
@pytest.mark.parametrize("encoded", ["jpeg", "png"])
@pytest.mark.parametrize("scale", [0.59, 0.4, 0.2, 0.1])
def test_shrinking_keeps_positions(scale, encoded, flip):
    # A linear ramp keeps its values under any correct averaging.
    y, x = np.mgrid[:240, :320] + 0.5
    ramp = np.round(np.stack([x / 320 * 255, y / 240 * 255, 0 * x], axis=2)).astype(np.uint8)
    warp = make_warp((240, 320), scale=scale, degrees=5, flip=flip, offset=(2, 3))
    size = (int(240 * scale), int(320 * scale))
    source_x, source_y = reference_positions(warp, size)
    inside = (source_x > 20) & (source_x < 300) & (source_y > 20) & (source_y < 220)
    warped = []
    for picture in (ramp, 255 - ramp):
        memory = io.BytesIO()
        options = {"quality": 100, "subsampling": 0} if encoded == "jpeg" else {}
        Image.fromarray(picture).save(memory, encoded, **options)
        warped.append(warp_image(Image.open(memory), warp, size, FILL).astype(float))
    # Half the difference of a ramp and its negative is free of the rounding of halves.
    position = (warped[0] - warped[1] + 255) / 2
    for channel, expected in enumerate((source_x / 320 * 255, source_y / 240 * 255)):
        error = (position[..., channel] - expected)[inside]
        # The ramps rise by 0.8 and 1.06 per pixel of the source.
        assert abs(error.mean()) < 0.2
        assert error.std() < 1


def test_lazy_and_decoded_images_give_the_same_crop():
    memory = io.BytesIO()
    Image.fromarray(smooth_image(120, 160)).save(memory, "jpeg", quality=95)
    label = np.zeros((120, 160), np.uint8)
    lazy = Augment(96, scale=(0.7, 2))(Image.open(memory), label, rng(4))
    decoded = Augment(96, scale=(0.7, 2))(Image.open(memory).convert("RGB"), label, rng(4))
    np.testing.assert_array_equal(lazy[0], decoded[0])


def test_a_warp_knows_its_scale():
    assert Warp(0.5, 0, 0, 0, 0.5, 0).scale == 2
    assert make_warp((9, 9), scale=0.7, degrees=33, flip=True, offset=(1, 2)).scale == (
        pytest.approx(0.7)
    )


def test_truncated_image_is_refused():
    memory = io.BytesIO()
    Image.fromarray(noise_image(90, 90)).save(memory, "jpeg")
    image = Image.open(io.BytesIO(memory.getvalue()[:2000]))
    with pytest.raises(DataError, match="truncated or damaged"):
        Augment(32)(image, np.zeros((90, 90), np.uint8), rng())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"crop": 0}, "crop must be a positive size.*got 0", id="crop"),
        pytest.param({"crop": (4, 5, 6)}, r"crop must be.*got \(4, 5, 6\)", id="three sizes"),
        pytest.param({"base_size": 0}, "base_size must be at least 1", id="base size"),
        pytest.param({"scale": (2, 1)}, r"scale must be.*got \(2, 1\)", id="scale order"),
        pytest.param({"scale": (0, 1)}, "scale must be two positive", id="scale zero"),
        pytest.param({"scale_by": "area"}, "one of short, long, image, got 'area'", id="scale_by"),
        pytest.param({"rotation": 200}, "rotation must be within 0..180", id="rotation"),
        pytest.param({"flip": 1.5}, "flip must be a probability", id="flip"),
        pytest.param({"ignore_index": 256}, "ignore_index must be within", id="ignore_index"),
        pytest.param({"fill": (0, 0, 300)}, "fill must be three RGB values", id="fill"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Augment(**({"crop": 8} | options))
