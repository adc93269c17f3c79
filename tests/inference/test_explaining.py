"""What a Context Encoding module sees, against the module itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from encnet_triton.data import default_palette
from encnet_triton.inference.explaining import Explainer, assignment, explanation_picture
from encnet_triton.models import create_model
from encnet_triton.nn import ContextEncoding
from encnet_triton.predict import main
from encnet_triton.weights.checkpoint import ModelInfo, save_model

CROP = [32, 48]


def network(name: str = "encnet", **options: Any) -> tuple[nn.Module, ModelInfo]:
    torch.manual_seed(0)
    model = create_model(name, 3, backbone="demo", head_channels=8, **options).eval()
    info = ModelInfo(
        model.options, ["sky", "road", "wall"], default_palette(3).tolist(), [0.5] * 3, [0.25] * 3,
        CROP, scale_by="image",
    )  # fmt: skip
    return model, info


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("shake", [False, True])
def test_the_shares_are_those_of_the_encoding(form: Any, shake: bool) -> None:
    """Sum over the pixels of share x residual is what the layer returns (paper, equation 1)."""
    torch.manual_seed(1)
    context = ContextEncoding(6, 3, 5, form, shake_scale=shake).double().eval()
    x = torch.randn(1, 6, 4, 7, dtype=torch.float64)
    shares = assignment(context, x)
    assert shares.shape == (5, 4, 7)
    torch.testing.assert_close(shares.sum(0), torch.ones(4, 7, dtype=torch.float64))
    features = x if context.project is None else context.project(x)
    pixels = features[0].flatten(1).T
    code = torch.stack(
        [
            (share.flatten()[:, None] * (pixels - codeword)).sum(0)
            for share, codeword in zip(shares, context.encoding.codewords, strict=True)
        ]
    )
    torch.testing.assert_close(code, context.encoding(features)[0])


@pytest.mark.parametrize("form", ["paper", "released"])
def test_gates_presence_and_labels_are_the_networks(form: str) -> None:
    model, info = network(form=form)
    image = photo(*CROP)
    found = Explainer(model, info, "cpu")(image)
    x = ((torch.tensor(image) / 255 - 0.5) / 0.25).permute(2, 0, 1)[None]
    seen = []
    hook = model.head.context.register_forward_hook(lambda _, x, y: seen.append((x[0], y[0])))
    with torch.no_grad():
        output = model(x)
        given, gated = seen[0]
        gates = torch.from_numpy(found.gates)[:, None, None]
        again = given * gates if form == "paper" else torch.relu(given * (1 + gates))
        torch.testing.assert_close(again, gated)
    hook.remove()
    np.testing.assert_allclose(found.presence, output.se[0][0].sigmoid(), rtol=1e-5)
    up = torch.nn.functional.interpolate(
        output.logits, CROP, mode="bilinear", align_corners=model.align_corners
    )
    assert (found.label == up[0].argmax(0).numpy()).mean() > 0.99  # near ties may differ
    assert len(model.head.context._forward_hooks) == 0


@pytest.mark.parametrize(
    ("size", "seen", "shares"),
    [
        pytest.param((64, 96), (32, 48), (8, 12), id="larger than the crop"),
        pytest.param((128, 48), (32, 12), (8, 3), id="taller than the crop"),
        pytest.param((16, 24), (16, 24), (4, 6), id="smaller than the crop"),
    ],
)
def test_one_window_of_the_image_and_not_its_border(
    size: tuple[int, int], seen: tuple[int, int], shares: tuple[int, int]
) -> None:
    found = Explainer(*network(), "cpu")(photo(*size))
    assert found.image.shape == (*seen, 3) and found.label.shape == seen
    assert found.assignment.shape == (32, *shares)


@pytest.mark.parametrize("options", [{}, {"num_codewords": 0}, {"se_loss": False}])
def test_a_picture_of_whatever_the_network_has(options: dict[str, Any]) -> None:
    model, info = network(**options)
    found = Explainer(model, info, "cpu")(photo(40, 40))
    assert (found.assignment is None) == (options.get("num_codewords") == 0)
    assert (found.presence is None) == (options.get("se_loss") is False)
    picture = explanation_picture(found, info)
    whole = explanation_picture(Explainer(*network(), "cpu")(photo(40, 40)), info)
    assert picture.width <= whole.width
    assert (picture.height < whole.height) == bool(options)


def test_predict_explains_an_encnet_and_refuses_others(tmp_path: Path, capsys) -> None:
    Image.fromarray(photo(40, 50)).save(tmp_path / "a.jpg")
    for name, status in (("encnet", 0), ("fcn", 2)):
        save_model(tmp_path / "model.safetensors", *network(name))
        command = ["--checkpoint", str(tmp_path / "model.safetensors"), str(tmp_path / "a.jpg")]
        assert main([*command, "--explain", "--output", str(tmp_path / name)]) == status
        said = capsys.readouterr()
    assert "only an EncNet has codewords and gates to explain; this is fcn" in said.err
    written = sorted(path.name for path in (tmp_path / "encnet").iterdir())
    assert written == ["a_explained.png", "a_label.png", "a_overlay.png"]
    assert list((tmp_path / "fcn").iterdir()) == []
