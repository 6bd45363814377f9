# SPDX-License-Identifier: Apache-2.0
"""The inspection page in a real browser, opened from the file system."""

import io
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.post_processing import PostProcessor
from PIL import Image
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select

from anomalib_twostage import write_page
from anomalib_twostage.inspection.page.rows import PageHead
from anomalib_twostage.inspection.page.writer import PageWriter

from .page_data import predictions

pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)",
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1400,1000 --force-device-scale-factor=1"
)
SCORES = [0.2, 0.9, 0.4, 0.7, 0.55, 0.45, 0.3, 0.8]
TRUTHS = [False, True, True, True, False, False, False, True]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


class Page:
    """A page in the browser."""

    def __init__(self, browser: webdriver.Chrome, folder: Path) -> None:
        self.browser = browser
        browser.get((folder / "index.html").as_uri())
        self.settle()  # cards that were never drawn have no text yet

    def at(self, name: str) -> WebElement:
        return self.browser.find_element(By.ID, name)

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def settle(self) -> None:
        """Wait until the page has drawn what was asked for, and every picture in sight."""
        self.browser.execute_async_script(
            "const done = arguments[0];"
            "requestAnimationFrame(() => requestAnimationFrame(() => Promise.all([...document.images]"
            ".filter(i => i.checkVisibility() && i.getBoundingClientRect().top < innerHeight"
            " && i.getBoundingClientRect().bottom > 0).map(i => i.decode().catch(() => null))).then(() => done())));"
        )

    def names(self) -> list[str]:
        """The images in sight, in their order."""
        return self.browser.execute_script(
            "return [...document.querySelectorAll('.image')].filter(card => card.checkVisibility())"
            ".map(card => card.querySelector('.name').textContent)"
        )

    def choose(self, name: str, option: str) -> list[str]:
        """The images in sight after an option has been chosen."""
        Select(self.at(name)).select_by_visible_text(option)
        self.settle()
        return self.names()

    def drag(self, threshold: float) -> None:
        """Drag the handle of the chart to a threshold between 0 and 1."""
        line = self.all(".handle circle")[0].rect
        left = line["x"] + line["width"] / 2
        now = float(self.all(".handle")[0].get_attribute("aria-valuenow"))
        chart = self.at("chart").rect
        target = left + (threshold - now) * chart["width"] * 776 / 800
        handle = self.all(".handle circle")[0]
        ActionChains(self.browser).click_and_hold(handle).move_by_offset(round(target - left), 0).release().perform()
        self.settle()

    def type_threshold(self, text: str) -> None:
        self.at("threshold").clear()
        self.at("threshold").send_keys(text)
        self.settle()

    def at_thresholds(self, thresholds: list[float]) -> Iterator[tuple[list[str], dict[str, bool]]]:
        """The setting and, by name, whether an image is called anomalous, at many thresholds in one go."""
        script = (
            "return arguments[0].map(threshold => { state.image = threshold; show(); return ["
            "at('setting').textContent.split('\\n'), Object.fromEntries(images.map(i => [i.name, i.anomalous]))] })"
        )
        yield from self.browser.execute_script(script, thresholds)

    def sensitivities(self) -> list[float]:
        """The setting to copy."""
        return read_setting(self.at("setting").text.splitlines())

    def shot(self, selector: str) -> np.ndarray:
        self.settle()
        return np.asarray(Image.open(io.BytesIO(self.all(selector)[0].screenshot_as_png)).convert("RGB")).astype(int)


def read_setting(lines: list[str]) -> list[float]:
    """The sensitivities in lines of Python."""
    names = ["image_sensitivity", "pixel_sensitivity"][: len(lines)]
    found = [re.fullmatch(rf"model\.post_processor\.{n} = (\S+)", line) for n, line in zip(names, lines, strict=True)]
    return [float(match[1]) for match in found]


@pytest.fixture
def opened(browser: webdriver.Chrome, tmp_path: Path) -> Iterator[Callable[..., Page]]:
    """Opens a page of batches; its scripts must not complain."""

    def open_page(*batches: ImageBatch | InferenceBatch, **settings: object) -> Page:
        return Page(browser, write_page(batches, tmp_path / "page", **settings).parent)

    yield open_page
    assert browser.get_log("browser") == []
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(name.startswith(tmp_path.as_uri()) for name in loaded)


def test_images_stand_in_the_order_of_their_scores_and_filters_leave_some(opened: Callable[..., Page]) -> None:
    page = opened(predictions(SCORES, TRUTHS))
    order = sorted(range(8), key=lambda i: -SCORES[i])
    named = [f"{'bad' if truth else 'good'}/{i:03}.png" for i, truth in enumerate(TRUTHS)]
    assert page.names() == [named[i] for i in order]
    assert page.choose("order", "lowest score first") == [named[i] for i in reversed(order)]
    assert page.choose("order", "by name") == sorted(named)
    assert page.choose("truth", "good") == sorted(n for n in named if "good" in n)
    assert page.choose("truth", "all") == sorted(named)
    assert page.choose("verdict", "anomalous") == [n for n in sorted(named) if SCORES[int(n[-7:-4])] > 0.5]
    assert page.choose("error", "misses") == []
    assert page.choose("verdict", "all") == ["bad/002.png"]
    assert page.choose("error", "false alarms") == ["good/004.png"]
    assert page.choose("error", "wrong ones") == ["bad/002.png", "good/004.png"]
    page.choose("error", "all")
    assert page.choose("folder", "bad") == [n for n in sorted(named) if "bad" in n]
    page.at("name").send_keys("003")
    assert page.names() == ["bad/003.png"]
    assert page.at("shown").text == "1 of 8 images"


def test_a_dragged_threshold_moves_everything_at_once(opened: Callable[..., Page]) -> None:
    page = opened(predictions(SCORES, TRUTHS))
    page.drag(0.62)
    threshold = float(page.at("threshold").get_attribute("value"))
    assert threshold == pytest.approx(0.62, abs=0.01)
    counts = {(truth, s > threshold): 0 for truth in (True, False) for s in (0, 1)}
    for score, truth in zip(SCORES, TRUTHS, strict=True):
        counts[truth, score > threshold] += 1
    shown = {
        (truth == "defective", verdict == "anomalous"): int(page.at(f"{truth}-{verdict}").text)
        for truth in ("good", "defective")
        for verdict in ("normal", "anomalous")
    }
    assert shown == counts
    assert page.at("alarm-rate").text == "0 of 4 (0.0 %)"
    assert page.at("miss-rate").text == "1 of 4 (25.0 %)"
    assert page.at("anomalous-rate").text == "3 of 8 (37.5 %)"
    assert page.at("changed").text == "→ normal good/004.png"
    assert page.choose("error", "that change sides") == ["good/004.png"]
    page.at("defective-normal").click()
    page.settle()
    assert page.names() == ["bad/002.png"]
    page.at("reset").click()
    page.settle()
    assert page.at("changed").text == ""
    assert page.sensitivities() == [0.5, 0.5]


def test_the_threshold_moves_by_keys(opened: Callable[..., Page]) -> None:
    page = opened(predictions(SCORES, TRUTHS))
    handle = page.all(".handle")[0]
    page.browser.execute_script("arguments[0].focus()", handle)
    ActionChains(page.browser).send_keys(Keys.ARROW_RIGHT, Keys.PAGE_DOWN).perform()
    page.settle()
    assert float(handle.get_attribute("aria-valuenow")) == pytest.approx(0.5 + 0.005 - 0.05)


@pytest.mark.parametrize(
    "raw",
    [
        torch.linspace(0.05, 1.6, 12),
        torch.tensor([0.5, 0.5, 0.5 + 1e-6, 0.5 + 2e-6, 0.7, 0.7, 0.70001]),
        torch.tensor([-3.0, -2.0, 0.3, 0.4, 7.0, 9.0]),  # clamped to 0 and 1
        1 - torch.tensor([3.0, 2.0, 1.0]) * 2.0**-20,
        torch.tensor([0.25]),
    ],
)
def test_the_setting_gives_these_verdicts_in_predict_and_in_an_export(
    raw: torch.Tensor, opened: Callable[..., Page]
) -> None:
    def predict(**sensitivities: float) -> tuple[ImageBatch, InferenceBatch]:
        post_processor = PostProcessor(**sensitivities)
        for name in ("image_min", "pixel_min"):
            getattr(post_processor, name).fill_(0.0)
        for name in ("image_max", "pixel_max"):
            getattr(post_processor, name).fill_(1.6)
        post_processor._image_threshold.fill_(0.6)
        batch = predictions(raw.tolist(), pred_label=None, pred_mask=None)
        exported = post_processor(InferenceBatch(pred_score=batch.pred_score, anomaly_map=batch.anomaly_map))
        post_processor.on_predict_batch_end(None, None, batch)
        return batch, exported

    batch, _ = predict()
    page = opened(batch)
    scores = batch.pred_score.unique().tolist()
    between = [(low + high) / 2 for low, high in pairwise(scores)]
    thresholds = [*scores, *between, 0.0, 1.0, 0.5001]
    for threshold, (setting, shown) in zip(thresholds, page.at_thresholds(thresholds), strict=True):
        image_sensitivity, pixel_sensitivity = read_setting(setting)
        assert abs(1 - image_sensitivity - threshold) < 2.1e-3
        again, exported = predict(image_sensitivity=image_sensitivity, pixel_sensitivity=pixel_sensitivity)
        verdicts = [shown[Path(path).name] for path in batch.image_path]
        assert verdicts == (batch.pred_score.double() > threshold).tolist(), threshold
        assert verdicts == again.pred_label.tolist(), (threshold, image_sensitivity)
        assert verdicts == exported.pred_label.tolist(), (threshold, image_sensitivity)


def test_a_click_opens_the_large_view_with_regions(opened: Callable[..., Page]) -> None:
    page = opened(predictions(SCORES, TRUTHS))
    page.all(".image")[0].click()
    page.settle()
    assert page.at("large-name").text == "bad/001.png"
    assert page.at("large-facts").text == "score 0.9000 · anomalous · truth: defective"
    assert [row.text for row in page.all("#large-regions tbody tr")] == ["x 1 to 9, y 4 to 12 64 0.900 0.900"]
    stack, (box,) = page.all("#large-stack .stack")[0].rect, page.all("#large-stack .box")
    assert (box.rect["x"] - stack["x"]) / stack["width"] == pytest.approx(1 / 32, abs=0.005)
    assert box.rect["width"] / stack["width"] == pytest.approx(8 / 32, abs=0.005)
    with_all = page.shot("#large-stack")
    for layer in ("heat", "contour", "truth-contour", "box"):
        page.all(f"[data-layer={layer}]")[0].click()
    changed = abs(page.shot("#large-stack") - with_all).max(axis=2) > 40
    assert changed.mean() > 0.5  # the map covers everything
    ActionChains(page.browser).send_keys(Keys.ARROW_RIGHT).perform()
    assert page.at("large-name").text == "bad/007.png"
    ActionChains(page.browser).send_keys(Keys.ESCAPE).perform()
    assert not page.at("large").is_displayed()


def test_the_stages_of_this_packages_model(browser: webdriver.Chrome, tmp_path: Path) -> None:
    writer = PageWriter(tmp_path / "page")
    maps = torch.full((2, 1, 32, 32), 0.25)
    labels = torch.arange(16).view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1).expand(2, -1, -1)
    stages = SimpleNamespace(stage_one_map=maps, labels=labels, refined_image=maps.expand(-1, 3, -1, -1))
    writer.add(predictions([0.7, 0.2]), stages=stages)
    page = Page(browser, writer.finish(PageHead("Stages")).parent)
    strips = page.all(".image .of-stages")
    assert [strip.is_displayed() for strip in strips] == [False, False]
    page.choose("view", "stages")
    assert [strip.is_displayed() for strip in strips] == [True, True]
    assert all(frame.is_displayed() for frame in page.all(".image .of-image"))
    assert not any(frame.is_displayed() for frame in page.all(".image .of-map"))
    strips[1].click()
    page.settle()
    strip = page.all("#large-stages img")[0]
    assert strip.is_displayed()
    assert browser.execute_script("return arguments[0].naturalWidth / arguments[0].naturalHeight", strip) == 3
    assert page.at("large-name").text == "001.png"
    assert browser.get_log("browser") == []


def test_the_setting_is_copied(opened: Callable[..., Page]) -> None:
    page = opened(predictions(SCORES, TRUTHS))
    page.drag(0.75)
    page.at("copy").click()
    page.at("name").send_keys(Keys.CONTROL, "v")
    assert page.at("name").get_attribute("value").split() == page.at("setting").text.split()


def test_images_of_the_same_name_keep_apart(opened: Callable[..., Page]) -> None:
    page = opened(predictions([0.9, 0.2, 0.6], image_path=["a/1.png", "b/1.png", "b/1.png"]))
    assert page.names() == ["a/1.png", "b/1.png", "b/1.png"]
    assert page.choose("folder", "b") == ["b/1.png", "b/1.png"]
    assert [card.text.split("\n")[1] for card in page.all(".image") if card.is_displayed()] == ["0.600", "0.200"]
    page.all(".image")[2].click()
    assert page.at("large-facts").text == "score 0.2000 · normal"
    assert page.at("large-stack").find_element(By.CSS_SELECTOR, "img").get_attribute("src").endswith("00002.jpg")


def test_contours_follow_the_pixel_threshold(opened: Callable[..., Page]) -> None:
    page = opened(predictions([0.6, 0.58], [True, True]))

    def contours() -> np.ndarray:
        """Pixels of the contour's color: much blue and green, and little red."""
        pixels = page.shot(".image .of-image")
        return (pixels[..., 2] > 180) & (pixels[..., 1] > 160) & (pixels[..., 0] < 90)

    drawn = contours()
    rows, columns = np.nonzero(drawn)
    scale = drawn.shape[0] / 32
    # Around the square of 8 x 8 pixels at (0, 4), of which the left side is the image's edge.
    assert 3.3 < rows.min() / scale < 4.2
    assert 11.8 < rows.max() / scale < 12.7
    assert 7.8 < columns.max() / scale < 8.7
    script = "const e = document.getElementById('pixel'); e.value = arguments[0]; e.dispatchEvent(new Event('input'))"
    page.browser.execute_script(script, 0.61)
    assert not contours().any()
    assert page.sensitivities() == [0.5, 0.39]
    page.all(".image")[0].click()
    assert page.all("#large-regions tr.below")
    page.browser.execute_script(script, 0.05)
    ActionChains(page.browser).send_keys(Keys.ESCAPE).perform()
    assert not contours().any()  # everything is inside, and so there is no rim


def test_names_are_shown_as_text_and_run_nothing(opened: Callable[..., Page]) -> None:
    evil = "<script>document.title='run'<!-- .png"
    image = "<img src=x onerror=\"document.title='run'\">.png"
    page = opened(predictions([0.7, 0.6], image_path=[f"a<b>/{evil}", f"c/{image}"]), title="<b>Line</b> 'one'")
    assert page.browser.title == "<b>Line</b> 'one'"
    assert page.names() == [f"a<b>/{evil}", f"c/{image}"]
    page.all(".image")[1].click()
    assert page.at("large-name").text == f"c/{image}"
    assert page.at("large-path").text == f"c/{image}"
    ActionChains(page.browser).send_keys(Keys.ESCAPE).perform()
    page.type_threshold("0.65")
    assert page.at("changed").text == f"→ normal c/{image}"
    assert page.choose("folder", "a<b>") == [f"a<b>/{evil}"]
    assert page.browser.title == "<b>Line</b> 'one'"


def test_without_labels_nothing_asks_for_the_truth(opened: Callable[..., Page]) -> None:
    page = opened(predictions(SCORES))
    assert not page.at("confusion").is_displayed()
    assert not page.at("truth").is_displayed()
    assert [option.get_attribute("value") for option in Select(page.at("error")).options] == ["", "changed"]
    page.drag(0.75)
    assert page.at("anomalous-rate").text == "2 of 8 (25.0 %)"
    assert [card.text.split("\n")[-1] for card in page.all(".image")] == ["anomalous"] * 2 + ["normal"] * 6


@pytest.mark.parametrize(
    ("batch", "alarms", "misses"),
    [
        (predictions([0.7], [True]), "none", "0 of 1 (0.0 %)"),
        (predictions([0.7, 0.2, 0.3], [False] * 3), "1 of 3 (33.3 %)", "none"),
        (predictions([0.7, 0.2, 0.3], [True] * 3), "none", "2 of 3 (66.7 %)"),
        (predictions([0.7, float("nan"), 0.3], [True, True, False]), "0 of 1 (0.0 %)", "0 of 1 (0.0 %)"),
        (predictions([float("nan")], [True]), "none", "none"),
        (
            predictions(
                [0.7, 0.3], [True, False], anomaly_map=torch.full((2, 8, 8), float("nan")), pred_mask=None, gt_mask=None
            ),
            "0 of 1 (0.0 %)",
            "0 of 1 (0.0 %)",
        ),
        (predictions([0.0, 0.0], [False] * 2), "0 of 2 (0.0 %)", "none"),
        (InferenceBatch(pred_score=torch.tensor([0.3, 0.8])), "", ""),
        (InferenceBatch(anomaly_map=torch.rand(2, 1, 8, 8)), "", ""),
    ],
)
def test_an_honest_page_of_odd_sets(
    batch: ImageBatch | InferenceBatch, alarms: str, misses: str, opened: Callable[..., Page]
) -> None:
    page = opened(batch)
    assert (page.at("alarm-rate").text, page.at("miss-rate").text) == (alarms, misses)
    page.drag(0.9)
    assert page.all(".image")[0].is_displayed()
    page.all(".image")[0].click()
    assert page.at("large").is_displayed()
    if getattr(batch, "pred_score", None) is not None and torch.isnan(batch.pred_score[0]):
        assert "NaN" in page.at("large-facts").text
    assert page.at("pixel").is_displayed() == (batch.anomaly_map is not None)


def test_pictures_are_loaded_as_they_are_scrolled_to(opened: Callable[..., Page]) -> None:
    page = opened(predictions([i / 400 for i in range(400)]))
    page.settle()
    loaded = "return [...document.querySelectorAll('.image')].map(c => c.querySelector('img').naturalWidth > 0)"
    before = page.browser.execute_script(loaded)
    assert before[0]
    assert not before[-1]
    assert sum(before) < 200
    page.browser.execute_script("scrollTo(0, document.body.scrollHeight)")
    page.settle()
    assert page.browser.execute_script(loaded)[-1]


def test_regions_that_are_not_finite(opened: Callable[..., Page]) -> None:
    batch = predictions([0.9, 0.8])
    batch.anomaly_map[0, 4:12, :8] = float("inf")
    page = opened(batch)
    page.all(".image")[0].click()
    page.settle()
    assert [row.text for row in page.all("#large-regions tbody tr")] == ["x 0 to 8, y 4 to 12 64 no number no number"]
    assert len(page.all("#large-stack .box")) == 1
    assert page.all(".below") == []
    ActionChains(page.browser).send_keys(Keys.ARROW_RIGHT).perform()
    assert [row.text for row in page.all("#large-regions tbody tr")] == ["x 1 to 9, y 4 to 12 64 0.800 0.800"]
