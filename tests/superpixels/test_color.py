# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from kornia.color import rgb_to_lab as kornia_rgb_to_lab
from skimage.color import rgb2lab

from anomalib_twostage.superpixels.color import rgb_to_lab
from tests.conftest import photograph, to_tensor


@pytest.mark.parametrize("name", ["astronaut", "coffee", "camera"])
def test_colours_are_those_of_scikit_image_and_kornia(name: str) -> None:
    image = photograph(name, 128)
    lab = rgb_to_lab(to_tensor(image).unsqueeze(0))
    np.testing.assert_allclose(lab[0].permute(1, 2, 0).numpy(), rgb2lab(image), atol=2e-3)
    torch.testing.assert_close(lab, kornia_rgb_to_lab(to_tensor(image).unsqueeze(0)), atol=2e-3, rtol=0)


def test_dark_and_light_ends_are_those_of_scikit_image() -> None:
    ramp = np.linspace(0, 1, 4096)
    image = np.stack([ramp, ramp**2, 1 - ramp], axis=-1)[None]
    lab = rgb_to_lab(to_tensor(image).unsqueeze(0))
    np.testing.assert_allclose(lab[0].permute(1, 2, 0).numpy(), rgb2lab(image), atol=2e-3)
