# SPDX-License-Identifier: Apache-2.0
import torch

from anomalib_twostage.pseudo_anomaly import imitate_faults


def perfect(batch: int) -> torch.Tensor:
    """Logits of a sure and correct stage one: a square defect."""
    logits = torch.full((batch, 1, 64, 64), -6.0)
    logits[..., 16:48, 16:48] = 6.0
    return logits


def test_some_defects_lose_parts_and_some_images_raise_false_alarms() -> None:
    torch.manual_seed(0)
    probability = imitate_faults(perfect(64)).sigmoid()
    inside = (probability[..., 16:48, 16:48] < 0.5).float().mean(dim=(1, 2, 3))
    probability[..., 16:48, 16:48] = 0
    outside = (probability > 0.1).float().mean(dim=(1, 2, 3))
    # Both kinds of fault occur, neither everywhere, and never on every pixel.
    for faults in (inside, outside):
        assert 0.02 < (faults > 0.01).float().mean() < 0.7
        assert faults.max() < 0.9


def test_faults_differ_between_images_and_repeat_with_the_seed() -> None:
    torch.manual_seed(1)
    first = imitate_faults(perfect(4))
    torch.manual_seed(1)
    assert torch.equal(imitate_faults(perfect(4)), first)
    assert not torch.equal(first[0], first[1])


def test_doubt_never_crosses_over_by_fading_alone() -> None:
    # Negative logits only gain, positive ones only fade or stay within half a logit above.
    logits = torch.randn(32, 1, 32, 32) * 4
    change = imitate_faults(logits) - logits
    assert (change[logits <= 0] >= 0).all()
    assert (change[logits > 0] <= 0.5).all()
