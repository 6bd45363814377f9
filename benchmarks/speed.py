# SPDX-License-Identifier: Apache-2.0
"""Time our parts against their peers, interleaved in one process, on the CPU.

    python benchmarks/speed.py --rounds 7 --threads 2

Prints one row per question: the medians, and the median of the ratios taken round by round, so that a drift of the
machine's speed hits both sides alike.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import anomalib
import numpy as np
import skimage
import torch
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from anomalib.models.image.draem.torch_model import DraemModel
from noise import pnoise2
from skimage import data
from skimage.segmentation import slic as skimage_slic

from anomalib_twostage import PseudoAnomaly, Slic
from anomalib_twostage.pseudo_anomaly import random_perlin_noise
from anomalib_twostage.torch_model import VARIANTS, two_stage_superpixel_model

SIDE = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(
        f"{platform.machine()}, {arguments.threads} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, anomalib {anomalib.__version__}, scikit-image {skimage.__version__}\n",
    )
    print("| question | ours, ms | peer, ms | peer / ours |\n|---|---|---|---|")
    for title, ours, peer in questions():
        report(title, ours, peer, arguments.rounds)


def questions() -> list[tuple[str, Callable[[], object], Callable[[], object]]]:
    photograph = data.astronaut()[:SIDE, :SIDE]
    image = torch.from_numpy(photograph.copy()).permute(2, 0, 1).unsqueeze(0).float() / 255
    batch = image.expand(8, -1, -1, -1).contiguous()
    slic = Slic(segment_size=16)
    painter, generator = PseudoAnomaly(probability=1.0), PerlinAnomalyGenerator(probability=1.0)
    eight = torch.full((1, 2), 8.0)
    rows = [
        (
            "SLIC, one 256 x 256 image, 256 segments, against scikit-image",
            lambda: slic(image),
            lambda: skimage_slic(photograph, n_segments=256, compactness=10),
        ),
        (
            "Perlin noise, 256 x 256, 8 x 8 cells, against noise.pnoise2",
            lambda: random_perlin_noise(SIDE, SIDE, eight, torch.zeros(1)),
            lambda: np.array([[pnoise2(x / 32, y / 32) for x in range(SIDE)] for y in range(SIDE)]),
        ),
        (
            "painting a batch of 8, against anomalib's PerlinAnomalyGenerator",
            lambda: painter(batch),
            lambda: generator(batch),
        ),
    ]
    draem = DraemModel().eval()
    for name in VARIANTS:
        model = two_stage_superpixel_model(name).eval()
        model.start_stage_two()
        rows.append((f"forward, `{name}`, one image, against Draem", inference(model, image), inference(draem, image)))
    return rows


def inference(model: torch.nn.Module, image: torch.Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return model(image)

    return run


def report(title: str, ours: Callable[[], object], peer: Callable[[], object], rounds: int) -> None:
    pairs = []
    for i in range(rounds + 1):
        pair = []
        for function in (ours, peer):
            start = time.perf_counter()
            function()
            pair.append((time.perf_counter() - start) * 1e3)
        if i > 0:  # the first round warms up
            pairs.append(pair)
    own, other = (statistics.median(values) for values in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"| {title} | {own:.1f} | {other:.1f} | {ratio:.1f} |", flush=True)


if __name__ == "__main__":
    main()
