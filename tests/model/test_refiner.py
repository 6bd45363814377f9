# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from anomalib_twostage import SuperpixelRefiner
from anomalib_twostage.superpixels.pooling import superpixel_mean


def two_halves(height: int = 16, width: int = 32) -> torch.Tensor:
    """One superpixel on the left, one on the right: ``(1, H, W)``."""
    return (torch.arange(width) >= width // 2).long().expand(1, height, width)


def test_superpixel_mean_is_that_of_numpy() -> None:
    values, labels = torch.rand(3, 1, 23, 31), torch.randint(0, 17, (3, 23, 31))
    expected = np.empty((3, 1, 23, 31), np.float32)
    for i, (image, one) in enumerate(zip(values.numpy(), labels.numpy(), strict=True)):
        for number in np.unique(one):
            expected[i, 0, one == number] = image[0, one == number].astype(np.float64).mean()
    mean = superpixel_mean(values, labels, 17)
    assert mean.dtype == torch.float32
    np.testing.assert_allclose(mean.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_superpixel_mean_adds_up_in_float32(dtype: torch.dtype) -> None:
    values = torch.full((1, 1, 128, 128), 0.75, dtype=dtype)  # 12288 in sum, where float16 counts in steps of 8
    assert torch.equal(superpixel_mean(values, torch.zeros(1, 128, 128, dtype=torch.int64), 1), values.float())


def test_more_room_for_segments_changes_nothing() -> None:
    images, anomaly_map, labels = torch.rand(2, 3, 20, 20), torch.rand(2, 1, 20, 20), torch.randint(0, 9, (2, 20, 20))
    refiner = SuperpixelRefiner(threshold=0.5)
    for tight, roomy in zip(
        refiner(images, anomaly_map, labels, 9), refiner(images, anomaly_map, labels, 500), strict=True
    ):
        assert torch.equal(tight, roomy)


@pytest.mark.parametrize(("value", "selected"), [(0.25, True), (0.249, False), (0.251, True)])
def test_a_superpixel_is_selected_from_the_threshold_on(value: float, selected: bool) -> None:
    # Every second row of the left superpixel is below the threshold on its own.
    anomaly_map = torch.zeros(1, 1, 16, 32)
    anomaly_map[..., ::2, :16] = 0.125
    anomaly_map[..., 1::2, :16] = 2 * value - 0.125
    refiner = SuperpixelRefiner(threshold=0.25, margin=0)
    refined = refiner(torch.rand(1, 3, 16, 32), anomaly_map, two_halves(), 2)
    assert refined.pooled[0, 0, 0, 0].item() == pytest.approx(value, rel=1e-5)
    assert (refined.selected[..., ::2, :16] == float(selected)).all()
    assert (refined.selected[..., 16:] == 0).all()


def test_a_partly_seen_defect_is_completed_to_its_superpixel() -> None:
    anomaly_map = torch.zeros(1, 1, 16, 32)
    anomaly_map[..., :9, :16] = 0.9  # just above half of the left superpixel
    selected = SuperpixelRefiner(threshold=0.5)(torch.rand(1, 3, 16, 32), anomaly_map, two_halves(), 2).selected
    assert (selected[..., :16] == 1).all()
    assert (selected[..., 12:, 16:] == 0).all()


def test_a_defect_cut_by_a_segment_border_keeps_its_rim() -> None:
    anomaly_map = torch.zeros(1, 1, 16, 32)
    anomaly_map[..., :19] = 0.9  # all of the left superpixel and three columns of the right one
    refined = SuperpixelRefiner(threshold=0.5, margin=2)(torch.rand(1, 3, 16, 32), anomaly_map, two_halves(), 2)
    assert refined.pooled[0, 0, 0, -1] < 0.5
    assert (refined.selected[..., :21] == 1).all()  # the rim and its margin
    assert (refined.selected[..., 21:] == 0).all()  # but not the rest of the right superpixel


def test_without_a_margin_only_the_touched_pixels_stay() -> None:
    anomaly_map = torch.zeros(1, 1, 16, 32)
    anomaly_map[0, 0, 5, 20] = 0.9
    refined = SuperpixelRefiner(threshold=0.5, margin=0)(torch.rand(1, 3, 16, 32), anomaly_map, two_halves(), 2)
    assert torch.equal(refined.selected, (anomaly_map > 0).float())


def test_the_margin_is_a_square_that_stops_at_the_border() -> None:
    anomaly_map = torch.zeros(1, 1, 16, 32)
    anomaly_map[0, 0, 1, 20] = 0.9
    refined = SuperpixelRefiner(threshold=0.5, margin=3)(torch.rand(1, 3, 16, 32), anomaly_map, two_halves(), 2)
    expected = torch.zeros(16, 32)
    expected[0:5, 17:24] = 1
    assert torch.equal(refined.selected[0, 0], expected)


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_nothing_above_the_threshold_selects_nothing(value: float) -> None:
    refined = SuperpixelRefiner(threshold=0.5)(
        torch.rand(1, 3, 16, 32), torch.full((1, 1, 16, 32), value), two_halves(), 2
    )
    assert (refined.selected == 0).all()
    assert (refined.image == 0).all()


def test_everything_above_the_threshold_selects_everything() -> None:
    images = torch.rand(2, 3, 16, 32)
    labels = two_halves().expand(2, -1, -1)
    refined = SuperpixelRefiner(threshold=0.5)(images, torch.full((2, 1, 16, 32), 0.6), labels, 2)
    assert (refined.selected == 1).all()
    assert torch.equal(refined.image, images)


def test_the_refined_image_is_the_image_where_selected() -> None:
    images, anomaly_map, labels = torch.rand(2, 3, 24, 24), torch.rand(2, 1, 24, 24), torch.randint(0, 60, (2, 24, 24))
    refined = SuperpixelRefiner(threshold=0.55, margin=0)(images, anomaly_map, labels, 60)
    assert 0 < refined.selected.mean() < 1
    assert torch.equal(refined.image, torch.where(refined.selected == 1, images, torch.zeros(())))


def test_images_of_a_batch_do_not_mix() -> None:
    anomaly_map = torch.stack([torch.zeros(1, 16, 32), torch.full((1, 16, 32), 0.9)])
    labels = two_halves().expand(2, -1, -1)
    selected = SuperpixelRefiner(threshold=0.5)(torch.rand(2, 3, 16, 32), anomaly_map, labels, 2).selected
    assert (selected[0] == 0).all()
    assert (selected[1] == 1).all()


def test_the_refined_image_keeps_the_precision_of_the_image() -> None:
    images = torch.rand(1, 3, 16, 32).bfloat16()
    refined = SuperpixelRefiner(threshold=0.5)(images, torch.rand(1, 1, 16, 32), two_halves(), 2)
    assert refined.image.dtype == torch.bfloat16
    assert refined.selected.dtype == refined.pooled.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, r"threshold.*0\.0"),
        ({"threshold": 1.0}, r"threshold.*1\.0"),
        ({"threshold": float("nan")}, "threshold.*nan"),
        ({"margin": -1}, "margin.*-1"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SuperpixelRefiner(**options)
