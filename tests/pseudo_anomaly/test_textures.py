# SPDX-License-Identifier: Apache-2.0
import logging
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import torch
from PIL import Image

from anomalib_twostage.pseudo_anomaly import textures
from anomalib_twostage.pseudo_anomaly.textures import builtin_textures, folder_textures

RAMP = np.arange(256, dtype=np.uint8).reshape(1, -1).repeat(256, axis=0)


def save(path: Path, array: np.ndarray = RAMP) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def flat(value: int) -> np.ndarray:
    return np.full((300, 280, 3), value, np.uint8)


def test_builtin_textures_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError(arguments)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    pictures = builtin_textures()
    assert pictures.dtype == torch.uint8
    assert pictures.shape == (len(textures._BUILTIN), 3, 256, 256)


def test_builtin_textures_come_with_the_wheel_of_scikit_image() -> None:
    # Whatever else scikit-image offers is downloaded and would be found in a cache only.
    shipped = {path.stem for path in (Path(skimage.__file__).parent / "data").iterdir()}
    aliases = {"hubble_deep_field": "hubble_deep_field", "page": "page"}
    assert {aliases.get(name, name) for name in textures._BUILTIN} <= shipped


def test_builtin_textures_are_pictures_and_differ() -> None:
    pictures = builtin_textures().float()
    assert (pictures.std(dim=(1, 2, 3)) > 10).all()
    apart = torch.cdist(pictures.flatten(1), pictures.flatten(1)) / pictures[0].numel() ** 0.5
    assert (apart + 1000 * torch.eye(len(pictures))).min() > 20


def test_builtin_textures_leave_the_sample_materials_out() -> None:
    assert not {"brick", "grass", "gravel"} & set(textures._BUILTIN)


def test_a_folder_is_searched_with_its_subfolders_in_order(tmp_path: Path) -> None:
    for value, name in ((10, "a.png"), (20, "b/c.jpg"), (30, "b/d/e.BMP"), (40, "f.tif"), (50, "g.webp")):
        save(tmp_path / name, flat(value))
    (tmp_path / "notes.txt").write_text("no image")
    pictures = folder_textures(tmp_path)
    assert pictures.dtype == torch.uint8
    assert pictures.shape == (5, 3, 256, 256)
    torch.testing.assert_close(
        pictures.float().mean(dim=(1, 2, 3)), torch.tensor([10.0, 20, 30, 40, 50]), atol=2, rtol=0
    )


def test_a_name_given_as_text_is_a_folder_too(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    assert torch.equal(folder_textures(str(tmp_path)), folder_textures(tmp_path))


def test_the_shorter_side_is_scaled_and_the_centre_cropped(tmp_path: Path) -> None:
    wide = np.zeros((100, 300, 3), np.uint8)
    wide[:, 100:200] = 200  # the square in the middle
    save(tmp_path / "a.png", wide)
    picture = folder_textures(tmp_path)[0].float()
    assert picture[:, :, 4:-4].min() > 195
    assert picture[:, :, :4].mean() < 210


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_broken_image_is_skipped_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    broken = [save(tmp_path / name, noise) for name in ("half.png", "half.jpg", "half.tif")]
    for path in broken:
        truncate(path)
    empty = tmp_path / "empty.png"
    empty.touch()
    save(tmp_path / "whole.png")
    with caplog.at_level(logging.WARNING):
        assert len(folder_textures(tmp_path)) == 1
    assert len(caplog.records) == 4
    assert all(any(str(path) in record.getMessage() for record in caplog.records) for path in [*broken, empty])


def test_an_image_too_large_for_pillow_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "large.png", np.zeros((200, 200), np.uint8))
    save(tmp_path / "small.png", np.zeros((10, 10), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert len(folder_textures(tmp_path)) == 1


def test_a_large_folder_is_thinned_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in range(23):
        save(tmp_path / f"{value:02}.png", flat(10 * value)[:8, :8])
    monkeypatch.setattr(textures, "_MAX_TEXTURES", 5)
    assert (folder_textures(tmp_path)[:, 0, 0, 0] // 10).tolist() == [0, 4, 9, 13, 18]


def test_the_cap_keeps_a_folder_of_just_that_size_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in range(5):
        save(tmp_path / f"{value}.png", flat(10 * value)[:8, :8])
    monkeypatch.setattr(textures, "_MAX_TEXTURES", 5)
    assert (folder_textures(tmp_path)[:, 0, 0, 0] // 10).tolist() == [0, 1, 2, 3, 4]


def test_the_cap_keeps_memory_below_a_hundred_mebibytes() -> None:
    assert textures._MAX_TEXTURES * builtin_textures()[0].numel() < 100 * 2**20


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not_there"):
        folder_textures(tmp_path / "not_there")


@pytest.mark.parametrize("content", [None, "notes.txt", "broken.png"])
def test_a_folder_without_an_image_is_named(content: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    if content is not None:
        (folder / content).write_text("no image")
    with pytest.raises(FileNotFoundError, match="bare"):
        folder_textures(folder)


@pytest.mark.parametrize(
    "array",
    [
        RAMP,
        np.dstack([RAMP] * 3),
        np.dstack([RAMP] * 4),
        RAMP.astype(np.uint16) * 257,
    ],
    ids=["grey", "RGB", "RGBA", "16 bits"],
)
def test_every_kind_of_pixel_keeps_its_brightness(array: np.ndarray, tmp_path: Path) -> None:
    save(tmp_path / "ramp.png", array)
    expected = torch.from_numpy(RAMP.copy()).expand(3, -1, -1)
    torch.testing.assert_close(folder_textures(tmp_path)[0], expected, atol=1, rtol=0)


def test_a_palette_is_resolved(tmp_path: Path) -> None:
    picture = np.dstack([RAMP, RAMP[:, ::-1], RAMP.T])
    Image.fromarray(picture).quantize(64).save(tmp_path / "palette.png")
    expected = torch.from_numpy(picture).permute(2, 0, 1).float()
    assert (folder_textures(tmp_path)[0].float() - expected).abs().mean() < 20


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0, 3e6])
def test_floating_point_keeps_its_brightness(white: float, tmp_path: Path) -> None:
    array = RAMP.astype(np.float32) / 255 * white
    array[:3, 0] = np.nan, np.inf, -np.inf  # where it is black
    save(tmp_path / "ramp.tif", array)
    expected = torch.from_numpy(RAMP.copy()).expand(3, -1, -1)
    torch.testing.assert_close(folder_textures(tmp_path)[0], expected, atol=1, rtol=0)


def test_negative_floating_point_is_black(tmp_path: Path) -> None:
    save(tmp_path / "a.tif", np.full((64, 64), -5.0, np.float32))
    assert folder_textures(tmp_path).max() == 0


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow
def test_broken_files_of_every_format_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 255, (40, 40, 3)).astype(np.uint8)
    for suffix in ("png", "jpg", "tif", "bmp", "webp"):
        whole = save(tmp_path / f"whole.{suffix}", noise).read_bytes()
        for i in range(60):
            content = np.frombuffer(whole, np.uint8).copy()
            hit = generator.integers(0, min(len(content), 200 if i % 2 else len(content)), 1 + i % 8)
            content[hit] = generator.integers(0, 256, len(hit))
            (tmp_path / f"{i}.{suffix}").write_bytes(content.tobytes()[: len(content) // (1 + i % 3)])
    # Pillow calls a chunk without a name a syntax error.
    (tmp_path / "0.png").write_bytes((tmp_path / "whole.png").read_bytes().replace(b"IDAT", b"/v\xfcF"))
    pictures = folder_textures(tmp_path)
    assert 5 <= len(pictures) < 305
    assert len([record for record in caplog.records if record.name == textures.__name__]) == 305 - len(pictures)


def test_a_file_that_may_not_be_read_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "a.png")
    locked, opened = save(tmp_path / "locked.png"), Image.open

    def refuse(path: Path) -> Image.Image:
        if path == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path)

    monkeypatch.setattr(Image, "open", refuse)
    assert len(folder_textures(tmp_path)) == 1
    assert str(locked) in caplog.text


def test_links_and_loops_do_no_harm(tmp_path: Path) -> None:
    folder = tmp_path / "textures"
    save(folder / "sub/a.png", flat(10))
    save(tmp_path / "elsewhere.png", flat(20))
    (folder / "link.png").symlink_to(tmp_path / "elsewhere.png")
    (folder / "sub/up").symlink_to(folder)
    (folder / "nowhere.png").symlink_to(tmp_path / "nowhere")
    (folder / "self.png").symlink_to(folder / "self.png")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")  # would be waited for if it were opened
    (tmp_path / "way").symlink_to(folder)
    for path in (folder, tmp_path / "way"):
        assert sorted(folder_textures(path)[:, 0, 0, 0].tolist()) == [10, 20]


@pytest.mark.parametrize(
    "name", ["a b.png", "größe 日本.png", "new\nline.png", "-dash.png", "'\".png", "%s {x}.png", ".hidden.png", "A.PNG"]
)
def test_odd_names_are_names(name: str, tmp_path: Path) -> None:
    save(tmp_path / "ok.png").rename(tmp_path / name)
    assert len(folder_textures(tmp_path)) == 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 30000), (30000, 1)])
def test_a_line_of_pixels_does_not_fill_the_memory(
    shape: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resize, sizes = textures.transforms.resize, []

    def watch(image: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        outcome = resize(image, *arguments, **options)
        sizes.append(outcome.numel())
        return outcome

    monkeypatch.setattr(textures.transforms, "resize", watch)
    save(tmp_path / "a.png", np.full(shape, 90, np.uint8))
    assert (folder_textures(tmp_path) == 90).all()
    assert max(sizes) <= 4 * 3 * 256 * 256
