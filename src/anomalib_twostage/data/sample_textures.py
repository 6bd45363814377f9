# SPDX-License-Identifier: Apache-2.0
"""A small data set in MVTec AD's layout, made on first use from photographs inside scikit-image.

It lets the model be tried, tested and demonstrated without a network and within minutes. It is no benchmark: the
defects are painted (see :mod:`anomalib_twostage.data.defects`), and all crops of a category come from one photograph.

Example:
    >>> from anomalib_twostage.data import SampleTextures
    >>> datamodule = SampleTextures(category="gravel")
    >>> datamodule.prepare_data()  # doctest: +SKIP
"""

import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from anomalib.data.datamodules.base.image import AnomalibDataModule
from anomalib.data.datasets.image.mvtecad import MVTecADDataset
from anomalib.data.utils import Split, TestSplitMode, ValSplitMode
from anomalib.utils.path import resolve_dataset_root
from PIL import Image
from skimage import data as photographs
from torchvision.transforms.v2 import Transform

from .defects import KINDS, paint_defect

__all__ = ["CATEGORIES", "Crop", "SampleTextures", "crops", "cut"]

logger = logging.getLogger(__name__)

CATEGORIES = ("brick", "grass", "gravel")
VERSION = 1  # to be raised with any change to the pixels
SIZE = 128
_SIDE = 512  # of the photographs
SPLIT_COLUMN = 320  # columns left of it are for training, the rest for testing: no pixel is in both
COUNTS = {"train/good": 100, "test/good": 20, **{f"test/{kind}": 6 for kind in sorted(KINDS)}}
_MANIFEST = "dataset.json"


@dataclass(frozen=True)
class Crop:
    """Where one image of the data set comes from.

    Attributes:
        split: ``"train"`` or ``"test"``.
        label: ``"good"`` or a kind of defect.
        index: Number of the image in its folder.
        top: First row in the photograph.
        left: First column in the photograph.
        quarter_turns: Counter-clockwise rotation of the crop in steps of 90 degrees.
        mirror: Whether the crop is then mirrored left to right.
    """

    split: str
    label: str
    index: int
    top: int
    left: int
    quarter_turns: int
    mirror: bool

    @property
    def file(self) -> str:
        """Path of the image below the category's folder."""
        return f"{self.split}/{self.label}/{self.index:03}.png"

    @property
    def mask_file(self) -> str:
        """Path of the mask below the category's folder, as MVTec AD names it."""
        return f"ground_truth/{self.label}/{self.index:03}_mask.png"


class SampleTextures(AnomalibDataModule):
    """Sample textures datamodule: brick, grass and gravel, 128 x 128 pixels, with painted test defects.

    Each category has 100 images for training and 56 for testing: 20 good ones and 6 of each kind of defect (crack,
    foreign body, hole, scratch, smear, stain), with exact masks. The arguments are those of ``MVTecAD``, with
    defaults for a laptop.

    Args:
        root: Folder that holds the categories; ``None`` stands for anomalib's cache directory.
        category: ``"brick"``, ``"grass"`` or ``"gravel"``.
        train_batch_size: Batch size for training.
        eval_batch_size: Batch size for validation and testing.
        num_workers: Number of processes that load images.
        train_augmentations: Augmentations of the training images.
        val_augmentations: Augmentations of the validation images.
        test_augmentations: Augmentations of the test images.
        augmentations: Augmentations where none are given for a subset.
        test_split_mode: How the test set is made.
        test_split_ratio: Share of images for testing, for the modes that draw it from the training images.
        val_split_mode: How the validation set is made.
        val_split_ratio: Share of images for validation, for the modes that draw it from another subset.
        seed: Seed of random splits. The images themselves never depend on it.

    Raises:
        ValueError: If the category is unknown.

    Example:
        >>> from anomalib_twostage.data import SampleTextures
        >>> datamodule = SampleTextures(category="gravel")
        >>> datamodule.prepare_data()  # doctest: +SKIP
        >>> datamodule.setup()  # doctest: +SKIP
        >>> next(iter(datamodule.train_dataloader())).image.shape  # doctest: +SKIP
        torch.Size([8, 3, 128, 128])
    """

    def __init__(
        self,
        root: Path | str | None = "./datasets/SampleTextures",
        category: str = "brick",
        train_batch_size: int = 8,
        eval_batch_size: int = 8,
        num_workers: int = 0,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        test_split_mode: TestSplitMode | str = TestSplitMode.FROM_DIR,
        test_split_ratio: float = 0.2,
        val_split_mode: ValSplitMode | str = ValSplitMode.SAME_AS_TEST,
        val_split_ratio: float = 0.5,
        seed: int | None = None,
    ) -> None:
        _check_category(category)
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            test_split_mode=test_split_mode,
            test_split_ratio=test_split_ratio,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )
        self.root = resolve_dataset_root(root, "SampleTextures")
        self.category = category

    def _setup(self, _stage: str | None = None) -> None:
        # MVTecADDataset reads any category in MVTec AD's layout.
        self.train_data = MVTecADDataset(split=Split.TRAIN, root=self.root, category=self.category)
        self.test_data = MVTecADDataset(split=Split.TEST, root=self.root, category=self.category)

    def prepare_data(self) -> None:
        """Make the category unless it is there.

        A category's folder is complete or does not exist: it is made under a temporary name beside its place and then
        moved, so neither an interruption nor a second process leaves half a data set.

        Raises:
            FileExistsError: If something else, an incomplete copy or another version stands in its place. It is left
                alone, because it may be somebody's data.
            OSError: If the files cannot be written.
        """
        _check_category(self.category)
        folder = self.root / self.category
        if _exists(folder):
            _check_complete(folder)
            logger.info("Found the sample textures in %s.", folder)
            return
        logger.info("Making %d sample textures in %s, which takes seconds.", sum(COUNTS.values()), folder)
        photograph = getattr(photographs, self.category)()  # in scikit-image's wheel, never downloaded
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix=f".{self.category}-", dir=self.root, ignore_cleanup_errors=True) as scratch:
                # One level down, where the folder gets the user's permissions: the scratch folder itself is private.
                made = Path(scratch) / self.category
                _write_category(made, self.category, photograph)
                _move_into_place(made, folder)
        except OSError as error:
            msg = (
                f"Cannot write the sample textures to {self.root} ({error}); pass a folder you may write to as `root`."
            )
            raise OSError(msg) from error
        _check_complete(folder)


def crops(category: str) -> list[Crop]:
    """Lay out a category: which piece of the photograph each image shows.

    Brick has an up and a down and is only mirrored; grass and gravel are turned as well.

    Args:
        category: One of ``CATEGORIES``.

    Returns:
        One crop per image, always the same ones.
    """
    _check_category(category)
    layout = []
    for folder, count in COUNTS.items():
        split, label = folder.split("/")
        start, stop = (0, SPLIT_COLUMN) if split == "train" else (SPLIT_COLUMN, _SIDE)
        rng = _generator(category, folder)
        for index in range(count):
            top, left = int(rng.integers(_SIDE - SIZE + 1)), int(rng.integers(start, stop - SIZE + 1))
            turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
            layout.append(Crop(split, label, index, top, left, 0 if category == "brick" else turns, mirror))
    return layout


def cut(photograph: np.ndarray, crop: Crop) -> np.ndarray:
    """Cut a crop out of its photograph.

    Args:
        photograph: uint8 ``(512, 512)``.
        crop: What to cut.

    Returns:
        uint8 ``(128, 128, 3)``, grey.
    """
    piece = np.rot90(photograph[crop.top : crop.top + SIZE, crop.left : crop.left + SIZE], crop.quarter_turns)
    piece = piece[:, ::-1] if crop.mirror else piece
    return np.repeat(piece[..., None], 3, axis=-1)


def _write_category(folder: Path, category: str, photograph: np.ndarray) -> None:
    """Write all images and masks, and at last the manifest."""
    for crop in crops(category):
        image = cut(photograph, crop)
        if crop.label != "good":
            image, mask = paint_defect(image, crop.label, crop.index, _generator(category, crop.file))
            _write_png(folder / crop.mask_file, mask.astype(np.uint8) * 255)
        _write_png(folder / crop.file, image)
    (folder / _MANIFEST).write_text(json.dumps(_manifest(category), indent=2) + "\n", encoding="utf-8")


def _write_png(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def _move_into_place(made: Path, folder: Path) -> None:
    """Rename a finished folder, unless another process was faster: a folder with files in it is never replaced."""
    try:
        made.rename(folder)
    except OSError:
        if not _exists(folder):
            raise


def _manifest(category: str) -> dict:
    return {"name": "SampleTextures", "version": VERSION, "category": category, "counts": COUNTS}


def _check_complete(folder: Path) -> None:
    """Raise unless a folder holds this version of the data set, with every file."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = None
    found = Counter(path.parent.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    masks = {name.replace("test/", "ground_truth/"): COUNTS[name] for name in COUNTS if not name.endswith("/good")}
    if manifest != _manifest(folder.name) or dict(found) != {**COUNTS, **masks}:
        msg = (
            f"{folder} exists but is not a complete version {VERSION} of the sample textures; "
            "delete it, so that it is made again, or pass another `root`."
        )
        raise FileExistsError(msg)


def _exists(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _check_category(category: str) -> None:
    if category not in CATEGORIES:
        msg = f"Unknown category {category!r}; the sample textures have {', '.join(CATEGORIES)}."
        raise ValueError(msg)


def _generator(*names: str) -> np.random.Generator:
    """Random generator that depends on the names only: ``hash`` would differ from process to process."""
    return np.random.default_rng([*"/".join(("SampleTextures", *names)).encode()])
