# SPDX-License-Identifier: Apache-2.0
"""What a closer look costs: inference with zoom beside the reduced and the whole image outright.

    python benchmarks/zoom_speed.py --root path/to/images --category macaroni1 --weights results/zoom \
        --out results/zoom_speed.md
    python benchmarks/zoom_speed.py --root ... --category ... --weights ... --runtime openvino --out ...

The models are those that benchmarks/zoom.py has trained; without zoom an untrained one whose memory is full stands for
one that is missing. Images are test images, good and defective ones apart, of batch 1. "Twice the side" is the same
image enlarged to twice its height and width, with twice the zoom: what a camera with four times the pixels would cost.
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from _models import fill_template
from _timing import Report, interleave, paired_ratio, parse, parser
from torchvision.io import ImageReadMode, read_image
from torchvision.transforms.v2.functional import resize
from zoom import MAGNIFICATION, weights_file

from anomalib_twostage import TwoStageSuperpixel

OUTRIGHT = "outright, not magnified"  # the cheaper way, and the one that was trained


def main() -> None:
    options = parser(__doc__, rounds=1)
    options.add_argument("--root", type=Path, required=True, help="folder of the categories")
    options.add_argument("--category", required=True)
    options.add_argument("--weights", type=Path, required=True, help="where benchmarks/zoom.py keeps them")
    options.add_argument("--zoom", type=int, default=3)
    options.add_argument("--images", type=int, default=8, help="good and defective ones each (default: %(default)s)")
    options.add_argument("--runtime", choices=("torch", "openvino"), default="torch")
    arguments = parse(options)
    report = Report(arguments, ("anomalib", "openvino") if arguments.runtime == "openvino" else ("anomalib",))
    files = {"good": [], "defective": []}
    for kind in sorted((arguments.root / arguments.category / "test").iterdir()):
        files["good" if kind.name == "good" else "defective"] += sorted(kind.iterdir())
    zoom, size = arguments.zoom, read(files["good"][0]).shape[-2:]
    twice = (2 * size[0], 2 * size[1])
    small = tuple(-(-side // zoom) for side in size)
    report.line(f"{arguments.category}, {size[1]} x {size[0]} pixels, {arguments.runtime}.")
    with tempfile.TemporaryDirectory() as folder:
        models = {
            name: (runner(load(arguments, kind, at, by, magnified), at, arguments, Path(folder) / str(number)), at)
            for number, (name, kind, at, by, magnified) in enumerate(
                [
                    (f"reduced to {small[1]} x {small[0]}", "reduced", small, 1, MAGNIFICATION),
                    (f"zoom {zoom}", "zoom", size, zoom, MAGNIFICATION),
                    (OUTRIGHT, "outright", size, 1, 1.0),
                    (f"twice the side, zoom {2 * zoom}", "zoom", twice, 2 * zoom, MAGNIFICATION),
                ]
            )
        }
        report.table("images", "model", "ms per image", "share of outright's time", "times zoom's")
        for kind, paths in files.items():
            times: dict[str, list[float]] = {name: [] for name in models}
            for path in paths[:: max(1, len(paths) // arguments.images)][: arguments.images]:
                functions = {}
                for name, (run, at) in models.items():
                    image = resize(read(path), list(at), antialias=True)
                    functions[name] = lambda run=run, image=image: run(image)
                for name, seconds in interleave(functions, arguments.rounds).items():
                    times[name].append(statistics.median(seconds))
            for name, values in times.items():
                shares = (paired_ratio(values, times[other]) for other in (OUTRIGHT, f"zoom {zoom}"))
                report.row(kind, name, statistics.median(values), *shares)


def read(path: Path) -> torch.Tensor:
    return read_image(str(path), ImageReadMode.RGB).unsqueeze(0).float() / 255


def load(arguments, kind: str, size: tuple[int, int], zoom: int, magnification: float) -> TwoStageSuperpixel:
    """A model of :mod:`zoom`'s with its weights, or untrained."""
    pre_processor = TwoStageSuperpixel.configure_pre_processor(size)
    module = TwoStageSuperpixel(
        zoom=zoom, magnification=magnification, pre_processor=pre_processor, visualizer=False
    ).eval()
    weights = weights_file(arguments.weights, kind, magnification, arguments.category, seed=0)
    if weights.exists() or zoom > 1:  # how much a zoom looks at depends on its training
        module.load_state_dict(torch.load(weights, weights_only=True)["weights"])
        if zoom > 1:
            module.model.zoom = zoom  # the weights bring their own
    else:
        print(f"No {weights}: an untrained model with a full memory stands for it.")
        fill_template(module.model, size[0])
        module.model.start_stage_two()
    return module


def runner(
    module: TwoStageSuperpixel, size: tuple[int, int], arguments, folder: Path
) -> Callable[[torch.Tensor], object]:
    """What judges an image of this size."""
    if arguments.runtime == "openvino":
        import openvino

        path = module.to_openvino(folder, input_size=size, onnx_kwargs={"verbose": False})
        compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_NUM_THREADS": arguments.threads})
        return lambda image: compiled(image.numpy())

    def run(image: torch.Tensor) -> object:
        with torch.inference_mode():
            return module.model(image)

    return run


if __name__ == "__main__":
    main()
