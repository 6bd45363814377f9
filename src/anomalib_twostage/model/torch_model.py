# SPDX-License-Identifier: Apache-2.0
"""The two-stage model: two segmentation networks with the superpixels of the input between them."""

import json
import logging
import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from anomalib.data import InferenceBatch
from kornia.filters import filter2d_separable, get_gaussian_kernel1d
from torch import nn
from torch.nn import functional

from anomalib_twostage.common.precision import full_precision
from anomalib_twostage.common.tracing import is_exporting
from anomalib_twostage.pseudo_anomaly import imitate_faults
from anomalib_twostage.superpixels.slic import Slic

from .decoder import Decoder
from .refiner import RefinedImage, SuperpixelRefiner
from .unet import UNet

__all__ = ["Seen", "StageMaps", "TwoStageSuperpixelModel", "Way"]

logger = logging.getLogger(__name__)

# What decides the answer beside the weights, and the part that has it.
_SETTINGS = {
    "gate": "",
    "smoothing": "",
    "score_window": "",
    "zoom": "",
    "segment_size": "slic",
    "compactness": "slic",
    "num_iterations": "slic",
    "threshold": "refiner",
    "margin": "refiner",
    "num_neighbors": "template",
    "magnification": "template",
}
# Settings that weights of earlier versions come without, and what they were trained with.
_EARLIER = {"magnification": 1.0}


class Seen(NamedTuple):
    """What the networks see of images.

    Attributes:
        levels: Stage one's inputs ``(B, C, h, w)``.
        distance: How far each place is from the good images, ``(B, 1, H, W)`` float32 in [0, 1), or ``None``.
        reduced: The images that all this is of, ``(B, C, H, W)``, where those are smaller than the ones given.
    """

    levels: tuple[torch.Tensor, ...]
    distance: torch.Tensor | None = None
    reduced: torch.Tensor | None = None


class StageMaps(NamedTuple):
    """Everything between the image and the final map, for training, figures and ablations.

    Attributes:
        stage_one_logits: ``(B, 1, H, W)``, unbounded.
        stage_one_map: ``(B, 1, H, W)`` float32 in [0, 1].
        labels: Superpixel labels ``(B, H, W)`` int64.
        pooled_map: Stage one's map averaged over each superpixel, ``(B, 1, H, W)`` float32 in [0, 1].
        selected: 1 where a superpixel was selected, ``(B, 1, H, W)`` float32.
        refined_image: The image where selected, zero elsewhere, ``(B, C, H, W)``.
        stage_two_logits: What stage two's loss is taken on, ``(B, 1, H, W)``; ``None`` before stage two, and in
            evaluation zero for images of which nothing is selected, where stage two does not run for them. Of a model
            that zooms ``None``: they are of windows.
        fused_map: All maps together, ``(B, 1, H, W)`` float32 in [0, 1].
        anomaly_map: The final map: the fused map, smoothed. ``(B, 1, H, W)`` float32 in [0, 1].
        distance: How far each place is from the good images, ``(B, 1, H, W)`` float32 in [0, 1), or ``None``.
        looked: Of a model that zooms, how much of the final map is from a closer look, ``(B, 1, H, W)`` float32 in
            [0, 1].
    """

    stage_one_logits: torch.Tensor
    stage_one_map: torch.Tensor
    labels: torch.Tensor
    pooled_map: torch.Tensor
    selected: torch.Tensor
    refined_image: torch.Tensor
    stage_two_logits: torch.Tensor | None
    fused_map: torch.Tensor
    anomaly_map: torch.Tensor
    distance: torch.Tensor | None = None
    looked: torch.Tensor | None = None


class Way(NamedTuple):
    """What lies between the image and the maps that are fused."""

    stage_one_logits: torch.Tensor
    stage_one_map: torch.Tensor
    labels: torch.Tensor
    refined: RefinedImage
    stage_two_logits: torch.Tensor | None


class TwoStageSuperpixelModel(nn.Module):
    """Stage one, superpixel refinement, stage two.

    The parts are passed in. With a template, what the networks see of an image includes its deviation from the good
    ones. Two gates tie the stages together:

    * ``"hard"``, as published: stage two sees the refined image alone and draws the map; outside the selected
      superpixels the map is zero.
    * ``"average"``: stage two sees what stage one sees, stage one's map and its superpixel average. Its map, zero
      outside the selected superpixels, is averaged with the mean of those two maps. So stage one's ranking stands
      outside, where the hard gate would tie every missed pixel at zero, and nothing outside ranks above what stage two
      confirms inside.

    Until stage two has begun to learn (:attr:`stage` is 1) the map is stage one's alone: its map for the hard gate,
    the mean of it and its superpixel average for the other.

    Args:
        stage_one: Network to logits from images, or, with a template, from images and their deviations.
        slic: Superpixels of the images.
        refiner: Selects superpixels.
        stage_two: Network to logits, from the refined image (``"hard"``) or from what stage one sees and two maps
            (``"average"``, two channels more).
        gate: How stage two's output enters the map.
        template: Template of the good images, or ``None``.
        smoothing: Standard deviation in pixels of a Gaussian that smooths the final map; 0 leaves it as it is.

    Raises:
        ValueError: If ``gate`` is unknown, or ``smoothing`` is negative or not finite.

    Example:
        >>> from anomalib_twostage.model.variants import two_stage_superpixel_model
        >>> model = two_stage_superpixel_model("small").eval()
        >>> model(torch.rand(2, 3, 128, 96)).anomaly_map.shape
        torch.Size([2, 1, 128, 96])
    """

    stage_one: UNet | Decoder
    slic: Slic
    refiner: SuperpixelRefiner
    stage_two: UNet | Decoder
    _kernel: torch.Tensor  # of smoothing, along one side
    template: Any  # GoldenTemplate, FeatureTemplate or None

    # The image score is the highest mean over a window of this many pixels: one bright pixel is noise.
    score_window = 7

    # Pixels of an image to one of those that stage one sees.
    zoom = 1

    def __init__(
        self,
        stage_one: UNet | Decoder,
        slic: Slic,
        refiner: SuperpixelRefiner,
        stage_two: UNet | Decoder,
        gate: Literal["hard", "average"] = "average",
        template: nn.Module | None = None,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if gate not in ("hard", "average"):
            msg = f"gate must be 'hard' or 'average', got {gate!r}."
            raise ValueError(msg)
        if not 0 <= smoothing < math.inf:
            msg = f"smoothing must be 0 pixels or more and finite, got {smoothing}."
            raise ValueError(msg)
        self.stage_one = stage_one
        self.slic = slic
        self.refiner = refiner
        self.stage_two = stage_two
        self.gate = gate
        self.template = template
        self.smoothing = smoothing
        self.stage = 1

    def forward(self, images: torch.Tensor, kept: list[StageMaps] | None = None) -> InferenceBatch:
        """Detect anomalies.

        Args:
            images: ``(B, C, H, W)`` in [0, 1].
            kept: A list that gets everything between the images and the answer, see :meth:`stages`.

        Returns:
            ``anomaly_map`` ``(B, 1, H, W)`` and ``pred_score`` ``(B,)``, float32 in [0, 1].
        """
        seen = self.seen(images)
        return self._answer(images, seen, self.stage_one_logits(images, seen), kept)

    def _answer(
        self, images: torch.Tensor, seen: Seen, stage_one_logits: torch.Tensor, kept: list[StageMaps] | None
    ) -> InferenceBatch:
        way = self._through_stages(images, seen, stage_one_logits)
        fused_map = self._all_together(way, seen.distance)
        anomaly_map = self.smooth(fused_map)
        if kept is not None:
            on_the_way = (way.stage_one_logits, way.stage_one_map, way.labels, way.refined.pooled)
            of_stage_two = (way.refined.selected, way.refined.image, way.stage_two_logits)
            kept.append(StageMaps(*on_the_way, *of_stage_two, fused_map, anomaly_map, seen.distance))
        return InferenceBatch(pred_score=self.score(anomaly_map), anomaly_map=anomaly_map)

    def _to_superpixels(self, images: torch.Tensor, stage_one_logits: torch.Tensor) -> Way:
        """From stage one's logits to the refined image."""
        stage_one_map = stage_one_logits.detach().float().sigmoid()
        labels = self.slic(images)
        refined = self.refiner(images, stage_one_map, labels, self.slic.max_segments(*images.shape[-2:]))
        return Way(stage_one_logits, stage_one_map, labels, refined, None)

    def _through_stages(self, images: torch.Tensor, seen: Seen, stage_one_logits: torch.Tensor) -> Way:
        way = self._to_superpixels(images, stage_one_logits)
        if self.stage == 1:
            return way
        handed_on = self._handed_on(images, seen, way)
        return way._replace(stage_two_logits=self._stage_two_logits(handed_on, way.refined.selected))

    def stages(self, images: torch.Tensor, stage_one_logits: torch.Tensor | None = None) -> StageMaps:
        """Detect anomalies as :meth:`forward` does, and return everything on the way.

        Args:
            images: ``(B, C, H, W)`` in [0, 1].
            stage_one_logits: Logits ``(B, 1, H, W)`` to take for stage one's; by default stage one computes them.

        Returns:
            See :class:`StageMaps`.
        """
        kept: list[StageMaps] = []
        seen = self.seen(images)
        if stage_one_logits is None:
            stage_one_logits = self.stage_one_logits(images, seen)
        self._answer(images, seen, stage_one_logits, kept)
        return kept[0]

    def known_images(self) -> set[int]:
        """Numbers of the images of which it knows what it has from them, and which are not to find themselves."""
        return set()

    def to_be_painted(
        self, images: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Training images ``(B, C, H, W)``, and their mask if they have one, as the stage that learns takes them."""
        return images, mask

    def learned_logits(
        self, images: torch.Tensor, mask: torch.Tensor, numbers: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the stage that learns, on which its loss is taken, and what they should be.

        Stage two sees stage one's maps with faults (:func:`~anomalib_twostage.pseudo_anomaly.imitate_faults`).

        Args:
            images: Training images ``(B, C, H, W)`` in [0, 1], painted.
            mask: Where they are, ``(B, 1, H, W)`` in {0, 1}.
            numbers: Numbers of the images ``(B,)`` int64, by which a template knows its own.

        Returns:
            ``(B, 1, H, W)``, unbounded, and the mask; or both of some windows of the images.
        """
        seen = self.seen(images, numbers)
        logits = self.stage_one_logits(images, seen)
        if self.stage == 1:
            return logits, mask
        way = self._through_stages(images, seen, imitate_faults(logits.float()))
        assert way.stage_two_logits is not None
        return way.stage_two_logits, mask

    def end_run(self) -> None:
        """Say what should be known of the images of a run, which ends."""

    def remember(self, images: Iterable[tuple[torch.Tensor, int]]) -> None:
        """Take the template of good images ``(C, H, W)``, each with the number it is known by."""
        if self.template is not None:
            self.template.fit(image for image, _ in images)

    def seen(self, images: torch.Tensor, numbers: torch.Tensor | None = None) -> Seen:
        """What stage one sees of images ``(B, C, H, W)``: them and, with a template, their deviations beside them."""
        del numbers
        return Seen((images if self.template is None else torch.cat([images, self.template(images)], dim=1),))

    def stage_one_logits(self, images: torch.Tensor, seen: Seen) -> torch.Tensor:
        """Stage one's logits of what is seen of images, unbounded, ``(B, 1, H, W)`` as those or as the reduced ones."""
        size = (images if seen.reduced is None else seen.reduced).shape[-2:]
        return self._drawn(self.stage_one(*seen.levels), *size)

    def _drawn(self, logits: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Stage one's logits as it drew them, for images of this height and width."""
        return logits[..., :height, :width]

    def weigh(self, trained: torch.Tensor, distance: torch.Tensor | None) -> torch.Tensor:
        """Give the distance its voice in a map ``(B, 1, H, W)``: here it has none."""
        del distance
        return trained

    def _handed_on(self, images: torch.Tensor, seen: Seen, way: Way) -> tuple[torch.Tensor, ...]:
        """What stage two sees."""
        del images
        if self.gate == "hard":
            return (way.refined.image,)
        maps = torch.cat([way.stage_one_map, way.refined.pooled], dim=1)
        return (torch.cat([seen.levels[0], maps.to(seen.levels[0].dtype)], dim=1),)

    def _stage_two_logits(self, seen: tuple[torch.Tensor, ...], selected: torch.Tensor) -> torch.Tensor:
        """Logits of stage two ``(B, 1, H, W)``; in evaluation zero for images of which nothing is selected.

        Unless it speaks everywhere, stage two has no say there, so on a CPU it does not run for them: on a production
        line most images are good. An exported graph decides for the whole batch. Any other device would have to be
        asked and waited for, and runs it all.
        """
        height, width = selected.shape[-2:]

        def run(*seen: torch.Tensor) -> torch.Tensor:
            return self.stage_two(*seen).float()[..., :height, :width]

        if self.speaks_everywhere:
            return run(*seen)
        if is_exporting() and not self.training:
            touched = selected.amax(dim=(0, 1, 2, 3)) > 0
            logits: torch.Tensor = torch.cond(
                touched,
                # A network at full resolution leaves other strides than zeros have, and so does cutting to an odd size.
                lambda _, *seen: run(*seen).squeeze(1).contiguous().unsqueeze(1),
                lambda selected, *_: torch.zeros_like(selected),
                (selected, *seen),
            )
            return logits
        if self.training or torch.compiler.is_compiling() or selected.device.type != "cpu":
            return run(*seen)
        chosen = selected.flatten(1).any(dim=1).nonzero().flatten()
        if len(chosen) == len(selected):
            return run(*seen)
        logits = torch.zeros_like(selected)
        return logits if len(chosen) == 0 else logits.index_copy(0, chosen, run(*(level[chosen] for level in seen)))

    def _all_together(self, way: Way, distance: torch.Tensor | None) -> torch.Tensor:
        """All maps together, ``(B, 1, H, W)``; without stage two's logits those of stage one."""
        first = self._first(way.stage_one_map, way.refined.pooled)
        if way.stage_two_logits is None:
            return self.weigh(first, distance)
        second = way.stage_two_logits.sigmoid()
        if not self.speaks_everywhere:
            second = second * way.refined.selected
        return self.weigh(second, distance) if self.gate == "hard" else self._fuse(first, second, distance)

    def _fuse(self, first: torch.Tensor, second: torch.Tensor, distance: torch.Tensor | None) -> torch.Tensor:
        """What stage one says, what stage two says where it has a say, and the distance, as one map."""
        return self.weigh((first + second) / 2, distance)

    def without_stage_two(self, stages: StageMaps) -> torch.Tensor:
        """The fused map as it would be without stage two, ``(B, 1, H, W)``."""
        return self.weigh(self._first(stages.stage_one_map, stages.pooled_map), stages.distance)

    def _first(self, stage_one_map: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """What stage one says together with its superpixels, ``(B, 1, H, W)``."""
        return stage_one_map if self.gate == "hard" else (stage_one_map + pooled) / 2

    def smooth(self, anomaly_map: torch.Tensor) -> torch.Tensor:
        """Smooth maps ``(B, 1, H, W)`` as the final map is, in float32: half precision would tie pixels."""
        if not self.smoothing:
            return anomaly_map
        with full_precision(anomaly_map.device):
            return filter2d_separable(anomaly_map, self._kernel, self._kernel, "replicate")

    def score(self, anomaly_map: torch.Tensor) -> torch.Tensor:
        """Image scores ``(B,)`` of maps ``(B, 1, H, W)``: the highest mean over a small window."""
        smooth = functional.avg_pool2d(anomaly_map, self.score_window, stride=1, padding=self.score_window // 2)
        return smooth.amax(dim=(1, 2, 3))

    @property
    def smoothing(self) -> float:
        """Standard deviation in pixels of the Gaussian that smooths the final map."""
        return self._smoothing

    @smoothing.setter
    def smoothing(self, value: float) -> None:
        self._smoothing = value = float(value)
        # A buffer, not made where it is used: a branch of an exported graph cannot hold constants of its own.
        kernel = get_gaussian_kernel1d(2 * math.ceil(3 * value) + 1, value) if value else torch.ones(1, 1)
        self.register_buffer("_kernel", kernel, persistent=False)

    def start_stage_one(self) -> None:
        """Let stage one learn, and speak alone: a new training begins."""
        self._set_stage(1)

    def start_stage_two(self) -> None:
        """Freeze stage one, weights and batch-norm statistics, and let stage two learn and speak.

        With the average gate stage two continues from stage one's weights; those of its two further input channels
        start at zero. So it begins as stage one's equal, and all it learns is on top.
        """
        if self.stage == 1:
            self._hand_over_weights()
        self._set_stage(2)

    def _hand_over_weights(self) -> None:
        """Let stage two continue from stage one's weights."""
        if self.gate != "average":
            return
        weights = self.stage_one.state_dict()
        name = "encoder.0.0.weight"
        first = torch.zeros_like(self.stage_two.state_dict()[name])
        first[:, : weights[name].shape[1]] = weights[name]
        self.stage_two.load_state_dict({**weights, name: first})

    def _set_stage(self, stage: int) -> None:
        self.stage = stage
        self.stage_one.requires_grad_(stage == 1)
        self.train(self.training)

    @property
    def speaks_everywhere(self) -> bool:
        """Whether stage two has a say outside the selected superpixels too."""
        return False

    def train(self, mode: bool = True) -> "TwoStageSuperpixelModel":
        """Set training mode; stage one stays in evaluation mode once it is frozen."""
        super().train(mode)
        if self.stage == 2:
            self.stage_one.eval()
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the answer beside the weights, by the names of the arguments of the parts."""
        return {name: getattr(owner, name) for name, owner in self._owners().items()}

    def _owners(self) -> dict[str, nn.Module]:
        """The part that each setting belongs to."""
        parts = {name: getattr(self, part) if part else self for name, part in _SETTINGS.items()}
        return {name: part for name, part in parts.items() if hasattr(part, name)}

    def get_extra_state(self) -> torch.Tensor:
        """Carry the stage and the settings inside the state dict: JSON in a tensor ``(N,)`` uint8.

        As a tensor because that is what ``weights_only`` loading, averaging and comparing state dicts expect.
        """
        return pack_state({"stage": self.stage, **self.settings})

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Take over the stage and the settings of a state dict, and log which settings replace others.

        Args:
            state: What ``get_extra_state`` returned, or, from earlier versions, the stage alone as a number.

        Raises:
            ValueError: If it holds a setting that this version does not know.
        """
        loaded = {"stage": int(state)} if state.ndim == 0 else json.loads(bytes(state.tolist()))
        self._set_stage(loaded.pop("stage"))
        loaded.pop("windows", None)  # of earlier versions: no training depends on it, so it is the model's own
        if unknown := sorted(loaded.keys() - _SETTINGS.keys()):
            msg = f"The weights come with settings that are not known here, {unknown}: update anomalib-twostage."
            raise ValueError(msg)
        own, owners = self.settings, self._owners()
        replaced = {name: value for name, value in (_EARLIER | loaded).items() if name in own and value != own[name]}
        for name, value in replaced.items():
            setattr(owners[name], name, value)
        if replaced:
            logger.warning(
                "The weights were trained with other settings, which are taken over: %s.",
                ", ".join(f"{name}={value} instead of {own[name]}" for name, value in replaced.items()),
            )


def pack_state(state: dict[str, Any]) -> torch.Tensor:
    """Plain values as JSON in a tensor ``(N,)`` uint8."""
    return torch.tensor(list(json.dumps(state, default=_plain).encode()), dtype=torch.uint8)


def _plain(number: Any) -> Any:
    """One of NumPy's numbers as one of Python's, which alone JSON knows."""
    return number.item()


def __getattr__(name: str) -> Any:
    """Find what has moved to :mod:`~anomalib_twostage.model.variants`, which builds on this module."""
    if name in ("VARIANTS", "Variant", "two_stage_superpixel_model"):
        from . import variants

        return getattr(variants, name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
