# SPDX-License-Identifier: Apache-2.0
"""Pseudo-anomalies: our painters against anomalib's `PerlinAnomalyGenerator`, our Perlin noise against `noise`.

    python benchmarks/painting_speed.py --out results/painting_speed.md

A batch of 8 images of 256 x 256 pixels, every one of them painted. Once with what each paints with by itself (anomalib
with grey noise), once with the same folder of photographs for all.
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _timing import Report, interleave, paired_ratio, parse, parser
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator, generate_perlin_noise
from noise import pnoise2
from PIL import Image
from skimage import data

from anomalib_twostage import PerlinAnomaly, PseudoAnomaly, SuperpixelAnomaly
from anomalib_twostage.pseudo_anomaly import random_perlin_noise
from anomalib_twostage.pseudo_anomaly.textures import builtin_textures

SIDE = 256
BATCH = 8
CELLS = 8


def main() -> None:
    options = parser(__doc__, rounds=7)
    options.add_argument("--device", default="cpu")
    arguments = parse(options)
    report = Report(arguments, ("anomalib", "torchvision", "noise"), arguments.device)
    photograph = data.astronaut()
    crops = np.stack([photograph[4 * i : SIDE + 4 * i, 8 * i : SIDE + 8 * i] for i in range(BATCH)])
    images = torch.from_numpy(crops).permute(0, 3, 1, 2).float().div(255).to(arguments.device)
    report.table("paint", "painter", "ms per batch", "anomalib's time / its")
    with tempfile.TemporaryDirectory() as folder:
        for i, texture in enumerate(builtin_textures()):
            Image.fromarray(texture.permute(1, 2, 0).numpy()).save(Path(folder) / f"{i}.png")
        for title, textures in (("its own", None), ("photographs in a folder", Path(folder))):
            functions = painters(images, textures)
            measure(report, title, functions, "anomalib PerlinAnomalyGenerator", arguments)
    report.table("Perlin noise", "implementation", "ms per batch", "noise.pnoise2's time / its")
    measure(report, f"{CELLS} x {CELLS} cells", noises(arguments.device), "noise.pnoise2", arguments)


def painters(images: torch.Tensor, textures: Path | None) -> dict[str, Callable[[], object]]:
    ours = {
        "PseudoAnomaly": PseudoAnomaly(probability=1.0, texture_dir=textures),
        "PerlinAnomaly": PerlinAnomaly(probability=1.0, texture_dir=textures),
        "SuperpixelAnomaly": SuperpixelAnomaly(probability=1.0, texture_dir=textures),
    }
    theirs = PerlinAnomalyGenerator(anomaly_source_path=textures, probability=1.0)
    functions = {name: lambda painter=painter: painter(images) for name, painter in ours.items()}
    return {**functions, "anomalib PerlinAnomalyGenerator": lambda: theirs(images)}


def noises(device: str) -> dict[str, Callable[[], object]]:
    frequency = torch.full((BATCH, 2), float(CELLS), device=device)
    angle = torch.zeros(BATCH, device=device)
    step = CELLS / SIDE

    def one_by_one() -> list[np.ndarray]:
        return [
            np.array([[pnoise2(x * step, y * step, base=i) for x in range(SIDE)] for y in range(SIDE)])
            for i in range(BATCH)
        ]

    return {
        "ours": lambda: random_perlin_noise(SIDE, SIDE, frequency, angle),
        "anomalib generate_perlin_noise": lambda: [
            generate_perlin_noise(SIDE, SIDE, (CELLS, CELLS), torch.device(device)) for _ in range(BATCH)
        ],
        "noise.pnoise2": one_by_one,
    }


def measure(
    report: Report, title: str, functions: dict[str, Callable[[], object]], reference: str, arguments: object
) -> None:
    times = interleave(functions, arguments.rounds, arguments.device)
    for name, values in times.items():
        report.row(title, name, statistics.median(values), paired_ratio(times[reference], values))


if __name__ == "__main__":
    main()
