"""What single singular directions see in an image, before and after training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from svftool import decompose, open_factors
from svftool.cli import app
from svftool.errors import FactorsError, ModelError
from svftool.factors import write_tuned
from svftool.report.inspect.feature_maps import caption
from svftool.stages.feature_maps import DirectionMap, _grid, feature_maps

MODEL = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4),
    )
"""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4),
    )  # fmt: skip


@pytest.fixture
def trained(tmp_path: Path) -> dict[str, Path]:
    """Decompose a small network and move singular values of its two convolutions."""
    net = network()
    save_file(net.state_dict(), tmp_path / "base.safetensors", metadata={"format": "pt"})
    (tmp_path / "model.py").write_text(MODEL)
    decompose(tmp_path / "base.safetensors", tmp_path / "factors")
    with open_factors(tmp_path / "factors") as store:
        S = {name: store.read_S(name).clone() for name in ("0.weight", "2.weight")}
        S["2.weight"][3] *= 1.5
        S["2.weight"][1] *= 0.9
        S["0.weight"][0] *= 1.01
        write_tuned(tmp_path / "tuned.svf.safetensors", store=store, S=S, whole={})
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return {
        "factors": tmp_path / "factors",
        "tuned": tmp_path / "tuned.svf.safetensors",
        "image": tmp_path / "image.png",
        "model": tmp_path / "model.py",
        "folder": tmp_path,
    }


def test_maps_are_responses_to_single_directions(trained: dict[str, Path]):
    result = feature_maps(
        trained["factors"], trained["tuned"], trained["image"], model=f"{trained['model']}:net"
    )
    first = result.maps[0]
    assert [(m.layer, m.moved) for m in result.maps[:4]] == [
        ("2.weight", "most"),
        ("2.weight", "most"),
        ("2.weight", "least"),
        ("2.weight", "least"),
    ]
    assert {m.layer for m in result.maps} == {"2.weight", "0.weight"}
    assert {first.index, result.maps[1].index} == {1, 3}
    assert all(m.S_base == m.S for m in result.maps[2:4])
    assert result.picture.shape == (3, 20, 24)


def test_the_responses_of_all_directions_make_the_layers_output(trained: dict[str, Path]):
    result = feature_maps(
        trained["factors"],
        trained["tuned"],
        trained["image"],
        model=f"{trained['model']}:net",
        layers=1,
        directions=3,
    )
    maps = {m.index: m for m in result.maps}
    assert sorted(maps) == [0, 1, 2, 3, 4]
    net = network().eval()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with open_factors(trained["factors"]) as store, torch.no_grad():
        factors = store.read("2.weight")
        given = ((result.picture.float() / 255 - mean) / std)[None]
        hidden = net[1](net[0](given))
        wanted = net[2](hidden)[0] - net[2].bias[:, None, None]
        before = torch.stack([maps[i].before for i in range(5)])
        torch.testing.assert_close(
            torch.einsum("oi,ihw->ohw", factors.U, before), wanted, atol=1e-4, rtol=1e-4
        )
        changed = first_layer_changed(net, store.read("0.weight"))
        S = factors.S.clone()
        S[3] *= 1.5
        S[1] *= 0.9
        weight = (factors.U * S @ factors.Vh).view(5, 6, 3, 3)
        tuned = F.conv2d(net[1](F.conv2d(given, changed, net[0].bias, 2, 1)), weight, padding=1)[0]
        after = torch.stack([maps[i].after for i in range(5)])
        torch.testing.assert_close(
            torch.einsum("oi,ihw->ohw", factors.U, after), tuned, atol=1e-4, rtol=1e-4
        )


def first_layer_changed(net: nn.Sequential, factors: object) -> Tensor:
    U, S, Vh = factors.U, factors.S.clone(), factors.Vh  # type: ignore[attr-defined]
    S[0] *= 1.01
    return (U * S @ Vh).view(6, 3, 3, 3)


def test_what_did_not_move_or_has_no_positions_is_refused(trained: dict[str, Path]):
    arguments = (trained["factors"], trained["folder"] / "x.svf.safetensors", trained["image"])
    model = f"{trained['model']}:net"
    with open_factors(trained["factors"]) as store:
        S = {"2.weight": store.read_S("2.weight")}
        write_tuned(arguments[1], store=store, S=S, whole={})
    with pytest.raises(FactorsError, match="no singular value moved"):
        feature_maps(*arguments, model=model)
    with open_factors(trained["factors"]) as store:
        arguments[1].unlink()
        S = {"5.weight": store.read_S("5.weight") * 2} if "5.weight" in store.layers else {}
        if not S:
            pytest.skip("the head is not decomposed by default")
        write_tuned(arguments[1], store=store, S=S, whole={})
    with pytest.raises(ModelError, match="looks at positions"):
        feature_maps(*arguments, model=model)


def test_tokens_are_laid_on_a_square_grid():
    assert _grid(196) == (14, 0)
    assert _grid(197) == (14, 1)
    assert _grid(201) == (14, 5)
    assert _grid(2) is None
    assert _grid(14 * 14 + 20) is None


def test_a_caption_says_how_far_a_direction_moved():
    one = DirectionMap("conv.weight", 3, "most", 2.0, 2.5, torch.ones(1), torch.ones(1))
    assert caption(one) == "conv.weight\n3, moved most\nS 2 to 2.5 (+25.0 %)"


def test_inspect_writes_the_figure_by_a_flag(trained: dict[str, Path]):
    pytest.importorskip("matplotlib")
    out = trained["folder"] / "maps.png"
    arguments = ["inspect", trained["factors"], trained["tuned"], "--feature-maps", out, "-q"]
    arguments += ["--image", trained["image"], "--model", f"{trained['model']}:net"]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.stderr
    with Image.open(out) as figure:
        assert figure.size[0] > 500
    again = CliRunner().invoke(app, [str(a) for a in arguments])
    assert (again.exit_code, "--force" in again.stderr) == (2, True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--feature-maps", "x.png"], "--feature-maps needs --image"),
        (["--image", "x.jpg"], "--image is looked at by --feature-maps alone"),
        (["--feature-maps", "x.bmp", "--image", "x.jpg"], "suffix '.bmp', expected .png"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    trained: dict[str, Path], given: list[str], message: str
):
    arguments = ["inspect", str(trained["factors"]), str(trained["tuned"]), *given]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
