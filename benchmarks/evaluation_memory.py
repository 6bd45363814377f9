# SPDX-License-Identifier: Apache-2.0
"""Memory of an evaluation per image of its batch, by the side of the images.

    python benchmarks/evaluation_memory.py --threads 1 --out results/evaluation_memory.md

Validation, test and predict hold a whole batch at once. Each cell takes two processes, a batch of 8 images in one and
of 16 in the other: the difference of their peaks of resident memory is that of 8 images. (A batch of one or two takes
less than making the model did.) Stages are kept, as for the pictures that are drawn by default, and something is
selected in each image, so that both stages run. What anomalib collects over all images, for metrics and thresholds of
pixels, is not in it.
"""

import argparse
import json
import logging
import resource
import subprocess
import sys
import warnings

import torch
from _timing import Report, parse, parser
from anomalib.data import ImageBatch

SIDES = (256, 512, 1024)
VARIANTS = ("default", "small")
BATCHES = (8, 16)


def main() -> None:
    options = parser(__doc__, rounds=1)
    options.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parse(options)
    if arguments.case is not None:
        print(peak_mib(**json.loads(arguments.case)))
        return
    report = Report(arguments)
    report.table("MiB per image", *(f"{side} x {side}" for side in SIDES))
    for variant in VARIANTS:
        report.row(f"`{variant}`", *(per_image(variant, side, arguments.threads) for side in SIDES))


def per_image(variant: str, side: int, threads: int) -> float:
    """MiB that another image in the batch takes."""
    peaks = []
    for batch in BATCHES:
        case = json.dumps({"variant": variant, "side": side, "batch": batch})
        command = [sys.executable, __file__, "--case", case, "--threads", str(threads)]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peaks.append(float(result.stdout.splitlines()[-1]))
    return (peaks[1] - peaks[0]) / (BATCHES[1] - BATCHES[0])


@torch.inference_mode()
def peak_mib(variant: str, side: int, batch: int) -> float:
    """Peak of resident memory of this process after an evaluation of that batch."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from _models import our_module, photograph

    module = our_module(variant, side)
    module.keep_stages = True
    images = photograph(side).repeat(batch, 1, 1, 1)
    for _ in range(2):
        module.validation_step(ImageBatch(image=images))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    main()
