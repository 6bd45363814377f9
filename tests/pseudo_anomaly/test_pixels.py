# SPDX-License-Identifier: Apache-2.0
from itertools import pairwise

import torch

from anomalib_twostage.pseudo_anomaly.paint import draw_kinds
from anomalib_twostage.pseudo_anomaly.pixels import list_pixels


def test_pixels_are_listed_image_by_image() -> None:
    shape = torch.rand(4, 1, 7, 5) < 0.3
    shape[2] = False
    pixels, inside, starts = list_pixels(shape)
    assert torch.equal(torch.stack(pixels, dim=1), shape[:, 0].nonzero())
    assert (inside == 1).all()
    assert [end - start for start, end in pairwise(starts)] == shape.sum(dim=(1, 2, 3)).tolist()


def test_every_image_has_one_kind_of_paint() -> None:
    order, kinds = draw_kinds(200)
    assert order.sort().values.tolist() == list(range(200))
    drawn, firsts, ends = zip(*kinds, strict=True)
    assert drawn == (0, 1, 2, 3)
    assert firsts == (0, *ends[:-1])
    assert ends[-1] == 200
    assert min(end - first for first, end in zip(firsts, ends, strict=True)) > 20
