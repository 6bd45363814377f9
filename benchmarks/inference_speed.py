# SPDX-License-Identifier: Apache-2.0
"""Inference: each variant against built-in models of anomalib, in torch; against Draem in OpenVINO.

    python benchmarks/inference_speed.py --out results/inference_speed.md
    python benchmarks/inference_speed.py --batch 8 --rounds 1 --peers Draem --out results/inference_speed_8.md
    python benchmarks/inference_speed.py --runtime openvino --rounds 9 --out results/inference_speed_openvino.md

Images of 256 x 256 pixels. "Good" is an image on which nothing is selected, so that stage two does not run on a CPU;
"defective" one on which it does; of the default it runs on both. All weights are random, which changes no time, but for
stage one's last layer: it is set so that a flat image is good and a photograph defective, by a margin that rounding
cannot bridge. The script checks that in the runtime that it times. For OpenVINO ours and Draem are exported alike,
through anomalib, to a fixed size, and OpenVINO chooses its precision unless told otherwise.
"""

import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from _models import builtins, draem_module, flat, our_module, ours, photograph
from _timing import Report, interleave, paired_ratio, parse, parser

from anomalib_twostage.model.variants import VARIANTS

SIDE = 256


def main() -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("--batch", type=int, default=1, help="images at once (default: %(default)s)")
    options.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    options.add_argument("--peers", nargs="+", default=list(builtins(SIDE)), choices=list(builtins(SIDE)))
    options.add_argument("--runtime", choices=("torch", "openvino"), default="torch")
    options.add_argument("--precision", choices=("f32", "bf16"), help="of OpenVINO (default: it chooses)")
    options.add_argument("--device", default="cpu", help="of torch")
    arguments = parse(options)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    packages = ("anomalib", "openvino") if arguments.runtime == "openvino" else ("anomalib",)
    report = Report(arguments, packages, arguments.device)
    report.line(f"{arguments.runtime}, {SIDE} x {SIDE} pixels, batch of {arguments.batch}.")
    good, defective = (image.repeat(arguments.batch, 1, 1, 1) for image in (flat(SIDE), photograph(SIDE)))
    hints = {"INFERENCE_NUM_THREADS": arguments.threads}
    if arguments.precision is not None:
        hints["INFERENCE_PRECISION_HINT"] = arguments.precision
    with tempfile.TemporaryDirectory() as folder:
        if arguments.runtime == "openvino":
            models, precision = in_openvino(arguments.variants, Path(folder), hints, good, defective)
            report.line(f"Precision: {precision}.")
        else:
            models = in_torch(arguments.variants, arguments.peers, arguments.device)
            good, defective = good.to(arguments.device), defective.to(arguments.device)
        functions = {}
        for name, model in models.items():
            if name in arguments.variants:
                functions[f"`{name}`, good"] = lambda model=model: model(good)
                functions[f"`{name}`, defective"] = lambda model=model: model(defective)
            else:
                functions[name] = lambda model=model: model(defective)
        times = interleave(functions, arguments.rounds, arguments.device)
    report.table("model", "ms per image", "Draem's time / its")
    for name, values in times.items():
        report.row(name, statistics.median(values) / arguments.batch, paired_ratio(times["Draem"], values))


def in_torch(variants: list[str], peers: list[str], device: str) -> dict[str, Callable[[torch.Tensor], object]]:
    made = {name: ours(name, SIDE) for name in variants}
    made |= {name: make().eval() for name, make in builtins(SIDE).items() if name in {"Draem", *peers}}
    return {name: inference(model.to(device)) for name, model in made.items()}


def inference(model: torch.nn.Module) -> Callable[[torch.Tensor], object]:
    def run(images: torch.Tensor) -> object:
        with torch.inference_mode():
            return model(images)

    return run


def in_openvino(
    variants: list[str], folder: Path, hints: dict[str, object], good: torch.Tensor, defective: torch.Tensor
) -> tuple[dict[str, Callable[[torch.Tensor], object]], str]:
    """The models as functions, by name, and the precision that they compute in.

    Raises:
        RuntimeError: If one of ours runs stage two on the good image, or does not on the defective one.
    """
    import openvino

    modules = {name: our_module(name, SIDE) for name in variants} | {"Draem": draem_module()}
    models, precision = {}, ""
    for name, module in modules.items():
        path = module.to_openvino(folder / name, input_size=(SIDE, SIDE), onnx_kwargs={"verbose": False})
        graph = openvino.Core().read_model(str(path))
        # What decides whether stage two runs, if anything does, becomes one more output, a single truth value.
        choices = [op.input_value(0) for op in graph.get_ops() if op.get_type_name() == "If"]
        graph.add_outputs(choices)
        compiled = openvino.Core().compile_model(graph, "CPU", hints)
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if name in variants and choices:
            runs = [bool(compiled(images.numpy())[compiled.outputs[-1]]) for images in (good, defective)]
            if runs != [False, True]:
                msg = f"{name}: stage two runs on the good image: {runs[0]}, on the defective one: {runs[1]}."
                raise RuntimeError(msg)
        models[name] = lambda images, compiled=compiled: compiled(images.numpy())
    return models, precision


if __name__ == "__main__":
    main()
