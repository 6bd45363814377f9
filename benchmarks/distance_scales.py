# SPDX-License-Identifier: Apache-2.0
"""The memory's distance alone, untrained: of images as they are and enlarged, of three levels and of their means too.

    python benchmarks/distance_scales.py --root path/to/MVTecAD --categories bottle grid screw > table.md

Each category is a folder as in MVTec AD. Enlarged images have a memory of their own, of good images enlarged alike.
"""

import argparse
import copy
from collections import defaultdict
from pathlib import Path

import torch
from _curves import BinnedCurves
from _timing import machine
from torch.nn import functional
from tqdm import tqdm
from zoom import folder

from anomalib_twostage.model.feature_model import FeatureTemplate
from anomalib_twostage.model.variants import two_stage_superpixel_model

SHOWN = ("pixel AP", "image AUROC")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--root", type=Path, required=True, help="folder of the categories")
    options.add_argument("--categories", nargs="+", required=True)
    options.add_argument("--scales", nargs="+", type=float, default=[1.5], help="beside 1")
    options.add_argument("--patches", type=int, default=2048, help="of each memory (default: %(default)s)")
    options.add_argument("--threads", type=int, default=2)
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    columns = [
        measured(arguments.root / category, arguments.scales, arguments.patches) for category in arguments.categories
    ]
    print(f"| pixel AP / image AUROC | {' | '.join(arguments.categories)} |")
    print("|---" * (1 + len(columns)) + "|")
    for name in columns[0]:
        print(f"| {name} | {' | '.join(' / '.join(f'{each[name][key]:.3f}' for key in SHOWN) for each in columns)} |")
    print(f"\n{machine('cpu')}, {arguments.threads} threads, float32; {arguments.patches} patches in each memory.")


@torch.no_grad()
def measured(root: Path, scales: list[float], patches: int) -> dict[str, dict[str, float]]:
    """Metrics of a category by what its distance is of."""
    data = folder(root)
    data.setup()
    model = two_stage_superpixel_model().eval()
    templates = {scale: FeatureTemplate(model.template.backbone, place=False, size=patches) for scale in (1.0, *scales)}
    for scale, template in templates.items():
        good = (enlarged(item.image.unsqueeze(0), scale)[0] for item in data.train_data)
        template.fit((image, number) for number, image in enumerate(tqdm(good, f"{root.name}, {scale:g} times")))
    narrow = {scale: without_means(template) for scale, template in templates.items()}
    curves: dict[str, BinnedCurves] = defaultdict(BinnedCurves)
    for batch in tqdm(data.test_dataloader(), root.name):
        size = batch.image.shape[-2:]
        for kind, asked in (("three levels", narrow), ("and means", templates)):
            distances = {
                scale: resized(own(enlarged(batch.image, scale)).distance, size) for scale, own in asked.items()
            }
            maps = {f"as they are, {kind}": distances[1.0]}
            for scale in scales:
                maps[f"{scale:g} times, {kind}"] = distances[scale]
                maps[f"mean of both, {scale:g} times, {kind}"] = (distances[1.0] + distances[scale]) / 2
            for name, values in maps.items():
                smooth = model.smooth(values)
                curves[name].add(smooth.squeeze(1), batch.gt_mask, model.score(smooth))
    return {name: curve.compute() for name, curve in curves.items()}


def without_means(template: FeatureTemplate) -> FeatureTemplate:
    """The same without the memories of means over 2 x 2 places."""
    narrow = copy.deepcopy(template)
    del narrow.statistics[3:], narrow.memories[3:]
    return narrow


def enlarged(images: torch.Tensor, scale: float) -> torch.Tensor:
    """Images ``(B, C, H, W)`` so many times larger."""
    height, width = (round(scale * side) for side in images.shape[-2:])
    return resized(images.as_subclass(torch.Tensor), (height, width))


def resized(values: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    return functional.interpolate(values, size, mode="bilinear", align_corners=False)


if __name__ == "__main__":
    main()
