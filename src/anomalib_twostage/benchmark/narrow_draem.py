# SPDX-License-Identifier: Apache-2.0
"""A narrower Draem, for comparisons on a CPU."""

from typing import Any

from anomalib.models import Draem
from anomalib.models.image.draem.torch_model import DiscriminativeSubNetwork, ReconstructiveSubNetwork

__all__ = ["NarrowDraem"]

_RECONSTRUCTIVE_WIDTH = 128
_DISCRIMINATIVE_WIDTH = 64


class NarrowDraem(Draem):
    """anomalib's Draem with every layer ``width_divisor`` times narrower. Not the published model.

    At full width Draem has 97 M parameters, too many to train on a CPU. Everything but the width is anomalib's own:
    architecture, loss, optimizer, augmenter.

    Args:
        width_divisor: Divides the widths, 128 channels of the reconstructive and 64 of the discriminative network;
            a power of two up to 64.
        kwargs: Arguments of anomalib's ``Draem``.

    Raises:
        ValueError: If ``width_divisor`` does not divide the widths.

    Example:
        >>> NarrowDraem(width_divisor=4, dtd_dir="./datasets/dtd")  # doctest: +SKIP
    """

    def __init__(self, width_divisor: int = 4, **kwargs: Any) -> None:
        if width_divisor < 1 or _DISCRIMINATIVE_WIDTH % width_divisor:
            msg = f"width_divisor must divide {_DISCRIMINATIVE_WIDTH}, got {width_divisor}."
            raise ValueError(msg)
        super().__init__(**kwargs)
        self.model.reconstructive_subnetwork = ReconstructiveSubNetwork(
            base_width=_RECONSTRUCTIVE_WIDTH // width_divisor,
            sspcab=self.sspcab,
        )
        self.model.discriminative_subnetwork = DiscriminativeSubNetwork(
            in_channels=6,
            out_channels=2,
            base_width=_DISCRIMINATIVE_WIDTH // width_divisor,
        )
        if self.sspcab:
            self.setup_sspcab()  # the hooks were on the network that has just been replaced
