# SPDX-License-Identifier: Apache-2.0
r"""Size and time of the inspection page, and its picture in the documentation.

    python benchmarks/inspection_page.py --out results/inspection_page.md \
        --screenshot results/inspection_page.png

The table is of pages of predictions that are there already: maps of 256 x 256 pixels, and JPEG files of 1024 x 1024 of
photographs and noise. It tells what writing takes and leaves, and what a headless Chromium takes to open the page and,
in the median of many, to move the threshold or to filter, up to the next picture that it draws. For the screenshot the
small variant is trained on the built-in textures and tested with `InspectionPage`, some minutes. Needs chromium and
chromedriver (Debian: apt-get install chromium chromium-driver) and selenium.
"""

import argparse
import logging
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from _timing import Report, parse, parser
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import ImageBatch
from anomalib.engine import Engine
from lightning.pytorch import seed_everything
from PIL import Image
from selenium import webdriver
from skimage import data

from anomalib_twostage import InspectionPage, SampleTextures, TwoStageSuperpixel, write_page

WINDOW = (1400, 1000)
FILES = 100  # that differ; each is in the page many times, under names of its own
BATCH = 16
MAP_SIDE, FILE_SIDE = 256, 1024


def main() -> None:
    options = parser(__doc__, rounds=15)
    options.add_argument("--counts", nargs="*", type=int, default=[200, 2000], help="images of the pages")
    options.add_argument("--screenshot", type=Path, help="file that gets the picture of a page")
    options.add_argument("--steps", type=int, default=800, help="optimiser steps for the screenshot (%(default)s)")
    arguments = parse(options)
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        measure(arguments, browser, Path(folder))
        if arguments.screenshot is not None:
            seed_everything(0)
            shoot(browser, tested_page(Path(folder), arguments.steps), arguments.screenshot)


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A headless browser."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "force-device-scale-factor=1",
    ):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--window-size={WINDOW[0]},{WINDOW[1]}")
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    browser.set_window_rect(width=WINDOW[0], height=WINDOW[1])
    try:
        yield browser
    finally:
        browser.quit()


def measure(arguments: argparse.Namespace, browser: webdriver.Chrome, folder: Path) -> None:
    """Write the table."""
    files = image_files(folder / "files")
    report = Report(arguments, packages=("selenium",))
    report.line(f"Chromium {browser.capabilities['browserVersion']}, without a GPU.")
    report.table(
        "images",
        "to write, s",
        "ms per image",
        "folder, MB",
        "index.html, kB",
        "to open, s",
        "threshold, ms",
        "filter, ms",
    )
    for count in arguments.counts:
        start = time.perf_counter()
        index = write_page(batches(files, count), folder / f"page {count}")
        written = time.perf_counter() - start
        size = sum(path.stat().st_size for path in index.parent.rglob("*") if path.is_file())
        start = time.perf_counter()
        browser.get(index.as_uri())  # until all that is in sight is loaded
        opened = time.perf_counter() - start
        moves = [
            drawn(browser, "state.image = arguments[0]; show()", 0.3 + 0.4 * i / arguments.rounds)
            for i in range(arguments.rounds)
        ]
        filters = [
            drawn(browser, "at('verdict').value = arguments[0]; showGallery()", ("", "anomalous")[i % 2])
            for i in range(arguments.rounds)
        ]
        report.row(
            count,
            written,
            1000 * written / count,
            size / 1e6,
            index.stat().st_size / 1e3,
            opened,
            statistics.median(moves),
            statistics.median(filters),
        )


def image_files(folder: Path) -> list[Path]:
    """JPEG files that are about as hard to compress as those of a camera."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    photographs = [data.astronaut(), data.coffee(), data.rocket(), data.chelsea()]
    paths = []
    for i in range(FILES):
        photograph = Image.fromarray(photographs[i % len(photographs)]).resize((FILE_SIDE, FILE_SIDE))
        noisy = np.asarray(photograph) + generator.normal(0, 6, (FILE_SIDE, FILE_SIDE, 3))
        paths.append(folder / f"{i:04}.jpg")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def batches(files: list[Path], count: int) -> Iterator[ImageBatch]:
    """Predictions as they come from an engine: smooth maps, a tenth of the images defective."""
    for start in range(0, count, BATCH):
        numbers = range(start, min(start + BATCH, count))
        truths = torch.tensor([number % 10 == 0 for number in numbers])
        scores = (torch.randn(len(numbers)) * 0.12 + torch.where(truths, 0.65, 0.3)).clamp(0, 1)
        coarse = torch.rand(len(numbers), 1, 16, 16)
        maps = torch.nn.functional.interpolate(coarse, MAP_SIDE, mode="bicubic").squeeze(1).clamp(0, 1) ** 4
        maps = maps / maps.amax(dim=(1, 2), keepdim=True) * scores.view(-1, 1, 1)
        yield ImageBatch(
            image=torch.zeros(len(numbers), 3, 8, 8),  # the files are shown
            anomaly_map=maps,
            pred_mask=maps > 0.5,
            pred_score=scores,
            pred_label=scores > 0.5,
            gt_label=truths,
            gt_mask=(maps > 0.4) & truths.view(-1, 1, 1),
            image_path=[str(files[number % len(files)]) for number in numbers],
        )


def drawn(browser: webdriver.Chrome, script: str, argument: object) -> float:
    """Milliseconds that a script of the page takes until the browser has drawn what it changed."""
    return browser.execute_async_script(
        "const done = arguments[1], begun = performance.now();"
        f"{script};"
        "requestAnimationFrame(() => setTimeout(() => done(performance.now() - begun)));",
        argument,
    )


def tested_page(folder: Path, steps: int) -> Path:
    """The page of a small model that was trained and tested on gravel."""
    textures = SampleTextures(root=folder / "textures", category="gravel", eval_batch_size=BATCH)
    model = TwoStageSuperpixel(
        "small",
        segment_size=8,
        pre_processor=TwoStageSuperpixel.configure_pre_processor((128, 128)),
        visualizer=False,
    )
    engine = Engine(
        callbacks=[ModelCheckpoint(save_top_k=0), InspectionPage(folder / "tested")],
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    engine.fit(model, datamodule=textures)
    engine.test(model, datamodule=textures)
    return folder / "tested/index.html"


def shoot(browser: webdriver.Chrome, index: Path, picture: Path) -> None:
    """Save what the browser shows of a page, in few colors."""
    browser.get(index.as_uri())
    browser.execute_async_script(
        "const done = arguments[0];"
        "const seen = image => image.checkVisibility() && image.getBoundingClientRect().top < innerHeight;"
        "requestAnimationFrame(() => requestAnimationFrame(() => "
        "Promise.all([...document.images].filter(seen).map(image => image.decode().catch(() => null)))"
        ".then(() => requestAnimationFrame(() => setTimeout(done)))));"
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    browser.save_screenshot(str(picture))
    with Image.open(picture) as file:
        file.convert("RGB").quantize(256).save(picture, optimize=True)


if __name__ == "__main__":
    main()
