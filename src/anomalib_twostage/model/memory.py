# SPDX-License-Identifier: Apache-2.0
"""What good images are like: the mean of each place, and a memory of patches to find the nearest in.

PatchCore (Roth et al., 2022) keeps patches of the good images, chosen by k-center so that the rare ones stay, and
scores an image by its nearest. Here the difference to the nearest is what the networks look at, and its length keeps a
voice in the final map: a network is sure of what no paint resembles, a memory is not.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from anomalib_twostage.common.buffers import resize_buffers
from anomalib_twostage.common.spacing import evenly_spaced
from anomalib_twostage.common.tracing import is_exporting

__all__ = ["FeatureSums", "Nearest", "PatchMemory", "PlaceStatistics", "as_patches", "farthest_first"]

_CANDIDATES = 200_000
_CALIBRATED = 20_000  # patches that the scale of the distance is taken from
_PROJECTED = 64  # dimensions in which patches are chosen: enough to tell their distances
_ENTRIES = 2**25  # of a table of places by patches in memory: 128 MiB
_ENTRIES_CPU = 2**20  # there 4 MiB, so that what was just written is read from the cache
_GROUP = 64  # patches looked through at once: about the root of 2,048, and whole vector registers
_FLOOR = 1e-3  # of spreads and distances, in units of the features: images may all be alike
_LIMIT = 3.0  # beyond so many spreads all is equally far


class Nearest(NamedTuple):
    """How patches differ from the nearest good ones, in units of the features' spread.

    Attributes:
        difference: Signed difference of the features, ``(B, C, h, w)`` in [-3, 3].
        distance: Length of the difference of the patches, ``(B, 1, h, w)`` from 0 up: 1 is what one good patch of a
            thousand exceeds.
    """

    difference: torch.Tensor
    distance: torch.Tensor


class FeatureSums:
    """Sums over the features of good images, batch by batch.

    Attributes:
        count: Images so far.
        total: Sum of their features ``(C, h, w)``; those of another size than the first ones' are scaled to it.
        squares: Sum of the mean squares of each channel ``(C,)``.
    """

    def __init__(self) -> None:
        self.count = 0
        self.total = torch.empty(0)
        self.squares = torch.empty(0)

    def add(self, features: torch.Tensor) -> None:
        """Add features ``(B, C, h, w)``."""
        values = features.double() if features.device.type == "cpu" else features.float()  # not every device has more
        if self.count == 0:
            self.total, self.squares = torch.zeros_like(values[0]), torch.zeros_like(values[0, :, 0, 0])
        self.count += len(values)
        self.squares = self.squares + values.square().mean(dim=(2, 3)).sum(dim=0)
        if values.shape[-2:] != self.total.shape[-2:]:
            values = functional.interpolate(values, self.total.shape[-2:], mode="bilinear", align_corners=False)
        self.total = self.total + values.sum(dim=0)


class PlaceStatistics(nn.Module):
    """Mean and spread of each feature over the good images, and its mean at each place.

    Before :meth:`fit` the spread is one and the means are zero.

    Args:
        channels: Channels of the features.
        place: Whether each place has its own mean; otherwise all have the same.

    Example:
        >>> sums = FeatureSums()
        >>> sums.add(torch.rand(5, 4, 8, 8))
        >>> statistics = PlaceStatistics(channels=4)
        >>> statistics.fit(sums)
        >>> statistics.deviation(statistics.scaled(torch.rand(2, 4, 16, 16))).shape
        torch.Size([2, 4, 16, 16])
    """

    middle: torch.Tensor
    spread: torch.Tensor
    mean: torch.Tensor

    def __init__(self, channels: int, place: bool = True) -> None:
        super().__init__()
        self.place = place
        self.register_buffer("middle", torch.zeros(channels, 1, 1))
        self.register_buffer("spread", torch.ones(channels, 1, 1))
        self.register_buffer("mean", torch.zeros(channels, 1, 1))

    def fit(self, sums: "FeatureSums") -> None:
        """Take the statistics of the features of good images.

        Raises:
            ValueError: If there are none.
        """
        if sums.count == 0:
            msg = "A template needs at least one good image, got none."
            raise ValueError(msg)
        mean, device = sums.total / sums.count, self.mean.device
        middle = mean.mean(dim=(1, 2), keepdim=True)
        spread = (sums.squares.view(-1, 1, 1) / sums.count - middle.square()).clamp_min(0).sqrt()
        spread = torch.maximum(spread, _FLOOR * spread.max().clamp_min(_FLOOR))
        mean = (mean - middle) / spread if self.place else torch.zeros_like(middle)
        self.middle, self.spread, self.mean = (value.float().to(device) for value in (middle, spread, mean))

    def scaled(self, features: torch.Tensor) -> torch.Tensor:
        """Features ``(B, C, h, w)`` less their mean, in units of their spread, float32."""
        return (features.float() - self.middle) / self.spread

    def deviation(self, scaled: torch.Tensor) -> torch.Tensor:
        """Signed difference of scaled features ``(B, C, h, w)`` to the mean of their places, in [-3, 3]."""
        mean = self.mean
        # Sizes are symbols while the model is traced for export, where a comparison would freeze them.
        if mean.shape[-1] > 1 and (torch.compiler.is_compiling() or mean.shape[-2:] != scaled.shape[-2:]):
            mean = functional.interpolate(mean[None], scaled.shape[-2:], mode="bilinear", align_corners=False)[0]
        return (scaled - mean).clamp(-_LIMIT, _LIMIT)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the size of what is loaded: it is that of the good images."""
        resize_buffers(self, state_dict, prefix, {"mean": 0})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class PatchMemory(nn.Module):
    """Patches of good images at one resolution. A patch is the features of a place and their mean over 3 x 3 places.

    Before :meth:`fit` it holds a single patch of zeros.

    Args:
        channels: Channels of the features.
        size: Patches to keep at most.

    Raises:
        ValueError: If ``size`` is below 1.

    Example:
        >>> memory = PatchMemory(channels=4, size=10)
        >>> memory.fit(torch.rand(100, 8), torch.arange(100) // 20)
        >>> memory(torch.rand(2, 4, 8, 8)).distance.shape
        torch.Size([2, 1, 8, 8])
    """

    patches: torch.Tensor
    sources: torch.Tensor
    scale: torch.Tensor

    def __init__(self, channels: int, size: int = 2048) -> None:
        super().__init__()
        if size < 1:
            msg = f"A memory keeps at least one patch, got size={size}."
            raise ValueError(msg)
        self.channels = channels
        self.size = size
        self.register_buffer("patches", torch.zeros(1, 2 * channels))
        self.register_buffer("sources", torch.full((1,), -1, dtype=torch.int64))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def fit(self, patches: torch.Tensor, sources: torch.Tensor) -> bool:
        """Choose patches to keep, and take the scale of the distance.

        The same patches give the same memory, on every process. Where there is one image, or all are alike, distances
        of good patches cannot be measured; those of their features' spread stand for them.

        Args:
            patches: Patches of good images ``(N, 2C)``; of more than 200,000, some evenly spaced ones are looked at.
            sources: Numbers of the images that they are from, ``(N,)`` int64.

        Returns:
            Whether distances could be measured.

        Raises:
            ValueError: If there are no patches.
        """
        if len(patches) == 0:
            msg = "A memory needs at least one good patch, got none."
            raise ValueError(msg)
        device = self.patches.device
        some = torch.tensor(evenly_spaced(len(patches), _CANDIDATES))
        patches = patches[some.to(patches.device)].float().to(device)
        sources = sources[some.to(sources.device)].to(device)
        if bool((sources == sources[0]).all()):  # there would be nothing else to find
            sources = torch.full_like(sources, -1)
        chosen = farthest_first(patches, self.size)
        self.patches, self.sources = patches[chosen], sources[chosen]
        usual = self._usual_distance(patches, sources)
        measured = bool(usual > _FLOOR)
        self.scale = usual if measured else torch.ones_like(usual)
        return measured

    @torch.no_grad()
    def forward(self, features: torch.Tensor, numbers: torch.Tensor | None = None) -> Nearest:
        """Compare features with the memory.

        Args:
            features: Features as :meth:`PlaceStatistics.scaled` returns them, ``(B, C, h, w)`` float32.
            numbers: Numbers of the images ``(B,)`` int64. An image does not find patches of its own number.

        Returns:
            See :class:`Nearest`. NaN stays NaN in the places that see it.
        """
        batch, channels, height, width = features.shape
        places = as_patches(features)
        difference = places - self.patches[self._nearest(places, batch, height * width, numbers)]
        distance = difference.square().mean(dim=1).sqrt() / self.scale
        shown = difference[:, :channels].clamp(-_LIMIT, _LIMIT).reshape(batch, height, width, channels)
        return Nearest(shown.permute(0, 3, 1, 2), distance.reshape(batch, 1, height, width))

    def _nearest(self, places: torch.Tensor, batch: int, per_image: int, numbers: torch.Tensor | None) -> torch.Tensor:
        """Index of the nearest patch for each of ``(B * P, D)`` places: ``(B * P,)``."""
        half_lengths = self._half_lengths()
        if is_exporting():  # sizes are symbols there, and no image has a number
            return first_highest(self._similarity(places, half_lengths))
        if numbers is None:
            half_lengths = half_lengths.expand(batch, 1, -1)
        else:  # what is infinitely long is near to nothing
            own = self.sources == numbers.unsqueeze(1)
            half_lengths = half_lengths.masked_fill(own, torch.inf).unsqueeze(1)  # (B, 1, N)
        entries = _ENTRIES_CPU if places.device.type == "cpu" else _ENTRIES
        images_at_once = max(1, entries // (per_image * len(self.patches)))
        places_at_once = max(1, entries // len(self.patches))
        found = []
        some_images = places.unflatten(0, (batch, per_image)).split(images_at_once)
        for some, lengths in zip(some_images, half_lengths.split(images_at_once), strict=True):
            parts = some.split(places_at_once, dim=1)
            found += [first_highest(self._similarity(part, lengths)).flatten() for part in parts]
        return torch.cat(found)

    def _half_lengths(self) -> torch.Tensor:
        """Half the squared lengths of the patches, ``(N,)``."""
        return self.patches.square().sum(dim=1) / 2

    def _similarity(self, places: torch.Tensor, half_lengths: torch.Tensor) -> torch.Tensor:
        """What is the greater the nearer patches are to places ``(..., P, D)``: ``(..., P, N)``.

        ``half_lengths`` are those of the patches, ``(N,)`` or as many as there are images, ``(B, 1, N)``.
        """
        patches = self.patches
        if places.device.type != "cpu" and not is_exporting():
            # A user may allow products to be rounded (TF32). Halves with half the digits each lose none that count.
            (high, low), (patch_high, patch_low) = _halves(places), _halves(patches)
            places, patches = (
                torch.cat([high, high, low], dim=-1),
                torch.cat([patch_high, patch_low, patch_high], dim=1),
            )
        similarity = places @ patches.T  # with half the length taken off, most where |a - b|^2 is least
        return similarity - half_lengths if is_exporting() else similarity.sub_(half_lengths)

    def _usual_distance(self, patches: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        """The distance from patches to those of other images that one patch of a thousand exceeds."""
        some = torch.tensor(evenly_spaced(len(patches), _CALIBRATED)).to(patches.device)
        distances, half_lengths = [], self._half_lengths()
        for part, number in zip(patches[some].split(2048), sources[some].split(2048), strict=True):
            own = (self.sources == number.unsqueeze(1)) & (number >= 0).unsqueeze(1)
            near = first_highest(self._similarity(part, half_lengths).masked_fill(own, -torch.inf))
            distances.append((part - self.patches[near]).square().mean(dim=1).sqrt())
        ordered = torch.cat(distances).sort().values
        return ordered[int(0.999 * (len(ordered) - 1))]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the number of patches of what is loaded."""
        resize_buffers(self, state_dict, prefix, {"patches": 1, "sources": None})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def farthest_first(points: torch.Tensor, count: int) -> torch.Tensor:
    """Choose points so that none is far from a chosen one: k-center by farthest-first traversal (Gonzalez, 1985).

    Args:
        points: ``(N, D)`` float32. Of more than 64 dimensions, distances are those of a fixed random projection to 64.
        count: How many to choose at most.

    Returns:
        Indices, int64: first the point farthest from the mean, then always the one farthest from those before. All, if
        there are no more than ``count``.
    """
    if len(points) <= count:
        return torch.arange(len(points), device=points.device)
    points = points - points.mean(dim=0)
    if points.shape[1] > _PROJECTED:
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(points.shape[1], _PROJECTED, generator=generator) / _PROJECTED**0.5
        points = points @ directions.to(points.device)
    lengths = points.square().sum(dim=1)
    distance = torch.full_like(lengths, torch.inf)
    newest = lengths.argmax()
    chosen = [newest]
    for _ in range(count - 1):
        from_newest = lengths - 2 * (points @ points[newest]) + lengths[newest]
        distance = torch.minimum(distance, from_newest)
        distance[newest] = -torch.inf
        newest = distance.argmax()
        chosen.append(newest)
    return torch.stack(chosen)


def first_highest(values: torch.Tensor) -> torch.Tensor:
    """Index of the highest value, the first of equals, along the last dimension ``(..., N)``: int64 ``(...)``.

    The same as ``values.argmax(dim=-1)``, and many times faster on a CPU: it looks for the place within the best of
    some groups alone, and the highest of a group is found by vector instructions.
    """
    count = values.shape[-1]
    if count <= _GROUP:
        return values.argmax(dim=-1)
    if count % _GROUP:
        values = functional.pad(values, (0, -count % _GROUP), value=-torch.inf)
    groups = values.unflatten(-1, (-1, _GROUP))
    best = groups.amax(dim=-1).argmax(dim=-1, keepdim=True)
    inside = groups.gather(-2, best.unsqueeze(-1).expand(*best.shape, _GROUP)).squeeze(-2)
    return best.squeeze(-1) * _GROUP + inside.argmax(dim=-1)


def as_patches(features: torch.Tensor) -> torch.Tensor:
    """Patches ``(B * h * w, 2C)`` of features ``(B, C, h, w)``: each place's, and behind them the mean of 3 x 3."""
    means = functional.avg_pool2d(features, 3, stride=1, padding=1, count_include_pad=False)
    return torch.cat([features, means], dim=1).permute(0, 2, 3, 1).reshape(-1, 2 * features.shape[1])


def _halves(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors that add up to the values, the first of which has the digits of bfloat16."""
    high = values.bfloat16().float()
    return high, values - high
