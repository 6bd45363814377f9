# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch

from anomalib_twostage.pseudo_anomaly import perlin_noise, random_perlin_noise


def circle(*shape: int) -> torch.Tensor:
    """Random unit gradients."""
    direction = torch.rand(*shape) * 2 * math.pi
    return torch.stack([direction.sin(), direction.cos()], dim=-1)


def test_noise_is_that_of_the_noise_package() -> None:
    noise = pytest.importorskip("noise")
    rows, columns, step = 7, 9, 1e-3

    def theirs(y: float, x: float) -> float:
        return noise.pnoise2(y, x, repeatx=rows, repeaty=columns)

    gradients = np.array(
        [
            [
                (
                    (theirs(y + step, x) - theirs(y - step, x)) / (2 * step),
                    (theirs(y, x + step) - theirs(y, x - step)) / (2 * step),
                )
                for x in range(columns)
            ]
            for y in range(rows)
        ]
    )
    # The package draws from the integer directions of Perlin's paper, so rounding makes the differences exact.
    np.testing.assert_allclose(gradients, gradients.round(), atol=1e-2)
    gradients = torch.from_numpy(gradients.round()).float().unsqueeze(0)

    axis_y, axis_x = np.linspace(0, 2 * rows, 141), np.linspace(0, 2 * columns, 163)
    expected = np.array([[theirs(y, x) for x in axis_x] for y in axis_y])
    y, x = torch.meshgrid(torch.from_numpy(axis_y).float(), torch.from_numpy(axis_x).float(), indexing="ij")
    found = perlin_noise(y.unsqueeze(0), x.unsqueeze(0), gradients)[0]
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_noise_is_zero_at_lattice_points() -> None:
    y, x = torch.meshgrid(torch.arange(-6.0, 12), torch.arange(-6.0, 12), indexing="ij")
    noise = perlin_noise(y.unsqueeze(0), x.unsqueeze(0), circle(1, 5, 6))
    assert noise.abs().max() == 0


def test_noise_has_the_given_gradients_at_lattice_points() -> None:
    gradients, step = circle(1, 5, 6).double(), 1e-4
    y, x = (axis.unsqueeze(0).double() for axis in torch.meshgrid(torch.arange(5), torch.arange(6), indexing="ij"))
    slope_y = (perlin_noise(y + step, x, gradients) - perlin_noise(y - step, x, gradients)) / (2 * step)
    slope_x = (perlin_noise(y, x + step, gradients) - perlin_noise(y, x - step, gradients)) / (2 * step)
    torch.testing.assert_close(torch.stack([slope_y, slope_x], dim=-1), gradients, atol=1e-6, rtol=0)


def test_noise_repeats_with_the_lattice() -> None:
    gradients = circle(2, 5, 6)
    y, x = torch.rand(2, 2, 20, 20) * 8
    noise = perlin_noise(y, x, gradients)
    torch.testing.assert_close(perlin_noise(y + 5, x, gradients), noise, atol=1e-5, rtol=0)
    torch.testing.assert_close(perlin_noise(y, x - 6, gradients), noise, atol=1e-5, rtol=0)
    assert (perlin_noise(y + 4, x, gradients) - noise).abs().max() > 0.1


def test_noise_is_smooth_across_cells() -> None:
    gradients, step = circle(1, 5, 5).double(), 1e-3
    x = torch.arange(0, 4, step, dtype=torch.float64).view(1, 1, -1)
    for y in (0.3, 1.0, 2.7):
        noise = perlin_noise(torch.full_like(x, y), x, gradients)[0, 0]
        curvature = noise.diff().diff() / step**2
        # Continuous in the second derivative: no jump beyond what the third derivative does in one step.
        assert curvature.diff().abs().max() < 100 * step


def zero_crossings(noise: torch.Tensor, dim: int) -> float:
    return (noise.sign().diff(dim=dim) != 0).float().mean().item()


def test_random_noise_has_zero_mean_and_unit_deviation() -> None:
    frequency = torch.tensor([[1.0, 1.0], [3.0, 9.0], [24.0, 24.0], [0.5, 64.0]])
    noise = random_perlin_noise(50, 70, frequency, torch.rand(4) * 3)
    assert noise.shape == (4, 50, 70)
    torch.testing.assert_close(noise.mean(dim=(1, 2)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(noise.std(dim=(1, 2)), torch.ones(4), atol=1e-3, rtol=0)


def test_higher_frequency_crosses_zero_more_often() -> None:
    frequency = torch.tensor([2.0, 4.0, 8.0, 16.0, 32.0]).repeat_interleave(4)
    noise = random_perlin_noise(128, 128, torch.stack([frequency, frequency], dim=1), torch.rand(20) * 3)
    crossings = [zero_crossings(group, dim=2) for group in noise.split(4)]
    assert crossings == sorted(crossings)
    assert crossings[-1] == pytest.approx(16 * crossings[0], rel=0.6)


def test_frequency_counts_cells_along_the_longer_side() -> None:
    # Between two lattice lines the noise is one bump or two; a zero on every lattice point of a line.
    torch.manual_seed(1)
    square = zero_crossings(random_perlin_noise(128, 128, torch.full((8, 2), 8.0), torch.zeros(8)), dim=2)
    wide = zero_crossings(random_perlin_noise(32, 128, torch.full((8, 2), 8.0), torch.zeros(8)), dim=2)
    assert wide == pytest.approx(square, rel=0.3)


def test_each_axis_has_its_own_frequency_and_turns_with_the_lattice() -> None:
    frequency = torch.tensor([[2.0, 24.0]] * 4)
    flat = random_perlin_noise(96, 96, frequency, torch.zeros(4))
    assert zero_crossings(flat, dim=2) > 4 * zero_crossings(flat, dim=1)
    turned = random_perlin_noise(96, 96, frequency, torch.full((4,), math.pi / 2))
    assert zero_crossings(turned, dim=1) > 4 * zero_crossings(turned, dim=2)


def test_random_noise_repeats_with_the_seed() -> None:
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(random_perlin_noise(32, 32, torch.full((2, 2), 4.0), torch.zeros(2)))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_images_of_a_batch_get_noise_of_their_own() -> None:
    noise = random_perlin_noise(32, 32, torch.full((6, 2), 6.0), torch.zeros(6)).flatten(1)
    correlation = torch.corrcoef(noise) - torch.eye(6)
    assert correlation.abs().max() < 0.6


def test_a_single_pixel_is_finite() -> None:
    assert random_perlin_noise(1, 1, torch.full((2, 2), 4.0), torch.zeros(2)).isfinite().all()


@pytest.mark.parametrize(("height", "width", "step"), [(96, 128, 2), (101, 75, 4), (128, 128, 5)])
def test_larger_steps_draw_the_same_field(height: int, width: int, step: int) -> None:
    frequency = torch.full((4, 2), max(height, width) / (5 * step))  # five steps in a lattice cell
    fields = []
    for stride in (1, step):
        torch.manual_seed(3)
        fields.append(random_perlin_noise(height, width, frequency, torch.linspace(0, 3, 4), stride))
    fine, coarse = fields
    assert coarse.shape == fine.shape == (4, height, width)
    for one, other in zip(fine, coarse, strict=True):
        assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1] > 0.97
        # Not only alike but in the same place: shifted by a pixel each way it fits less well.
        error = (one - other).square().mean()
        assert error < (one[:, 1:] - other[:, :-1]).square().mean()
        assert error < (one[:, :-1] - other[:, 1:]).square().mean()
        assert error < (one[1:] - other[:-1]).square().mean()
        assert error < (one[:-1] - other[1:]).square().mean()
