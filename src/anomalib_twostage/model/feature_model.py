# SPDX-License-Identifier: Apache-2.0
"""The two-stage model that looks through a pretrained backbone, at a memory of good patches.

Stage one sees how features differ from those of the good images, and draws a coarse map. Superpixels widen it to whole
patches of the image, and stage two sees that, and how far each place is from the good images, in full resolution. The
distance to the memory has a voice in the final map, beside what the stages have learned: what no paint resembles keeps
its rank.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from anomalib_twostage.common.precision import full_precision
from anomalib_twostage.superpixels.pooling import superpixel_mean

from .backbone import Backbone
from .inputs import check_dtype, check_shape
from .memory import FeatureSums, PatchMemory, PlaceStatistics, as_patches
from .torch_model import Seen, TwoStageSuperpixelModel, Way

__all__ = ["FeatureTemplate", "FeatureTwoStageModel", "in_quarters"]

logger = logging.getLogger(__name__)

_BATCH = 8
_PER_IMAGE = 1024  # patches that a memory looks at, so that large images stay within bounds
_LEVELS = 3
_AGAINST = 8  # times the weight of stage two's map: what stage one and the distance say
_FURTHEST = 3.0  # of distances as the networks see them; the distance map knows no limit


class FeatureTemplate(nn.Module):
    """What is different about an image: its features against those of the good images.

    There is a memory of patches at stride 16, one at stride 8, and one of the features of stride 4 averaged to stride
    8; and, with ``means``, one more of each of these, of means over 2 x 2 of its places. The networks see how features
    differ from the nearest patches of the first three. The mean of the calibrated distances of all is the image's
    distance map: each errs elsewhere, and what is off as a whole, as a part that is bent, shows in the wider ones.

    Args:
        backbone: Where features come from.
        memory: Whether there are memories; without, features are compared with the mean of their place alone.
        place: Whether each place has its own mean; otherwise features are compared with the mean of all places.
        size: Patches of each memory.
        magnification: How many times as high and wide the backbone sees images, 1 or more: what is thinner than the
            finest features' stride of 4 pixels gets features of its own. All that is said of strides is of what the
            backbone sees.
        means: Whether there are memories of means over 2 x 2 places. They tell what is off as a whole; defects of a few
            pixels drown in them.

    Raises:
        ValueError: If ``magnification`` is below 1.

    Example:
        >>> from anomalib_twostage.model.backbone import Backbone
        >>> FeatureTemplate(Backbone())(torch.rand(1, 3, 64, 64)).distance.shape
        torch.Size([1, 1, 64, 64])
    """

    backbone: Backbone
    statistics: Sequence[PlaceStatistics]
    memories: Sequence[PatchMemory]

    def __init__(
        self,
        backbone: Backbone,
        memory: bool = True,
        place: bool = True,
        size: int = 2048,
        magnification: float = 1.0,
        means: bool = True,
    ) -> None:
        super().__init__()
        if not 1 <= magnification < math.inf:
            msg = f"magnification must be 1 or more, got {magnification}."
            raise ValueError(msg)
        self.backbone = backbone
        self.magnification = magnification
        statistics = [PlaceStatistics(channels, place) for channels in backbone.channels]
        memories = [PatchMemory(channels, size) for channels in backbone.channels if memory]
        if memory and means:
            statistics += [PlaceStatistics(channels, place=False) for channels in backbone.channels]
            memories += [PatchMemory(channels, size) for channels in backbone.channels]
        self.statistics = nn.ModuleList(statistics)  # type: ignore[assignment]
        self.memories = nn.ModuleList(memories)  # type: ignore[assignment]

    @property
    def channels(self) -> tuple[int, int, int]:
        """Channels of the levels that :meth:`forward` returns."""
        fine, middle, coarse = self.backbone.channels
        if not self.memories:
            return coarse, middle, fine
        return 2 * coarse + 1, 2 * middle + 2 * fine + 2, fine

    @property
    def length_channels(self) -> tuple[int, int, int]:
        """Channels of what :meth:`lengths` returns."""
        return (1, 2, 1) if self.memories else (1, 1, 1)

    def lengths(self, levels: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """How far levels, as :meth:`forward` returns them, are from the good ones, without in what way.

        Returns:
            The distances to the memories at strides 16 and 8, and the root mean square over the channels at stride 4;
            without memories that of all three, ``(B, C, h, w)`` from 0 to 3.
        """
        coarse, middle, fine = levels
        if not self.memories:
            return _length(coarse), _length(middle), _length(fine)
        return coarse[:, -1:], middle[:, -2:], _length(fine)

    @torch.no_grad()
    def fit(self, images: Iterable[tuple[torch.Tensor, int]]) -> None:
        """Load the backbone's weights if need be, and remember good images.

        Args:
            images: Images ``(C, H, W)`` in [0, 1], one by one, each with the number it is known by.

        Raises:
            ValueError: If there is no image.
            ModuleNotFoundError: If the backbone's weights are not installed.
            OSError: If they cannot be got otherwise.
        """
        self.backbone.load_pretrained()
        generator = torch.Generator().manual_seed(0)
        device = self.backbone.ready.device
        sums = [FeatureSums() for _ in self.statistics]
        patches: list[list[torch.Tensor]] = [[] for _ in self.memories]
        sources: list[int] = []
        for batch, numbers in _batches(images):
            levels = self._levels(self.backbone(self._magnified(batch.to(device))))
            for own, level in zip(sums, levels, strict=True):
                own.add(level)
            for own_patches, level in zip(patches, levels, strict=False):
                found = as_patches(level.float()).reshape(len(batch), -1, 2 * level.shape[1])
                for one in found:
                    own_patches.append(one[torch.randperm(len(one), generator=generator)[:_PER_IMAGE].to(device)])
            sources += numbers
        for statistics, own in zip(self.statistics, sums, strict=True):
            statistics.fit(own)
        measured = True
        for memory, statistics, own_patches in zip(self.memories, self.statistics, patches, strict=False):
            lengths = torch.tensor([len(one) for one in own_patches])
            middle, spread = (value.flatten().repeat(2) for value in (statistics.middle, statistics.spread))
            scaled = (torch.cat(own_patches) - middle) / spread
            measured &= memory.fit(scaled, torch.tensor(sources).repeat_interleave(lengths))
        if not measured:
            logger.warning(
                "There is one good image, or all are alike: how far good images are from each other is not known, and "
                "a fixed distance stands for it. Train with more good images for maps and scores that tell more."
            )

    @torch.no_grad()
    def forward(self, images: torch.Tensor, numbers: torch.Tensor | None = None) -> Seen:
        """Compare images with the good ones, in float32.

        Args:
            images: ``(B, C, H, W)`` in [0, 1].
            numbers: Numbers ``(B,)`` int64 of images that were remembered, which are not to find themselves.

        Returns:
            How features differ at strides 16, 8 and 4, and the distance map ``(B, 1, H, W)`` in [0, 1), if there are
            memories.

        Raises:
            TypeError: If the images are no tensor, or not of the backbone's floating-point type, or it is not float32.
            ValueError: If they are not ``(B, 1 or 3, H, W)``.
        """
        if not torch.compiler.is_compiling():  # sizes are symbols while a graph is traced
            check_shape(images, (1, 3))
            check_dtype(images, self.backbone.dtype)
            _check_weights(self.backbone.dtype)
        raw = self.backbone(self._magnified(images))
        with full_precision(images.device):
            finest = self.statistics[0].deviation(self.statistics[0].scaled(raw[0]))
            levels = [own.scaled(level) for own, level in zip(self.statistics, self._levels(raw), strict=True)]
            places = [own.deviation(level) for own, level in zip(self.statistics[:_LEVELS], levels, strict=False)]
            if not self.memories:
                return Seen((places[2], places[1], finest), None)
            found = [memory(level, numbers) for memory, level in zip(self.memories, levels, strict=True)]
            fine, middle, coarse = found[:_LEVELS]
            distances = [nearest.distance.clamp_max(_FURTHEST) for nearest in (fine, middle, coarse)]
            distance = _mean_distance([nearest.distance for nearest in found])
            distance = functional.interpolate(distance, images.shape[-2:], mode="bilinear", align_corners=False)
            at_16 = torch.cat([coarse.difference, places[2], distances[2]], dim=1)
            at_8 = [middle.difference, places[1], fine.difference, places[0], distances[1], distances[0]]
            return Seen((at_16, torch.cat(at_8, dim=1), finest), (distance / 2).tanh())

    def _levels(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """What there are statistics of: three levels, finest first, and perhaps their means over 2 x 2 places."""
        levels = _pooled(features)
        return levels + [_halved(level) for level in levels] if len(self.statistics) > _LEVELS else levels

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Go without the memories of means where weights of earlier versions have none."""
        if self.memories and f"{prefix}memories.0.patches" in state_dict:
            known = sum(f"{prefix}memories.{number}.patches" in state_dict for number in range(len(self.memories)))
            del self.statistics[known:], self.memories[known:]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def magnified_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what the backbone sees of images of this height and width."""
        return round(self.magnification * height), round(self.magnification * width)

    def _magnified(self, images: torch.Tensor) -> torch.Tensor:
        """Images ``(B, C, H, W)`` as the backbone sees them."""
        if self.magnification == 1:
            return images
        size = self.magnified_size(*images.shape[-2:])
        return functional.interpolate(images, size, mode="bilinear", align_corners=False)


class FeatureTwoStageModel(TwoStageSuperpixelModel):
    """Stage one on features that differ, superpixel refinement, stage two on how far they differ.

    Stage two sees the distances at each scale and, in full resolution, stage one's map, the distance map and the means
    of both over superpixels; no features and no image, of which it would learn what paint looks like. With ``F`` the
    mean of stage one's map and its superpixel average, ``S`` stage two's map and ``D`` the distance map, the final map
    is ``(8 D (2 + F) / 3 + S) / 9``, smoothed. Here stage two speaks everywhere: it sees distances that stage one
    overlooks. Without a distance its map counts in selected superpixels only, as in :class:`TwoStageSuperpixelModel`;
    so it does with the hard gate, where the final map is ``D (2 + S) / 3``.
    """

    template: FeatureTemplate

    def remember(self, images: Iterable[tuple[torch.Tensor, int]]) -> None:
        """Take the template of good images ``(C, H, W)``, each with the number it is known by."""
        self.template.fit(images)

    def known_images(self) -> set[int]:
        """Numbers of the images whose patches are in a memory, but those of a single image."""
        return {number for memory in self.template.memories for number in memory.sources.tolist() if number != -1}

    def seen(self, images: torch.Tensor, numbers: torch.Tensor | None = None) -> Seen:
        """What stage one sees of images ``(B, C, H, W)``, and their distance map."""
        return self.template(images, numbers)

    def weigh(self, trained: torch.Tensor, distance: torch.Tensor | None) -> torch.Tensor:
        """Give the distance its voice in a map ``(B, 1, H, W)`` in [0, 1]."""
        return trained if distance is None else distance * (2 + trained) / 3

    def _fuse(self, first: torch.Tensor, second: torch.Tensor, distance: torch.Tensor | None) -> torch.Tensor:
        if distance is None:
            return super()._fuse(first, second, distance)
        return (_AGAINST * self.weigh(first, distance) + second) / (_AGAINST + 1)

    @property
    def speaks_everywhere(self) -> bool:
        """Whether stage two has a say outside the selected superpixels too: where the gate is soft and ``D`` known."""
        return self.gate == "average" and len(self.template.memories) > 0

    def _drawn(self, logits: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Stage one's logits as it drew them, for images of this height and width: it drew magnified ones."""
        logits = super()._drawn(logits, *self.template.magnified_size(height, width))
        if self.template.magnification == 1:
            return logits
        return functional.interpolate(logits, (height, width), mode="bilinear", align_corners=False)

    def _handed_on(self, images: torch.Tensor, seen: Seen, way: Way) -> tuple[torch.Tensor, ...]:
        maps = [way.stage_one_map, way.refined.pooled]
        if seen.distance is not None:
            segments = self.slic.max_segments(*images.shape[-2:])
            maps += [seen.distance, superpixel_mean(seen.distance, way.labels, segments)]
        detail = torch.cat(maps, dim=1)
        if self.gate == "hard":
            detail = detail * way.refined.selected
        return (*self.template.lengths(seen.levels), in_quarters(detail))

    def _hand_over_weights(self) -> None:
        """Let stage two begin anew: it sees nothing that stage one sees."""


def in_quarters(detail: torch.Tensor) -> torch.Tensor:
    """Values ``(B, C, H, W)`` as ``(B, 4C, H / 2, W / 2)``, rounded up: the four of a square behind each other."""
    height, width = detail.shape[-2:]
    if not torch.compiler.is_compiling() and len(detail) == 0:  # torch unshuffles no empty batch
        return detail.new_zeros(0, 4 * detail.shape[1], (height + 1) // 2, (width + 1) // 2)
    if height % 2 or width % 2:
        detail = functional.pad(detail, (0, width % 2, 0, height % 2), mode="replicate")
    return functional.pixel_unshuffle(detail, 2)


def _length(level: torch.Tensor) -> torch.Tensor:
    """Root mean square over the channels of a level ``(B, C, h, w)``: ``(B, 1, h, w)``."""
    return level.square().mean(dim=1, keepdim=True).sqrt()


def _pooled(levels: list[torch.Tensor]) -> list[torch.Tensor]:
    """Features at strides 4, 8 and 16 with the first averaged to stride 8."""
    fine, middle, coarse = levels
    size = middle.shape[-2:]
    return [_halved(fine)[..., : size[0], : size[1]], middle, coarse]


def _halved(level: torch.Tensor) -> torch.Tensor:
    """Means of features ``(B, C, h, w)`` over 2 x 2 places; at the far edges over those that are left."""
    return functional.avg_pool2d(level, 2, ceil_mode=True)


def _mean_distance(found: list[torch.Tensor]) -> torch.Tensor:
    """Mean of the distances ``(B, 1, h, w)`` of three levels, finest first, and of their means, at middle size."""
    levels = found[:_LEVELS]
    for number, wider in enumerate(found[_LEVELS:]):
        height, width = levels[number].shape[-2:]
        enlarged = functional.interpolate(wider, scale_factor=2.0, mode="bilinear", align_corners=False)
        levels[number] = levels[number] + enlarged[..., :height, :width]
    fine, middle, coarse = levels
    coarse = functional.interpolate(coarse, middle.shape[-2:], mode="bilinear", align_corners=False)
    return (fine + middle + coarse) / len(found)


def _batches(images: Iterable[tuple[torch.Tensor, int]]) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Images of one size together, in batches."""
    waiting: list[torch.Tensor] = []
    numbers: list[int] = []
    for image, number in images:
        if waiting and (len(waiting) == _BATCH or waiting[0].shape != image.shape):
            yield torch.stack(waiting), numbers
            waiting, numbers = [], []
        waiting.append(image)
        numbers.append(number)
    if waiting:
        yield torch.stack(waiting), numbers


def _check_weights(dtype: torch.dtype) -> None:
    if dtype != torch.float32:
        msg = (
            f"The model compares features in float32, got weights of {dtype}: call model.float(), and for speed "
            "compute in mixed precision, under torch.autocast."
        )
        raise TypeError(msg)
