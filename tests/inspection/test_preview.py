# SPDX-License-Identifier: Apache-2.0
import re
import struct
import zlib
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image

from anomalib_twostage import PerlinAnomaly, SuperpixelAnomaly
from anomalib_twostage.inspection.preview import draw_paint, main, read_images
from anomalib_twostage.pseudo_anomaly import vary_illumination
from tests.conftest import photograph

from .page_data import huge_image


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """Ten crops of a photograph, one of them grey and one in a subfolder."""
    folder = tmp_path / "good"
    (folder / "more").mkdir(parents=True)
    pixels = (photograph("coffee") * 255).astype(np.uint8)
    for i in range(9):
        Image.fromarray(pixels[20 * i : 20 * i + 90, 50 : 50 + 120]).save(folder / f"{i}.png")
    Image.fromarray(pixels[:90, :120]).convert("L").save(folder / "more" / "grey.jpg")
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_images_are_resized_and_evenly_spaced(good: Path) -> None:
    images = read_images(good, (64, 80), count=5)
    assert images.shape == (5, 3, 64, 80)
    everything = read_images(good, (64, 80), count=99)
    assert len(everything) == 10
    assert torch.equal(images, everything[::2])
    grey = everything[9]
    assert torch.equal(grey[0], grey[1])
    assert 0 <= images.min() < images.max() <= 1


def test_every_row_shows_image_paint_mask_and_difference() -> None:
    images = torch.rand(2, 3, 64, 64)
    torch.manual_seed(3)
    picture, shares = draw_paint(images, {"a": PerlinAnomaly(probability=1.0), "b": SuperpixelAnomaly(probability=1.0)})
    torch.manual_seed(3)
    outcomes = {}
    for name, kind in (("a", PerlinAnomaly), ("b", SuperpixelAnomaly)):
        lit = vary_illumination(images)
        outcomes[name] = (lit, *kind(probability=1.0)(lit))
    pixels = np.asarray(picture)
    for i in range(2):
        expected = [images[i]]
        for lit, painted, masks in outcomes.values():
            difference = 2 * (painted[i] - lit[i]).abs().amax(dim=0)
            heat = mpl.colormaps["inferno"](difference.clamp(0, 1).numpy(), bytes=True)[..., :3]
            expected += [painted[i], masks[i].expand(3, -1, -1), heat]
        for column, panel in enumerate(expected):
            if isinstance(panel, torch.Tensor):
                panel = (panel.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
            assert (pixels == panel[0, 0]).all(axis=2).any()
            assert contains(pixels, panel), (i, column)
    for name, (*_, masks) in outcomes.items():
        torch.testing.assert_close(shares[name], masks.mean(dim=(1, 2, 3)))


def contains(picture: np.ndarray, panel: np.ndarray) -> bool:
    """Whether the panel stands somewhere in the picture."""
    height, width = panel.shape[:2]
    corners = np.argwhere((picture[: -height + 1, : -width + 1] == panel[0, 0]).all(axis=2))
    return any(np.array_equal(picture[y : y + height, x : x + width], panel) for y, x in corners)


def test_the_command_writes_a_picture_and_prints_the_share(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def run(*options: str) -> tuple[np.ndarray, str]:
        out = tmp_path / "paint.png"
        main([str(good), "--out", str(out), "--image_size", "64", "80", "--count", "3", *options])
        return np.asarray(Image.open(out)), capsys.readouterr().out

    picture, output = run()
    assert picture.shape[0] > 3 * 64
    assert picture.shape[1] > 7 * 80
    assert "Perlin paint: " in output
    assert "superpixel paint: " in output
    assert "paint.png" in output
    again, _ = run("--seed", "0")
    np.testing.assert_array_equal(again, picture)
    other, _ = run("--seed", "1")
    assert not np.array_equal(other, picture)


def test_the_command_paints_with_the_given_textures_and_opacity(good: Path, tmp_path: Path) -> None:
    # The painter draws its paint from several sources, so look at many images for the one colour of the textures.
    (tmp_path / "textures").mkdir()
    Image.new("RGB", (64, 64), (255, 0, 255)).save(tmp_path / "textures/magenta.png")

    def magenta(*options: str) -> float:
        out, share = tmp_path / "paint.png", 0.0
        always = ["--image_size", "64", "--count", "10", "--opacity", "1", "1", *options]
        for seed in range(4):
            main([str(good), "--out", str(out), "--seed", str(seed), *always])
            pixels = np.asarray(Image.open(out)).astype(int)
            share += float((pixels[..., [0, 2]].min(axis=2) - pixels[..., 1] > 100).mean())
        return share

    assert magenta("--texture_dir", str(tmp_path / "textures")) > 2 * magenta()


def with_empty_gamma(png: bytes) -> bytes:
    """A PNG with a chunk of gamma that holds none, of which Pillow says nothing but what is wrong with the chunk."""
    end_of_header = 33
    chunk = struct.pack(">I4sI", 0, b"gAMA", zlib.crc32(b"gAMA"))
    return png[:end_of_header] + chunk + png[end_of_header:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["missing"], "missing does not exist"),
        (["empty"], "empty holds no image"),
        (["good/0.png"], "good/0.png is a file.*give the folder"),
        (["good", "--out", "nowhere/paint.png"], "nowhere of --out does not exist"),
        (["good", "--out", "paint.xyz"], "paint.xyz"),
        (["good", "--out", "good/paint.png"], "good/paint.png of --out lies among the images.*name another place"),
        (["."], r"preview.png of --out lies among the images"),
        (["good", "--out", "pictures.png"], "pictures.png of --out is a folder"),
        (["good", "--image_size", "16"], "16"),
        (["good", "--image_size", "64", "1000000"], "1000000"),
        (["good", "--seed", str(2**70)], rf"--seed.*{2**32 - 1}.*{2**70}"),
        (["good", "--seed", "-1"], "--seed.*-1"),
        (["good", "--image_size", "64", "64", "64"], "64, 64, 64"),
        (["good", "--count", "0"], "--count.*0"),
        (["good", "--opacity", "0.9", "0.1"], "opacity.*0.9, 0.1"),
        (["good", "--texture_dir", "missing"], "missing"),
        (["broken"], "broken.png as an image"),
        (["huge"], "huge.png as an image .*400000000 pixels"),
        (["damaged"], "damaged.png as an image"),
        (["deep"], "deep.png.*8 bits"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(
    change: list[str], message: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    for name in ("empty", "broken", "huge", "damaged", "deep", "pictures.png"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken/broken.png").write_bytes((good / "0.png").read_bytes()[:500])
    (tmp_path / "huge/huge.png").write_bytes(huge_image())
    (tmp_path / "damaged/damaged.png").write_bytes(with_empty_gamma((good / "0.png").read_bytes()))
    Image.fromarray(np.full((64, 64), 3000, np.uint16)).save(tmp_path / "deep/deep.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(change)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "error: " in error
    assert re.search(message, error), error
    assert not [path for path in tmp_path.rglob("p*") if path.is_file()]
