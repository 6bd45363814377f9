# SPDX-License-Identifier: Apache-2.0
"""Share of the machine's arithmetic that inference gets out, against a matrix product measured in the same run.

    python benchmarks/roofline.py --out results/roofline.md

Counts the floating-point operations of convolutions and matrix products with `torch.utils.flop_counter` (a multiply-add
is two), and divides by the time of the whole forward. "Networks" are the backbone, if there is one, and both stages,
without what lies between them.
The peak is the best of the rounds of a product of two 2048 x 2048 matrices (8192 on a GPU), in float32.
"""

import logging
import statistics
import warnings
from collections.abc import Callable

import torch
from _models import builtins, ours, photograph
from _timing import Report, interleave, parse, parser
from torch.utils.flop_counter import FlopCounterMode

from anomalib_twostage import TwoStageSuperpixelModel
from anomalib_twostage.model.feature_model import FeatureTemplate
from anomalib_twostage.model.variants import VARIANTS

SIDE = 256


def main() -> None:
    options = parser(__doc__, rounds=5)
    options.add_argument("--device", default="cpu")
    arguments = parse(options)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    report = Report(arguments, ("anomalib",), arguments.device)
    image = photograph(SIDE).to(arguments.device)
    functions: dict[str, Callable[[], object]] = {}
    for name in VARIANTS:
        model = ours(name, SIDE).to(arguments.device)
        functions[f"`{name}`"] = lambda model=model: model(image)
        functions[f"`{name}`, networks"] = networks(model, image)
    draem = builtins(SIDE)["Draem"]().eval().to(arguments.device)
    functions["Draem"] = lambda: draem(image)
    side = 2048 if arguments.device == "cpu" else 8192
    matrices = torch.rand(2, side, side, device=arguments.device)
    functions["peak"] = lambda: matrices[0] @ matrices[1]
    with torch.inference_mode():
        work = {name: operations(function) for name, function in functions.items()}
        times = interleave(functions, arguments.rounds, arguments.device)
    peak = work["peak"] / min(times["peak"]) / 1e6
    report.line(f"One image of {SIDE} x {SIDE} pixels; peak of {side} x {side} matrices: {peak:.0f} GFLOP/s.")
    report.table("model", "GFLOP", "ms", "GFLOP/s", "share of peak")
    for name in (name for name in work if name != "peak"):
        milliseconds = statistics.median(times[name])
        rate = work[name] / milliseconds / 1e6
        report.row(name, work[name] / 1e9, milliseconds, rate, f"{rate / peak:.0%}")


@torch.inference_mode()
def networks(model: TwoStageSuperpixelModel, image: torch.Tensor) -> Callable[[], object]:
    """The networks alone, on what they are given when the model looks at an image."""
    parts: list[torch.nn.Module] = [model.stage_one, model.stage_two]
    if isinstance(model.template, FeatureTemplate):
        parts.append(model.template.backbone)
    calls: list[tuple[torch.nn.Module, tuple[torch.Tensor, ...]]] = []
    watches = [part.register_forward_pre_hook(lambda part, given: calls.append((part, given))) for part in parts]
    model(image)
    for watch in watches:
        watch.remove()
    return lambda: [part(*given) for part, given in calls]


def operations(function: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
