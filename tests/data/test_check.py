"""Warnings about a data set before a run: from the command, and from the trainer at its start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from encnet_triton.data import DataError, Folder, create_dataset
from encnet_triton.data.__main__ import main
from encnet_triton.data.base import class_difference
from encnet_triton.data.check import check_split, first_look, refuse_unlabelled


def folder(root: Path, *labels: np.ndarray, classes: str = "background\npolyp") -> Path:
    """The same labels in both splits."""
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for number, label in enumerate(labels):
            picture = Image.fromarray(np.asarray(label, np.uint8))
            picture.save(root / "labels" / split / f"{number}.png")
            picture.convert("RGB").save(root / "images" / split / f"{number}.jpg")
    (root / "classes.txt").write_text(classes)
    return root


def test_a_file_may_have_a_number_for_its_name(tmp_path: Path) -> None:
    root = folder(tmp_path, np.zeros((4, 4)))
    (root / "classes.txt").rename(root / "2024")
    assert main(["check", "folder", "--data", str(root), "--classes-file", "2024"]) == 0


MASK = np.kron([[0, 255], [0, 0]], np.ones((4, 4)))


def test_masks_of_0_and_255_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path, MASK)
    sentence = (
        "'background' is the only class, no pixel has another; 25.0% of the pixels are ignored "
        "(label value 255): if that stands for 'polyp', say --label-map 255=1"
    )
    assert first_look(Folder(root)) == [f"in 1 of 1 labels, {sentence}"]
    assert main(["check", "folder", "--data", str(root)]) == 0
    assert capsys.readouterr().out.count(sentence) == 2
    assert main(["check", "folder", "--data", str(root), "--label-map", "255=1"]) == 0
    assert "only class" not in capsys.readouterr().out
    assert first_look(Folder(root, label_map="255=1")) == []
    assert main(["check", "folder", "--data", str(root), "--ignore-label", "254"]) == 1
    assert "0.png has the value 255, but the 2 classes" in capsys.readouterr().out


def test_values_without_a_class_are_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path, *np.array([[[0, 11]], [[1, 1]], [[37, 1]], [[2, 200]]]))
    data = ["check", "folder", "--data", str(root), "--split", "val"]
    assert main(data) == 1
    said = capsys.readouterr().out
    assert "val: 4 images" in said and ": 3 cannot be used" in said
    assert said.count("has the value") == 1
    assert "0.png has the value 11, but the 2 classes" in said
    assert "label_map: none); 2 more labels have such values: 2, 37, 200\n" in said
    option = "--ignore-label 2,11,37,200,255"
    assert f"if these values mean no class, say {option};" in said
    assert main([*data, *option.split()]) == 0
    several = check_split(Folder(root, "val", ignore_label="11,37,255"))
    assert "3.png has the values 2, 200, but" in several.problems[0]
    assert "more" not in several.problems[0]


@pytest.mark.parametrize(
    "options",
    [["--ignore-label", "11"], ["--ignore-label=0,11"], ["--option", "ignore_label=0,11"]],
)
def test_options_of_a_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    root = folder(tmp_path, np.array([[0, 1, 11, 1]]))
    assert main(["check", "folder", "--data", str(root), *options]) == 0
    share = "25.0%" if options[-1] == "11" else "50.0%"
    said = capsys.readouterr().out
    assert f"{share} of pixels ignored: each can be used" in said
    assert "all opened, 1 pixels high, 4 wide, " in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--every", "0"], "--every: '0' is not a whole number of at least 1"),
        (["--every", "-1"], "--every: '-1' is not a whole number of at least 1"),
        (["--workers", "0"], "--workers: '0' is not a whole number of 1 to"),
    ],
)
def test_numbers_out_of_range_name_their_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit):
        main(["check", "folder", "--data", str(tmp_path), *options])
    assert sentence in capsys.readouterr().err
    with pytest.raises(ValueError, match="must be at least 1"):
        check_split(create_dataset("scenes", "val"), every=0)


def test_wrong_options_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path, MASK)
    for options, sentence in (
        (["--num-classes", "59"], "data set 'folder' has no option 'num_classes'"),
        (["--option", "classes_file"], "'classes_file' must be NAME=VALUE"),
        (["--option", "root=/"], "'root=/' is not an option of the data set"),
        (["--label-offset", "x"], "label_offset is 'x', but must be a whole number"),
        (["--label-map", "255"], "label_map is 255, but must be pairs VALUE=CLASS"),
    ):
        assert main(["check", "folder", "--data", str(root), *options]) > 0
        said = capsys.readouterr()
        assert sentence in said.out + said.err
    with pytest.raises(DataError, match="give its folder with --data"):
        create_dataset("folder", "train")


def test_brackets_in_names_are_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "a [/b]", MASK, classes="[bold]sky\n[/dead]\n:car:")
    (root / "[x].txt").write_text("images/val/0.jpg labels/train/1.png")
    assert main(["check", "folder", "--data", str(root), "--split", "train", "--split", "[x]"]) == 1
    said = capsys.readouterr().out
    assert (
        "[bold]sky" in said and "'[/dead]'" in said and ":car:" in said and "[x]: error: " in said
    )
    assert str(root) in said


def test_a_split_without_a_labelled_pixel(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path, np.full((3, 3), 255), np.full((3, 3), 255))
    with pytest.raises(DataError, match=r"^val: no pixel of 2 images has a class; .* \(255\)"):
        refuse_unlabelled(Folder(root, "val"), "val")
    assert main(["check", "folder", "--data", str(root), "--split", "val"]) == 1
    assert "no pixel of 2 images has a class" in capsys.readouterr().out
    Image.fromarray(np.array([[255, 1, 255]] * 3, np.uint8)).save(root / "labels/val/1.png")
    refuse_unlabelled(Folder(root, "val"), "val")


def test_class_lists_are_compared_to_their_end() -> None:
    names = [f"class{i}" for i in range(20)]
    assert class_difference(names, list(names)) is None
    assert class_difference(names, [*names[:19], "x"]) == "class 19 is 'class19', not 'x'"
    assert class_difference(names, names[:19]) == "class 19 is 'class19', not missing"
    assert class_difference(names, [*names, "x"]) == "class 20 is missing, not 'x'"
