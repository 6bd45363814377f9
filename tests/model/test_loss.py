# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from sklearn.metrics import log_loss
from torch import nn
from torchmetrics.functional.image import structural_similarity_index_measure

from anomalib_twostage import PaperLoss, SegmentationLoss

BOTH = pytest.mark.parametrize("loss", [PaperLoss(), SegmentationLoss()], ids=lambda loss: type(loss).__name__)


def blocks() -> torch.Tensor:
    """Masks with a block each."""
    mask = torch.zeros(3, 1, 40, 37)
    mask[0, :, 5:15, 8:20] = 1
    mask[1, :, 20:35, 3:30] = 1
    mask[2, :, 30:33, 30:33] = 1
    return mask


def test_paper_loss_is_squared_error_plus_one_minus_ssim() -> None:
    logits, mask = torch.randn(3, 1, 40, 37) * 3, blocks()
    prediction = logits.sigmoid()
    # Over the whole image, mirrored at its border, where torchmetrics' mean leaves five pixels out.
    _, similarity = structural_similarity_index_measure(prediction, mask, data_range=1.0, return_full_image=True)
    expected = np.square(prediction.numpy() - mask.numpy()).mean() + 1 - similarity.double().mean().item()
    # Float32 on both sides; they differ in the order of sums alone.
    assert PaperLoss()(logits, mask).item() == pytest.approx(expected, abs=1e-5)


def test_paper_loss_uses_the_ssim_of_wang() -> None:
    # scikit-image with Wang's settings; its border differs, so an image whose border is flat in both.
    logits, mask = torch.full((1, 1, 48, 48), -30.0), torch.zeros(1, 1, 48, 48)
    logits[..., 16:32, 16:32] = torch.randn(16, 16) * 2
    mask[..., 18:30, 15:28] = 1
    prediction = logits.sigmoid()[0, 0].double().numpy()
    similarity = structural_similarity(
        prediction, mask[0, 0].double().numpy(), data_range=1, gaussian_weights=True, use_sample_covariance=False,
        full=True,
    )[1].mean()  # fmt: skip
    expected = np.square(prediction - mask[0, 0].numpy()).mean() + 1 - similarity
    assert PaperLoss()(logits, mask).item() == pytest.approx(expected, abs=1e-5)


def focal(logits: torch.Tensor, mask: torch.Tensor) -> float:
    """Lin et al., equation 4, over both classes alike, four times: that is cross-entropy where p is a half."""
    probability, truth = logits.double().sigmoid().numpy().ravel(), mask.double().numpy().ravel()
    right = np.where(truth == 1, probability, 1 - probability)
    return float(4 * (np.square(1 - right) * -np.log(np.maximum(right, 1e-300))).mean())


def test_segmentation_loss_is_focal_loss_plus_dice_of_the_batch() -> None:
    logits, mask = torch.randn(3, 1, 40, 37) * 3, blocks()
    probability, truth = logits.double().sigmoid().numpy(), mask.double().numpy()
    dice = (2 * (probability * truth).sum() + 1) / (probability.sum() + truth.sum() + 1)
    assert SegmentationLoss()(logits, mask).item() == pytest.approx(focal(logits, mask) + 1 - dice, rel=1e-5)


def test_undecided_pixels_cost_what_they_do_under_cross_entropy() -> None:
    logits, mask = torch.zeros(3, 1, 40, 37), blocks()
    entropy = log_loss(mask.numpy().ravel(), logits.sigmoid().numpy().ravel())
    assert focal(logits, mask) == pytest.approx(entropy)


def test_dice_weighs_a_missed_small_defect_like_a_missed_large_one() -> None:
    small, large = torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 64, 64)
    small[..., :8, :8], large[..., :32, :32] = 1, 1
    missed = torch.full((1, 1, 64, 64), -30.0)
    for mask in (small, large):
        assert SegmentationLoss()(missed, mask).item() - focal(missed, mask) == pytest.approx(1, abs=0.02)


@BOTH
def test_a_perfect_prediction_costs_next_to_nothing(loss: nn.Module) -> None:
    assert 0 <= loss(blocks() * 60 - 30, blocks()).item() < 1e-4


@BOTH
def test_a_perfectly_clean_prediction_costs_next_to_nothing(loss: nn.Module) -> None:
    assert 0 <= loss(torch.full((2, 1, 32, 32), -30.0), torch.zeros(2, 1, 32, 32)).item() < 1e-4


@BOTH
def test_a_worse_prediction_costs_more(loss: nn.Module) -> None:
    right = blocks() * 8 - 4
    values = [loss(torch.lerp(right, -right, share), blocks()).item() for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert values == sorted(values)
    assert values[-1] > values[0] + 0.5


@BOTH
@pytest.mark.parametrize("logit", [1e4, -1e4])
@pytest.mark.parametrize("truth", [0.0, 1.0])
def test_extreme_logits_stay_finite(loss: nn.Module, logit: float, truth: float) -> None:
    logits = torch.full((1, 1, 32, 32), logit, requires_grad=True)
    value = loss(logits, torch.full((1, 1, 32, 32), truth))
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss: nn.Module, dtype: torch.dtype) -> None:
    logits, mask = (torch.randn(3, 1, 40, 37) * 3).to(dtype), blocks()
    value = loss(logits, mask.to(dtype))
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(logits.float(), mask))


@BOTH
def test_integer_masks_count_like_float_ones(loss: nn.Module) -> None:
    logits = torch.randn(3, 1, 40, 37)
    assert torch.equal(loss(logits, blocks().long()), loss(logits, blocks()))


@BOTH
def test_descending_the_loss_finds_the_mask(loss: nn.Module) -> None:
    mask = blocks()[..., ::2, ::2]
    logits = torch.zeros_like(mask).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.5)
    for _ in range(30):
        optimizer.zero_grad()
        loss(logits, mask).backward()
        optimizer.step()
    assert torch.equal((logits > 0).float(), mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [PaperLoss, SegmentationLoss])
def test_autocast_changes_nothing(kind: type[torch.nn.Module], dtype: torch.dtype) -> None:
    logits, mask = torch.randn(2, 1, 48, 48) - 4, torch.zeros(2, 1, 48, 48)
    mask[:, :, 10:30, 10:30] = 1
    plain, mixed = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    kind()(plain, mask).backward()
    with torch.autocast("cpu", dtype=dtype):
        loss = kind()(mixed, mask)
    loss.backward()
    assert torch.equal(plain.grad, mixed.grad)
