# SPDX-License-Identifier: Apache-2.0
"""Growth of time and memory with the side of the image.

    python benchmarks/scaling.py --out results/scaling.md

SLIC and inference of one image and painting of a batch of 8, of 256, 512 and 1024 pixels, each question in a process of
its own, so that its peak of resident memory can be read. Sizes go up, so that each size sets a new peak; what the
process holds after a run at 64 pixels (libraries and weights) is subtracted. Four times the pixels should take four
times of both. Painting draws the size of its shapes, so it is the batch and many rounds that make its figures steady,
and each size paints with the same seed.
"""

import argparse
import json
import logging
import resource
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable

import torch
from _timing import Report, interleave, parse, parser

SIDES = (256, 512, 1024)
QUESTIONS = ("SLIC", "painting", "inference, `default`", "inference, `small`")


def main() -> None:
    options = parser(__doc__, rounds=15)
    options.add_argument("--question", choices=QUESTIONS, help=argparse.SUPPRESS)
    arguments = parse(options)
    if arguments.question is not None:
        print(json.dumps(answer(arguments.question, arguments.rounds)))
        return
    report = Report(arguments)
    report.table("question", "pixels", "ms", "growth per doubling", "peak memory, MiB", "growth per doubling")
    for question in QUESTIONS:
        command = [sys.executable, __file__, "--question", question, "--rounds", str(arguments.rounds)]
        result = subprocess.run(
            [*command, "--threads", str(arguments.threads)], check=True, stdout=subprocess.PIPE, text=True
        )
        before: tuple[float, float] | None = None
        for side, (time, memory) in zip(SIDES, json.loads(result.stdout.splitlines()[-1]), strict=True):
            growth = (time / before[0], memory / before[1] if before[1] else "") if before else ("", "")
            report.row(question, f"{side} x {side}", time, growth[0], memory, growth[1])
            before = (time, memory)


def answer(question: str, rounds: int) -> list[tuple[float, float]]:
    """Median milliseconds and peak of memory in MiB beyond what the process holds, for each side."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    function, image = make(question)
    with torch.inference_mode():
        function(image(64))
        base = peak_mib()
        rows = []
        for side in SIDES:
            images = image(side)
            torch.manual_seed(0)
            times = interleave({question: lambda images=images: function(images)}, rounds)
            rows.append((statistics.median(times[question]), peak_mib() - base))
    return rows


def make(question: str) -> tuple[Callable[[torch.Tensor], object], Callable[[int], torch.Tensor]]:
    """What is asked, and what makes its image."""
    if question == "SLIC":
        from anomalib_twostage import Slic

        return Slic(segment_size=16), noise
    if question == "painting":
        from anomalib_twostage import PseudoAnomaly

        return PseudoAnomaly(probability=1.0), lambda side: noise(side, 8)
    from _models import fill_template

    from anomalib_twostage.model.variants import two_stage_superpixel_model

    model = two_stage_superpixel_model(question.split("`")[1]).eval()
    model.start_stage_two()
    fill_template(model, SIDES[-1])
    torch.nn.init.constant_(model.stage_one.head.bias, 10.0)  # something is selected, so both stages run
    return model, noise


def noise(side: int, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, side, side)


def peak_mib() -> float:
    """Highest resident memory of this process so far; Linux counts in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    main()
