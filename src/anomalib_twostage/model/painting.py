# SPDX-License-Identifier: Apache-2.0
"""Whose paint the model trains with."""

import logging
from pathlib import Path
from typing import Any

from anomalib.data import ImageBatch
from torch import nn

from anomalib_twostage.pseudo_anomaly import PAINTERS, DataPainter, paints

from .checks import check_fraction

__all__ = ["Painting", "refuse_painted_evaluation"]

logger = logging.getLogger(__name__)

_DEFAULTS = ("both", 0.7, None)  # of paint, paint_probability and texture_dir


class Painting:
    """Chooses the painter of a training: that of the training data, or the one given, or one made of settings.

    One is made when training begins, so that a trained model loads where the texture folder does not exist.

    Args:
        given: The painter given to the model.
        paint: Kinds of pseudo-anomalies, of ``PAINTERS``.
        probability: Share of training images that are painted, in (0, 1].
        texture_dir: Folder of images to paint with.

    Raises:
        ValueError: If the kind is unknown or the share out of range.
    """

    def __init__(self, given: nn.Module | None, paint: str, probability: float, texture_dir: str | Path | None) -> None:
        check_fraction("paint_probability", probability, include_one=True)
        if paint not in PAINTERS:
            msg = f"paint must be one of {sorted(PAINTERS)}, got {paint!r}."
            raise ValueError(msg)
        if given is not None and (paint, probability, texture_dir) != _DEFAULTS:
            logger.warning("The given painter takes the place of paint, paint_probability and texture_dir.")
        self.given = given
        self._settings = (paint, probability, texture_dir)
        self._data: DataPainter | None = None
        self._images_come_painted = False

    def begin(self, dataset: Any) -> nn.Module:
        """Choose the painter, and take over that of the data set, if it has one.

        Args:
            dataset: What is trained on; ``None`` if it is not known yet.

        Raises:
            FileNotFoundError: If the texture folder is missing or empty.
        """
        self.end()
        self._data = DataPainter(dataset)
        if self._data.painter is not None:
            if self.given is not None:
                logger.warning("The data set's painter takes the place of the model's: take one of them out.")
            return self._data.painter
        paint, probability, texture_dir = self._settings
        return self.given or PAINTERS[paint](probability=probability, texture_dir=texture_dir)

    def end(self) -> None:
        """Give the data set its painter back."""
        if self._data is not None:
            self._data.give_back()
        self._data = None

    def see(self, dataset: Any) -> None:
        """See whether a data set still paints when training starts, as one does whose painter cannot be taken over."""
        self._images_come_painted = paints(dataset)

    def unmasked(self, batch: Any) -> Any:
        """Take empty masks out of a training batch in the host's memory, unless its data set paints.

        Masks stand for paint from elsewhere. Good images, which are still to be painted, may bring empty ones.
        """
        if isinstance(batch, ImageBatch) and batch.gt_mask is not None and not self._images_come_painted:
            batch.gt_mask = batch.gt_mask if batch.gt_mask.any() else None
        return batch


def refuse_painted_evaluation(datamodule: Any) -> None:
    """Refuse paint on images that are there to judge the model: those that are good stay labelled so.

    Args:
        datamodule: anomalib's, set up; another one is let pass.

    Raises:
        ValueError: If its validation or test images are painted.
    """
    for subset, name in (("val_data", "validation"), ("test_data", "test")):
        if paints(getattr(datamodule, subset, None)):
            msg = (
                f"The data's augmentations paint the {name} images, of which the good ones stay labelled good: "
                "name painters in train_augmentations alone, neither in augmentations nor in those of other images."
            )
            raise ValueError(msg)
