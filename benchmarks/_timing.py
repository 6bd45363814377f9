# SPDX-License-Identifier: Apache-2.0
"""What the speed benchmarks share: interleaved rounds in one process, paired ratios, and a report in Markdown."""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

Functions = Mapping[str, Callable[[], object]]


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=rounds, help="measured rounds (default: %(default)s)")
    options.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    options.add_argument("--quick", action="store_true", help="one round, to see that it runs")
    options.add_argument("--out", type=Path, help="file that gets the report besides the screen")
    return options


def parse(options: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line and set threads and seed accordingly."""
    arguments = options.parse_args()
    if arguments.quick:
        arguments.rounds = 1
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    return arguments


def synchronize(device: str) -> None:
    """Wait until the device has done what it was told."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleave(functions: Functions, rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Time every function once a round, so that a drift of the machine's speed hits all of them alike.

    The first round warms up and is not counted.

    Args:
        functions: What to time, by name.
        rounds: Measured rounds.
        device: Device that the functions compute on.

    Returns:
        Milliseconds of each round, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if i > 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def paired_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the ratios taken round by round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def machine(device: str = "cpu") -> str:
    """What computes."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        models = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return name


class Report:
    """Markdown report that grows on the screen and, if there is one, in a file.

    Args:
        arguments: Of :func:`parse`.
        packages: Distributions whose versions matter besides those of torch and this package.
        device: Device that is measured.
    """

    def __init__(self, arguments: argparse.Namespace, packages: tuple[str, ...] = (), device: str = "cpu") -> None:
        self.file = arguments.out
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text("")
        versions = []
        for name in ("anomalib-twostage", "torch", *packages):
            try:
                versions.append(f"{name} {version(name)}")
            except PackageNotFoundError:
                continue
        self.line(
            f"{machine(device)}, {arguments.threads} threads, {arguments.rounds} rounds; "
            f"Python {platform.python_version()}, {', '.join(versions)}.",
        )

    def line(self, text: str = "") -> None:
        """Write a line of text."""
        print(text, flush=True)
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(text + "\n")

    def table(self, *titles: str) -> None:
        """Begin a table."""
        self.line()
        self.row(*titles)
        self.row(*("---" for _ in titles))

    def row(self, *cells: object) -> None:
        """Write a row of a table; floating-point numbers get three significant digits."""
        self.line("| " + " | ".join(_digits(cell) if isinstance(cell, float) else str(cell) for cell in cells) + " |")


def _digits(number: float) -> str:
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:#.3g}"
