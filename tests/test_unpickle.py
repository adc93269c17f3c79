"""Pickles of strangers: plain data and numbers come out, and nothing in them runs."""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encnet_triton.unpickle import NUMBERS, Placeholder, load_pickle, printable

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def load(content: bytes, **options: Any) -> Any:
    return load_pickle(io.BytesIO(content), options.pop("allowed", NUMBERS), **options)


class Harmful:
    """Opens a file for writing where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


class Thing:
    def __init__(self) -> None:
        self.values = [1, 2]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_data_comes_out_as_it_went_in(protocol: int) -> None:
    shared = [1.5, -2, 10**30, True, None]
    document = {
        "text": "Straße \U0001f600", b"bytes": b"\0\xff", "pair": (1, "b"), "none": (), 7: shared,
        "again": shared, "set": {1, 2}, "frozen": frozenset("ab"), "four": (1, 2, 3, 4),
        "long": "x" * 300, "ordered": OrderedDict(b=1, a=2),
    }  # fmt: skip
    if protocol < 4:  # sets are calls there, which are refused
        del document["set"], document["frozen"]
    made = load(pickle.dumps(document, protocol))
    assert made == document
    assert made["again"] is made[7]
    assert list(made["ordered"]) == ["b", "a"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ["?", "u1", "<i2", ">i4", "<u8", ">f4", "f8", "c16"])
def test_arrays_and_scalars_of_numbers(protocol: int, dtype: str) -> None:
    values = np.arange(12).reshape(3, 4).astype(dtype)
    document = [values, np.asfortranarray(values), values[1, 2], values[:0]]
    made = load(pickle.dumps(document, protocol))
    for ours, theirs in zip(made, document, strict=True):
        # NumPy turns arrays of another order of bytes into its own.
        assert ours.dtype.newbyteorder("=") == theirs.dtype.newbyteorder("=")
        assert ours.shape == theirs.shape
        np.testing.assert_array_equal(ours, theirs)


def test_reading_an_array_of_other_bytes_leaves_numpys_own_types_alone() -> None:
    load(pickle.dumps(np.arange(3, dtype=">i4"), 2))
    assert np.dtype("i4").isnative and np.dtype(np.int32).isnative


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "value",
    [np.array([{}, []], object), np.array(["a"]), np.zeros(2, [("x", "f4")]), np.zeros(1, "M8[s]")],
    ids=["objects", "texts", "fields", "times"],
)
def test_arrays_of_anything_else_are_refused(value: np.ndarray, protocol: int) -> None:
    with pytest.raises(pickle.UnpicklingError):
        load(pickle.dumps(value, protocol))


def test_an_array_of_addresses_is_refused() -> None:
    """NumPy takes these bytes for objects, and the process ends when one is touched."""
    honest = pickle.dumps(np.array([0x4141414141414141], "<i8"), 2)
    assert honest.count(b"X\x02\x00\x00\x00i8") == 1
    with pytest.raises(pickle.UnpicklingError, match="something other than numbers"):
        load(honest.replace(b"X\x02\x00\x00\x00i8", b"X\x02\x00\x00\x00O8"))


def test_an_array_of_fewer_bytes_than_its_shape_is_refused() -> None:
    content = pickle.dumps(np.zeros((2, 7), "u1"), 2)
    assert content.count(b"K\x02K\x07\x86") == 1
    with pytest.raises(pickle.UnpicklingError, match=r"shape \(2, 9\) has 14 bytes"):
        load(content.replace(b"K\x02K\x07\x86", b"K\x02K\x09\x86"))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_in_a_pickle_runs(protocol: int, tmp_path: Path) -> None:
    content = pickle.dumps({"w": 1, "x": Harmful(tmp_path / "made"), "y": Thing()}, protocol)
    with pytest.raises(pickle.UnpicklingError, match=r"asks for .*open"):
        load(content)
    made = load(content, placeholders=True)
    assert not (tmp_path / "made").exists()
    assert made["w"] == 1
    assert isinstance(made["x"], Placeholder) and made["x"].name.endswith(".open")
    assert made["x"].arguments == (str(tmp_path / "made"), "w")
    assert made["y"].state == {"values": [1, 2]}


def test_placeholders_take_items_and_elements() -> None:
    class Names(dict):
        pass

    class Line(list):
        pass

    for cls in (Names, Line):
        cls.__qualname__ = cls.__name__
        globals()[cls.__name__] = cls
    made = load(pickle.dumps((Names(a=1), Line([2, 3]))), placeholders=True)
    assert made[0].items == {"a": 1} and made[1].elements == [2, 3]


def test_what_is_allowed_is_called_and_cannot_be_changed() -> None:
    def double(value: int) -> int:
        return 2 * value

    allowed = {("m", "double"): double}
    assert load(b"cm\ndouble\nK\x15\x85R.", allowed=allowed) == 42
    # Sets its default arguments, were it allowed to.
    with pytest.raises(pickle.UnpicklingError, match="sets attributes"):
        load(b"cm\ndouble\nN}X\x0c\x00\x00\x00__defaults__K\x05\x85s\x86b.", allowed=allowed)
    with pytest.raises(pickle.UnpicklingError, match="damaged: .*double"):
        load(b"cm\ndouble\n)R.", allowed=allowed)


def test_objects_kept_elsewhere() -> None:
    content = b"X\x01\x00\x00\x00aQ."
    assert load(content, persistent=lambda name: f"<{name}>") == "<a>"
    with pytest.raises(pickle.UnpicklingError, match="stored elsewhere"):
        load(content)


def test_texts_of_python_2() -> None:
    content = b"U\x02a\xe9."
    assert load(content, encoding="bytes") == b"a\xe9"
    assert load(content, encoding="latin-1") == "aé"
    with pytest.raises(pickle.UnpicklingError, match="damaged"):
        load(content)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x80\x04", id="no end"),
        pytest.param(b".", id="nothing on the stack"),
        pytest.param(b"h\x05.", id="not stored"),
        pytest.param(b"\x82\x01.", id="extension"),
        pytest.param(b"B" + struct.pack("<I", 2**32 - 1) + b"x.", id="longer than the file"),
        pytest.param(b"\x8e" + struct.pack("<Q", 2**63 - 1) + b"x.", id="far longer"),
        pytest.param(b"]]K\x01s.", id="a list as a key"),
        pytest.param(b"}" + b")" + 200_000 * b"\x85" + b"K\x01s.", id="a key as deep as a well"),
        pytest.param(b"K\x01)R.", id="a number is called"),
        pytest.param(b"K\x01K\x02a.", id="a number is a list"),
        pytest.param(b"t.", id="no mark"),
        pytest.param(b"(K\x01u.", id="a key without value"),
    ],
)
def test_damage_is_one_kind_of_error(content: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError):
        load(content)


def test_one_pickle_after_another() -> None:
    file = io.BytesIO(pickle.dumps([1]) + pickle.dumps("two") + b"rest")
    assert load_pickle(file, {}) == [1]
    assert load_pickle(file, {}) == "two"
    assert file.read() == b"rest"


def test_what_a_stranger_names_is_one_plain_line() -> None:
    with pytest.raises(pickle.UnpicklingError) as caught:
        load(b"cos\n\x1b[31mred\n.")
    assert str(caught.value) == "it asks for os. [31mred"
    assert printable("a" * 300) == "a" * 200 + " ..."
