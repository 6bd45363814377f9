# SPDX-License-Identifier: Apache-2.0
"""Superpixels: our SLIC against scikit-image's and OpenCV's, speed and quality, at equally many segments.

    python benchmarks/slic_speed.py --out results/slic_speed.md

OpenCV's is in its `ximgproc` module, which only opencv-contrib-python-headless has; without it the rows are left out.
anomalib depends on opencv-python-headless, so keep the other one apart:

    pip install --no-deps --target contrib opencv-contrib-python-headless
    PYTHONPATH=contrib python benchmarks/slic_speed.py

"Compiled" is `torch.compile`, which needs a C++ compiler and some seconds at the first call.

All weigh position by 10 against CIELAB colour (OpenCV in its 8-bit form), in their default number of rounds: 2 for
ours, 10 for the others. Theirs run with and without enforced connectivity. Quality is measured as in
tests/superpixels/test_slic.py: mean over six photographs of 240 x 240 pixels.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from _timing import Report, interleave, paired_ratio, parse, parser, synchronize
from skimage import data, segmentation

from anomalib_twostage import Slic
from anomalib_twostage.superpixels.color import rgb_to_lab

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.superpixels.test_slic import CROPS, boundary_recall, crop, explained_variation, undersegmentation_error

SIDE = 256
BATCH = 8
Segment = Callable[[np.ndarray, int], np.ndarray]


def main() -> None:
    options = parser(__doc__, rounds=7)
    options.add_argument("--device", default="cpu", help="device of our SLIC; the others know the CPU only")
    arguments = parse(options)
    report = Report(arguments, ("scikit-image", "numpy"), arguments.device)
    if hasattr(cv2, "ximgproc"):
        report.line(f"OpenCV {cv2.__version__} with ximgproc.")
        cv2.setNumThreads(arguments.threads)
    else:
        report.line(f"OpenCV {cv2.__version__} has no ximgproc: left out.")
    report.line(f"Speed on {SIDE} x {SIDE} pixels; a batch of {BATCH} is a loop for the others.")
    report.table("segments, images", "implementation", "segments got", "ms", "its time / ours")
    for size in (8, 16):
        for count in (1, BATCH):
            speed(report, size, count, arguments.rounds, arguments.device)
    report.table("segments, images", "part of ours", "ms", "share")
    for size in (8, 16):
        for count in (1, BATCH):
            parts(report, size, count, arguments.rounds, arguments.device)
    if arguments.quick:
        return
    titles = ("explained variation", "boundary recall", "undersegmentation error")
    report.table("segment size", "implementation", "segments got", *titles)
    for size in (8, 12, 16):
        quality(report, size)


def crops(count: int) -> list[np.ndarray]:
    """Overlapping parts of a photograph, uint8 ``(H, W, 3)``."""
    return [data.astronaut()[:SIDE, 8 * i : SIDE + 8 * i] for i in range(count)]


def tensor(photographs: list[np.ndarray], device: str) -> torch.Tensor:
    return torch.from_numpy(np.stack(photographs)).permute(0, 3, 1, 2).float().div(255).to(device)


def parts(report: Report, size: int, count: int, rounds: int, device: str) -> None:
    """Where the time goes, by leaving out: without rounds the first centres, one assignment and the labels are left."""
    images = tensor(crops(count), device)
    whole, without = Slic(segment_size=size), Slic(segment_size=size, num_iterations=0)
    functions = {"whole": whole, "without": without, "colour": rgb_to_lab}
    calls = {name: lambda function=function: function(images) for name, function in functions.items()}
    times = interleave(calls, rounds, device)
    ms = {name: float(np.median(values)) for name, values in times.items()}
    title = f"{(SIDE // size) ** 2}, {count}"
    shown = {
        "conversion to CIELAB": ms["colour"],
        "cells, first centres, last assignment, labels": ms["without"] - ms["colour"],
        f"{whole.num_iterations} rounds of k-means": ms["whole"] - ms["without"],
    }
    for name, value in shown.items():
        report.row(title, name, value, f"{value / ms['whole']:.0%}")


def speed(report: Report, size: int, count: int, rounds: int, device: str) -> None:
    photographs = crops(count)
    images = tensor(photographs, device)
    slic = Slic(segment_size=size).to(device)
    wanted = int(slic(images)[0].max()) + 1
    compiled = torch.compile(slic, dynamic=False)
    functions: dict[str, Callable[[], object]] = {
        "ours": lambda: slic(images),
        "ours, compiled": lambda: compiled(images),
    }
    got = dict.fromkeys(functions, wanted)
    for name, segment in others().items():
        asked = equal_number(segment, photographs[0], wanted)
        got[name] = number(segment(photographs[0], asked))
        functions[name] = lambda segment=segment, asked=asked: [segment(one, asked) for one in photographs]
    synchronize(device)
    times = interleave(functions, rounds, device)
    for name, values in times.items():
        title = f"{(SIDE // size) ** 2}, {count}"
        report.row(title, name, got[name], float(np.median(values)), paired_ratio(values, times["ours"]))


def quality(report: Report, size: int) -> None:
    def ours(image: np.ndarray, _: int) -> np.ndarray:
        return Slic(segment_size=size)(torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0).float())[0].numpy()

    figures: dict[str, list[list[float]]] = {}
    for crop_name in CROPS:
        image = crop(crop_name)
        truth = segmentation.felzenszwalb(image, scale=200, sigma=0.8, min_size=100)
        wanted = number(ours(image, 0))
        for name, segment in {"ours": ours, **others()}.items():
            asked = equal_number(segment, image, wanted)
            labels = np.unique(segment(image, asked), return_inverse=True)[1].reshape(image.shape[:2])
            measures = [explained_variation(image, labels), boundary_recall(truth, labels)]
            row = [float(number(labels)), *measures, undersegmentation_error(truth, labels)]
            figures.setdefault(name, []).append(row)
    for name, rows in figures.items():
        count, *measures = np.mean(rows, axis=0)
        report.row(size, name, round(count), *(f"{value:.3f}" for value in measures))


def others() -> dict[str, Segment]:
    """What to compare with: from an image, uint8 or in [0, 1], and a number of segments to labels."""

    def skimage_slic(connected: bool) -> Segment:
        return lambda image, asked: segmentation.slic(
            image, n_segments=asked, compactness=10, start_label=0, enforce_connectivity=connected
        )

    implementations = {
        "scikit-image": skimage_slic(connected=False),
        "scikit-image, connected": skimage_slic(connected=True),
    }
    if hasattr(cv2, "ximgproc"):
        implementations["OpenCV"] = opencv_slic(connected=False)
        implementations["OpenCV, connected"] = opencv_slic(connected=True)
    return implementations


def opencv_slic(connected: bool) -> Segment:
    def segment(image: np.ndarray, asked: int) -> np.ndarray:
        image = image if image.dtype == np.uint8 else (image * 255).round().astype(np.uint8)
        side = round(np.sqrt(image.shape[0] * image.shape[1] / asked))
        lab = cv2.cvtColor(image, cv2.COLOR_RGB2Lab)
        superpixels = cv2.ximgproc.createSuperpixelSLIC(lab, cv2.ximgproc.SLIC, region_size=side, ruler=10.0)
        superpixels.iterate(10)  # as many as scikit-image
        if connected:
            superpixels.enforceLabelConnectivity()
        return superpixels.getLabels()

    return segment


def number(labels: np.ndarray) -> int:
    return len(np.unique(labels))


def equal_number(segment: Segment, image: np.ndarray, wanted: int) -> int:
    """What to ask for so that about as many segments are left as wanted."""
    asked = wanted
    best = (abs(number(segment(image, asked)) - wanted), asked)
    for _ in range(6):
        got = number(segment(image, asked))
        best = min(best, (abs(got - wanted), asked))
        if got == wanted:
            break
        asked = max(1, asked + wanted - got)
    return best[1]


if __name__ == "__main__":
    main()
