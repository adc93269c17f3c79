"""Photos as users have them: damaged files, macOS companions, brackets in names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from encnet_triton.data import default_palette
from encnet_triton.models import create_model
from encnet_triton.predict import main
from encnet_triton.weights.checkpoint import ModelInfo, save_model
from tests.support.ranks import exit_statuses

NAMES = ("sky", "[bold]road", "wall [/old] :car:")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "best.safetensors"
    model = create_model("fcn", 3, backbone="demo", head_channels=8)
    info = ModelInfo(
        options=model.options, classes=list(NAMES), palette=default_palette(3).tolist(),
        mean=[0.5] * 3, std=[0.25] * 3, crop=[32, 32],
        data={"name": "folder", "root": None, "split": "val", "options": {}},
    )  # fmt: skip
    save_model(path, model, info)
    return str(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos [/x]"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(5):
        pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"photo{number}.jpg")
    return folder


def labelled(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*_label.png"))


def test_hidden_companions_are_left_out_and_brackets_are_text(
    checkpoint: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "._photo1.jpg").write_bytes(b"\0\5\x16\7" + bytes(4000))
    (photos / "folder.jpg").mkdir()
    (photos / "[b]1.heic").touch()
    output = tmp_path / "out [red]"
    assert main(["--checkpoint", checkpoint, str(photos), "--output", str(output)]) == 0
    assert labelled(output) == [f"photo{i}_label.png" for i in range(5)]
    said = capsys.readouterr().out
    assert "left out, not named as pictures are: [b]1.heic\n" in said
    assert f"{photos / 'photo0.jpg'}: " in said and f"wrote 10 pictures to {output}" in said
    assert any(f"{name} " in said for name in NAMES[1:]) or "sky 100.0%" in said


@pytest.mark.parametrize("processes", [1, 2])
def test_damaged_photos_are_listed_after_the_others(
    checkpoint: str, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], processes: int
) -> None:
    for number in (1, 4):
        path = photos / f"photo{number}.jpg"
        path.write_bytes(path.read_bytes()[:700])
    Image.fromarray(np.ones((4, 4), np.float32)).save(photos / "depth.tif")
    output = tmp_path / "out"
    arguments = ["--checkpoint", checkpoint, str(photos), "--output", str(output)]
    if processes == 1:
        assert main(arguments) == 1
    else:
        assert exit_statuses(main, arguments, processes) == [1, 1]
    assert labelled(output) == [f"photo{i}_label.png" for i in (0, 2, 3)]
    said = capfd.readouterr()
    assert said.out.count("wrote 6 pictures") == 1 and said.out.count("photo0.jpg: ") == 1
    assert said.err.count("error: 3 of 6 images cannot be read:") == 1
    for name in ("photo1.jpg", "photo4.jpg", "depth.tif"):
        assert said.err.count(name) == 1
    assert "Traceback" not in said.err


def test_no_image_that_is_read_is_written_over(
    checkpoint: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as somebody's own labels, or the pictures of the call before."""
    own = photos / "photo1_label.png"
    Image.new("L", (50, 40), 7).save(own)
    before = own.read_bytes()
    command = ["--checkpoint", checkpoint, str(photos), "--output"]
    assert main([*command, str(photos.parent / photos.name)]) == 2
    said = capsys.readouterr().err
    assert f"{own} is one of the images" in said and "photo1.jpg" in said
    assert own.read_bytes() == before and labelled(photos) == [own.name]
    own.unlink()
    assert main([*command, str(photos)]) == 0
    assert main([*command, str(photos)]) == 2


def test_what_cannot_be_labelled_at_all(
    checkpoint: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "._a.jpg").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"x")
    photo = str(photos / "photo0.jpg")
    for arguments, sentence in (
        ([str(tmp_path / "none.jpg")], "none.jpg does not exist"),
        ([str(tmp_path / "empty")], "has no images"),
        ([photo, photo], "would both be written as photo0_label.png"),
        ([photo, "--output", str(tmp_path / "file")], "file"),
        ([photo, "--scales", "0"], "scales must be"),
    ):
        assert main(["--checkpoint", checkpoint, *arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and sentence in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("batch", ["0", "-1", "x", "1.5"])
def test_numbers_out_of_range_name_their_option(
    checkpoint: str, photos: Path, capsys: pytest.CaptureFixture[str], batch: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--checkpoint", checkpoint, str(photos), f"--batch={batch}"])
    assert ended.value.code == 2
    assert f"--batch: '{batch}' is not a whole number of at least 1" in capsys.readouterr().err
