# SPDX-License-Identifier: Apache-2.0
"""A closer look: stage one on a reduced image, stage two at the image's own resolution, where it is worth it.

The paper's second network "is trained on small patches of the input image". Here stage one, its superpixels and a
memory of good patches work on a reduced image. They choose windows of the image itself. In these stage two looks at the
pixels as they are, and at how far their features are from those of good images at this size. So cost grows with what is
suspicious, not with the camera.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from anomalib.data import InferenceBatch
from torch.nn import functional

from anomalib_twostage.common.tracing import is_exporting
from anomalib_twostage.pseudo_anomaly import imitate_faults

from .feature_model import FeatureTemplate, FeatureTwoStageModel, in_quarters
from .torch_model import Seen, StageMaps, Way

__all__ = ["WindowGrid", "Windows", "ZoomedTwoStageModel", "check_zoom"]

logger = logging.getLogger(__name__)

_CORE = 96  # pixels of the image: what a window answers for
_MARGIN = 32  # pixels around it: what it needs to see for that, and over which it gives way to its neighbours
_FAR = 0.42  # about nine tenths of the distance that one good patch of a thousand exceeds
_REMEMBERED = 1600  # windows of good images that the memory is chosen from
_LEARNED = 2  # windows of each image that stage two learns from
_LARGEST_ZOOM = 16  # beyond, a window's core is smaller than its margins


def check_zoom(zoom: int) -> None:
    """Refuse a zoom that is none.

    Raises:
        ValueError: If it is not a whole number from 1 to 16.
    """
    if not isinstance(zoom, int) or zoom not in range(1, _LARGEST_ZOOM + 1):
        msg = f"zoom must be a whole number from 1 to {_LARGEST_ZOOM}, got {zoom}."
        raise ValueError(msg)


class Windows(NamedTuple):
    """Some windows of a batch of images.

    Attributes:
        image: Which image each is of, ``(N,)`` int64.
        row: Its row in the grid, ``(N,)`` int64.
        column: Its column in the grid, ``(N,)`` int64.
    """

    image: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor


class WindowGrid:
    """Overlapping windows that cover images, and how to cut them out and write them back.

    The cores of the windows tile the image. Around each there is a margin, over which the weights of neighbours change
    from zero to one, so that those of all windows add up to one everywhere. What a window sees beyond the image's edge
    is mirrored.

    Args:
        height: Height of the images in pixels.
        width: Their width.
        core: Side of a core in pixels, at least twice the margin.
        margin: Pixels around it.

    Example:
        >>> grid = WindowGrid(200, 300, core=64, margin=16)
        >>> grid.rows, grid.columns, grid.side
        (4, 5, 96)
    """

    def __init__(self, height: int, width: int, core: int, margin: int) -> None:
        self.height, self.width, self.core, self.margin = height, width, core, margin
        self.rows, self.columns = -(-height // core), -(-width // core)
        self.side = core + 2 * margin

    def cut(self, values: torch.Tensor, windows: Windows) -> torch.Tensor:
        """Cut windows ``(N, C, side, side)`` out of images ``(B, C, H, W)``."""
        y, x = (
            _mirrored(self._places(number), size)
            for number, size in ((windows.row, self.height), (windows.column, self.width))
        )
        flat = values.transpose(0, 1).flatten(1)
        found = flat.index_select(1, self._pixels(windows, y, x))
        return found.view(values.shape[1], -1, self.side, self.side).transpose(0, 1)

    def write(self, values: torch.Tensor, windows: Windows, weights: torch.Tensor, batch: int) -> torch.Tensor:
        """Write windows ``(N, 1, side, side)`` with their weights into empty maps ``(batch, 1, H, W)``, and add up."""
        y, x = (
            self._places(number).clamp(0, size - 1)
            for number, size in ((windows.row, self.height), (windows.column, self.width))
        )
        empty = torch.zeros(batch * self.height * self.width, dtype=values.dtype, device=values.device)
        flat = empty.scatter_add(0, self._pixels(windows, y, x), (values * weights).reshape(-1))
        return flat.view(batch, 1, self.height, self.width)

    def weights(self, windows: Windows) -> torch.Tensor:
        """Weights of windows ``(N, 1, side, side)`` float32, which are zero beyond the edge of the image."""
        y = self._ramp(windows.row, self.rows, self.height)
        x = self._ramp(windows.column, self.columns, self.width)
        return (y.unsqueeze(2) * x.unsqueeze(1)).unsqueeze(1)

    def _places(self, numbers: torch.Tensor) -> torch.Tensor:
        """Rows, or columns, of the pixels of windows ``(N, side)``, also beyond the edge."""
        steps = torch.arange(self.side, device=numbers.device)
        return numbers.unsqueeze(1) * self.core - self.margin + steps

    def _pixels(self, windows: Windows, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Numbers of pixels in all images one after the other, ``(N * side * side,)``."""
        line = windows.image.unsqueeze(1) * self.height + y
        return (line.unsqueeze(2) * self.width + x.unsqueeze(1)).reshape(-1)

    def _ramp(self, numbers: torch.Tensor, count: int, size: int) -> torch.Tensor:
        """Weights along one side ``(N, side)``; there is no neighbour beyond the edge to give way to."""
        rising = ((torch.arange(self.side, device=numbers.device) + 0.5) / max(1, 2 * self.margin)).clamp_max(1)
        number = numbers.unsqueeze(1)
        ones = torch.ones_like(rising)
        weights = torch.where(number == 0, ones, rising) * torch.where(number == count - 1, ones, rising.flip(0))
        places = self._places(numbers)
        return torch.where((places >= 0) & (places < size), weights, torch.zeros_like(weights))


class ZoomedTwoStageModel(FeatureTwoStageModel):
    """Stage one on the reduced image; stage two at full resolution, in the windows that look most suspicious.

    Backbone, template, stage one and SLIC work on means over ``zoom x zoom`` pixels, which the template may magnify
    again: what is thin is more easily suspected so. Suspicious is what lies in a selected superpixel or is far from the
    good images. The windows with the highest of it, ``windows`` at most, are cut out of the image itself. There a
    second template, of windows of good images, says how far they are from those, and stage two sees that, the pixels,
    and what stage one has said, enlarged. In a window ``D`` is the mean of both distances; that map is written over
    stage one's, which it fits since everywhere the map is ``D (2 + M) / 3``.

    Args:
        zoom: Pixels of the image to one of the reduced image, 2 to 16.
        windows: Windows of an image that stage two looks at, at most.
        **parts: Of :class:`~anomalib_twostage.model.torch_model.TwoStageSuperpixelModel`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, *, zoom: int, windows: int, **parts: Any) -> None:
        super().__init__(**parts)
        check_zoom(zoom)
        if not isinstance(windows, int) or windows < 1:
            msg = f"zoom_windows must be a whole number, 1 or more, got {windows}."
            raise ValueError(msg)
        if self.gate != "average":
            msg = f"zoom writes stage two's windows over stage one's map, which gate={self.gate!r} leaves out."
            raise ValueError(msg)
        self.zoom = zoom
        self.windows = windows
        self.close_template = FeatureTemplate(
            self.template.backbone, bool(self.template.memories), place=False, means=False
        )
        self.judged, self.crowded = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)

    def remember(self, images: Iterable[tuple[torch.Tensor, int]]) -> None:
        """Take both templates of good images ``(C, H, W)``, each with the number it is known by."""
        sample = _Sample(_REMEMBERED)
        generator = torch.Generator().manual_seed(0)

        def reduced() -> Iterator[tuple[torch.Tensor, int]]:
            for image, number in images:
                grid = self._grid(image.shape[-2], image.shape[-1])
                order = torch.randperm(grid.rows * grid.columns, generator=generator).to(image.device)
                windows = Windows(torch.zeros_like(order), order // grid.columns, order % grid.columns)
                sample.add(grid.cut(image.unsqueeze(0), windows), number)
                yield self.reduce(image.unsqueeze(0))[0], number

        self.template.fit(reduced())
        self.close_template.fit(sample)

    def reduce(self, images: torch.Tensor) -> torch.Tensor:
        """Means of images ``(B, C, H, W)`` over ``zoom x zoom`` pixels; at the far edges over those that are left."""
        return functional.avg_pool2d(images, self.zoom, ceil_mode=True, count_include_pad=False)

    def seen(self, images: torch.Tensor, numbers: torch.Tensor | None = None) -> Seen:
        """What stage one sees of images ``(B, C, H, W)``: of the reduced ones."""
        reduced = self.reduce(images)
        return self.template(reduced, numbers)._replace(reduced=reduced)

    def score(self, anomaly_map: torch.Tensor) -> torch.Tensor:
        """Image scores ``(B,)`` of maps ``(B, 1, H, W)``, over windows as large as without zoom."""
        return super().score(self.reduce(anomaly_map))

    def to_be_painted(
        self, images: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Training images ``(B, C, H, W)`` and their mask: reduced while stage one learns, which spares much paint."""
        if self.stage == 2:
            return images, mask
        if mask is not None:
            mask = mask.reshape(len(images), 1, *images.shape[-2:]).float()
            mask = functional.max_pool2d(mask, self.zoom, ceil_mode=True)
        return self.reduce(images), mask

    def learned_logits(
        self, images: torch.Tensor, mask: torch.Tensor, numbers: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the stage that learns, and what they should be.

        Args:
            images: Of stage one: reduced training images ``(B, C, h, w)`` in [0, 1], painted. Of stage two: whole ones.
            mask: Where they are painted, ``(B, 1, h, w)`` in {0, 1}.
            numbers: Numbers of the images ``(B,)`` int64, by which the templates know their own.

        Returns:
            Logits and mask ``(B, 1, h, w)`` of stage one; ``(2 B, 1, side, side)`` of stage two, which learns from two
            windows of each image: one with paint in it, if there is any, and one where stage one is most mistaken.
        """
        if self.stage == 1:
            return self.stage_one_logits(images, self.template(images, numbers)), mask
        seen = self.seen(images, numbers)
        assert seen.reduced is not None
        logits = imitate_faults(self.stage_one_logits(images, seen).float())
        told = _told(self._to_superpixels(seen.reduced, logits), seen)
        windows = self._to_learn_from(told, functional.max_pool2d(mask, self.zoom, ceil_mode=True))
        own = None if numbers is None else numbers[windows.image]
        return self._look(images, told, windows, own)[0], self._grid(*images.shape[-2:]).cut(mask, windows)

    def _hand_over_weights(self) -> None:
        """Let stage two continue from stage one's weights, as far as it has the same layers."""
        own = self.stage_two.state_dict()
        taken = {name: value for name, value in self.stage_one.state_dict().items() if not name.startswith("head.")}
        self.stage_two.load_state_dict({**own, **taken})

    def end_run(self) -> None:
        """Log on how many images of the run there was more to look at than ``windows``."""
        if crowded := int(self.crowded):
            logger.warning(
                "On %d of %d images more than %d windows were suspicious: elsewhere the map is stage one's. More, with "
                "zoom_windows, cost more time.",
                *(crowded, int(self.judged), self.windows),
            )
        self.judged, self.crowded = torch.zeros_like(self.judged), torch.zeros_like(self.crowded)

    def _answer(
        self, images: torch.Tensor, seen: Seen, stage_one_logits: torch.Tensor, kept: list[StageMaps] | None
    ) -> InferenceBatch:
        assert seen.reduced is not None
        size = images.shape[-2:]
        way = self._to_superpixels(seen.reduced, stage_one_logits)
        base = self.weigh(self._first(way.stage_one_map, way.refined.pooled), seen.distance)
        anomaly_map = self._enlarge(self.smooth(base), size)
        looked, rough = torch.zeros_like(anomaly_map), []
        if self.stage == 2:
            windows, chosen = self._choose(base, way.refined.selected, seen.distance)
            looked, smoothed, *rough = self._look_closer(images, _told(way, seen), windows, chosen, kept is not None)
            anomaly_map = anomaly_map * (1 - looked) + smoothed
        if kept is not None:
            selected = self._repeat(way.refined.selected, size)
            labels = self._repeat(way.labels.unsqueeze(1), size).squeeze(1)
            logits, first, pooled = (
                self._enlarge(values, size) for values in (way.stage_one_logits, way.stage_one_map, way.refined.pooled)
            )
            distance = None if seen.distance is None else self._enlarge(seen.distance, size)
            fused_map = self._enlarge(base, size) * (1 - looked) + (rough[0] if rough else 0)
            refined = (logits, first, labels, pooled, selected, images * selected)
            kept.append(StageMaps(*refined, None, fused_map, anomaly_map, distance, looked))
        return InferenceBatch(pred_score=self.score(anomaly_map), anomaly_map=anomaly_map)

    def _choose(
        self, base: torch.Tensor, selected: torch.Tensor, distance: torch.Tensor | None
    ) -> tuple[Windows, torch.Tensor]:
        """The most suspicious windows of each image, ``windows`` of them, and which are suspicious at all ``(N,)``."""
        if distance is not None:
            selected = torch.maximum(selected, (distance >= _FAR).float())
        suspicion = functional.max_pool2d(base * selected, self._core, ceil_mode=True)
        batch, _, _, columns = suspicion.shape
        suspicion = suspicion.flatten(1)
        count = min(self.windows, suspicion.shape[1])
        highest, place = suspicion.topk(count, dim=1)
        if not self.training and not torch.compiler.is_compiling():
            crowded = ((suspicion > 0).sum(dim=1) > self.windows).sum()
            self.judged, self.crowded = self.judged.to(crowded) + batch, self.crowded.to(crowded) + crowded
        image = torch.arange(batch, device=place.device).unsqueeze(1).expand(-1, count).reshape(-1)
        place = place.reshape(-1)
        return Windows(image, place // columns, place % columns), highest.reshape(-1) > 0

    def _look_closer(
        self, images: torch.Tensor, told: torch.Tensor, windows: Windows, chosen: torch.Tensor, rough: bool
    ) -> tuple[torch.Tensor, ...]:
        """How much of the final map is from a closer look, that part of it, smoothed, and, if wanted, rough.

        Stage two does not run in windows that are not chosen on a CPU, and hardly in an exported graph, which decides
        for a few ranks of windows at a time, for the whole batch. Each map is ``(B, 1, H, W)``.
        """
        if is_exporting():
            return self._look_in_groups(images, told, windows, chosen)
        if not torch.compiler.is_compiling() and images.device.type == "cpu":
            windows, chosen = Windows(*(part[chosen] for part in windows)), chosen[chosen]
            if len(chosen) == 0:
                return (torch.zeros_like(images[:, :1]),) * (2 + rough)
        return self._closer_maps(images, told, windows, chosen, rough)

    def _look_in_groups(
        self, images: torch.Tensor, told: torch.Tensor, windows: Windows, chosen: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The first two maps of :meth:`_look_closer`, by groups of ranks: most images have few suspicious windows."""
        batch = images.shape[0]
        maps = (torch.zeros_like(images[:, :1]),) * 2
        for first, last in _groups(chosen.shape[0] // batch):
            own, *places = (part.reshape(batch, -1)[:, first:last].flatten() for part in (chosen, *windows))
            found = torch.cond(
                own.any(),
                lambda images, told, own, *places: self._closer_maps(images, told, Windows(*places), own, rough=False),
                lambda images, *_: tuple(torch.zeros_like(images[:, :1]).contiguous() for _ in range(2)),
                (images, told, own, *places),
            )
            maps = tuple(total + part for total, part in zip(maps, found, strict=True))
        return maps

    def _closer_maps(
        self, images: torch.Tensor, told: torch.Tensor, windows: Windows, chosen: torch.Tensor, rough: bool
    ) -> tuple[torch.Tensor, ...]:
        """The maps of :meth:`_look_closer`, of which the windows that are not chosen are no part."""
        grid = self._grid(*images.shape[-2:])
        found = self._look(images, told, windows)[1]
        weights = grid.weights(windows) * chosen.view(-1, 1, 1, 1)
        maps = [torch.ones_like(found), self.smooth(found)] + [found] * rough
        return tuple(grid.write(values, windows, weights, images.shape[0]) for values in maps)

    def _look(
        self, images: torch.Tensor, told: torch.Tensor, windows: Windows, numbers: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stage two's logits of windows, and what they come to with all that is known, each ``(N, 1, side, side)``.

        ``told`` is what stage one says of the reduced images, see :func:`_told`.
        """
        grid = self._grid(*images.shape[-2:])
        pixels = grid.cut(images, windows)
        told = self._reduced_grid(*told.shape[-2:]).cut(told, windows)
        told = functional.interpolate(told, scale_factor=float(self.zoom), mode="bilinear", align_corners=False)
        seen = self.close_template(pixels, numbers)
        detail = torch.cat([2 * pixels.float() - 1, told, *_distance(seen)], dim=1)
        logits = self.stage_two(*seen.levels, in_quarters(detail)).float()
        logits = logits[..., : grid.side, : grid.side]
        trained = (told[:, :2].mean(dim=1, keepdim=True) + logits.sigmoid()) / 2
        return logits, self.weigh(trained, None if seen.distance is None else (told[:, 2:] + seen.distance) / 2)

    def _to_learn_from(self, told: torch.Tensor, mask: torch.Tensor) -> Windows:
        """Two windows of each image: one with paint in it, or any, and another where stage one is most mistaken."""
        mistaken = (told[:, :2].mean(dim=1, keepdim=True) - mask).abs()
        painted, mistaken = (functional.max_pool2d(values, self._core, ceil_mode=True) for values in (mask, mistaken))
        batch, _, _, columns = painted.shape
        painted, mistaken = painted.flatten(1), mistaken.flatten(1)
        one = (painted + torch.rand_like(painted)).argmax(dim=1, keepdim=True)
        other = (mistaken + 0.1 * torch.rand_like(mistaken)).scatter(1, one, -1.0).argmax(dim=1, keepdim=True)
        place = torch.cat([one, other], dim=1).flatten()
        image = torch.arange(batch, device=place.device).repeat_interleave(_LEARNED)
        return Windows(image, place // columns, place % columns)

    @property
    def _core(self) -> int:
        """Side of a window's core in pixels of the reduced image."""
        return max(1, round(_CORE / self.zoom))

    @property
    def _margin(self) -> int:
        """Margin around it in pixels of the reduced image."""
        return max(1, round(_MARGIN / self.zoom))

    def _grid(self, height: int, width: int) -> WindowGrid:
        """The windows of images of this size."""
        return WindowGrid(height, width, self.zoom * self._core, self.zoom * self._margin)

    def _reduced_grid(self, height: int, width: int) -> WindowGrid:
        """The same windows in reduced images of this size."""
        return WindowGrid(height, width, self._core, self._margin)

    def _enlarge(self, values: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """Maps of reduced images for those of this height and width."""
        large = functional.interpolate(values, scale_factor=float(self.zoom), mode="bilinear", align_corners=False)
        return large[..., : size[0], : size[1]]

    def _repeat(self, values: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """The same without mixing values."""
        large = values.repeat_interleave(self.zoom, dim=-2).repeat_interleave(self.zoom, dim=-1)
        return large[..., : size[0], : size[1]]


def _groups(count: int) -> Iterator[tuple[int, int]]:
    """First rank and the one after the last of each group of ``count`` windows: 1, 3, 12 and so on, as many as left."""
    first, last = 0, 1
    while first < count:
        yield first, min(last, count)
        first, last = last, 4 * last


class _Sample:
    """A bounded sample of windows, evenly taken from however many there are, in half precision."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: list[tuple[torch.Tensor, int]] = []
        self._step = 1
        self._count = 0

    def add(self, windows: torch.Tensor, number: int) -> None:
        """Add windows ``(N, C, side, side)`` of an image of this number."""
        for window in windows:
            if self._count % self._step == 0:
                self._kept.append((window.half().cpu(), number))
            self._count += 1
            if len(self._kept) > 2 * self._most:
                self._kept, self._step = self._kept[::2], 2 * self._step

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        return ((window.float(), number) for window, number in self._kept)


def _told(way: Way, seen: Seen) -> torch.Tensor:
    """What stage two is told of stage one: its map, the mean of that over superpixels, and the distance if any."""
    return torch.cat([way.stage_one_map, way.refined.pooled, *_distance(seen)], dim=1)


def _distance(seen: Seen) -> list[torch.Tensor]:
    return [] if seen.distance is None else [seen.distance]


def _mirrored(places: torch.Tensor, size: int) -> torch.Tensor:
    """Places beyond the edge of a line of pixels as those that they mirror."""
    last = size - 1
    return (last - (last - places.abs()).abs()).clamp(0, last)
