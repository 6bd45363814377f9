/* The page: reads its data, and keeps chart, verdicts, setting and gallery at one threshold. */
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const images = data.images;
const at = id => document.getElementById(id);
const scores = [...new Set(images.map(image => image.score).filter(score => score !== null))].sort((a, b) => a - b);
const hasTruth = images.some(image => image.truth !== null);
const hasMap = images.some(image => image.map);
const hasStages = images.some(image => image.stages);
const state = { image: data.imageThreshold, pixel: data.pixelThreshold };

/* ---- the threshold and its setting ---- */

/* anomalib: a score in single precision is anomalous if it is above 1 - sensitivity. */
const thresholdOf = sensitivity => Math.fround(1 - Math.fround(sensitivity));

/* The shortest sensitivity that parts the scores as this threshold does, off the scores themselves if there is room. */
function sensitivityFor(threshold) {
  const below = scores.filter(score => score <= threshold).length;
  const low = below ? scores[below - 1] : -Infinity;
  const high = below < scores.length ? scores[below] : Infinity;
  const room = Math.min(1e-5, (high - low) / 4);
  const nudge = Math.min(1e-3, (high - low) / 2);
  for (const margin of [room, 0]) {
    for (const aim of [threshold, low + nudge, high - nudge]) {
      if (!Number.isFinite(aim)) continue;
      for (let digits = 1; digits <= 9; digits++) {
        const text = (1 - aim).toFixed(digits);
        const result = thresholdOf(Number(text));
        if (low + margin <= result && result < high - margin && Math.abs(result - threshold) < 2e-3) return trim(text);
      }
    }
  }
  return trim((1 - threshold).toPrecision(9));
}

const trim = text => String(Number(text));
const isAnomalous = (image, threshold) => image.score !== null && image.score > threshold;

function scoreRange() {
  let low = Math.min(0, ...scores.slice(0, 1)), high = Math.max(1, ...scores.slice(-1));
  low = Math.min(low, state.image);
  high = Math.max(high, state.image);
  return [low, high];
}

/* ---- numbers ---- */

function share(part, whole) {
  return whole ? `${part} of ${whole} (${(100 * part / whole).toFixed(1)} %)` : "none";
}

function showNumbers() {
  const counts = { passed: 0, alarm: 0, miss: 0, found: 0, normal: 0, anomalous: 0, nan: 0 };
  for (const image of images) counts[outcome(image)]++;
  at("good-normal").textContent = counts.passed;
  at("good-anomalous").textContent = counts.alarm;
  at("defective-normal").textContent = counts.miss;
  at("defective-anomalous").textContent = counts.found;
  at("alarm-rate").textContent = share(counts.alarm, counts.alarm + counts.passed);
  at("miss-rate").textContent = share(counts.miss, counts.miss + counts.found);
  const anomalous = counts.alarm + counts.found + counts.anomalous;
  at("anomalous-rate").textContent = share(anomalous, images.length - counts.nan);
}

function showSetting() {
  const lines = [`model.post_processor.image_sensitivity = ${sensitivityFor(state.image)}`];
  if (hasMap) lines.push(`model.post_processor.pixel_sensitivity = ${trim((1 - state.pixel).toFixed(3))}`);
  at("setting").textContent = lines.join("\n");
}

const MOST_LINES = 200;

function showChanged() {
  const changed = images.filter(image => image.changed);
  at("changed-count").textContent = changed.length ? `${changed.length} images` : "against the model's own threshold: none";
  const lines = changed.slice(0, MOST_LINES).map(image => {
    const line = make("button", "line", `${image.folder ? `${image.folder}/` : ""}${image.name}`);
    line.type = "button";
    line.prepend(make("b", "", image.anomalous ? "→ anomalous " : "→ normal "));
    line.addEventListener("click", () => large.open(image));
    return line;
  });
  if (changed.length > MOST_LINES) lines.push(make("p", "", `and ${changed.length - MOST_LINES} more`));
  at("changed").replaceChildren(...lines);
}

/* ---- filters ---- */

function passes(image) {
  const error = at("error").value;
  const result = outcome(image);
  return (!at("truth").value || image.truth === (at("truth").value === "defective"))
    && (!at("verdict").value || image.score !== null && image.anomalous === (at("verdict").value === "anomalous"))
    && (!error || result === error || error === "changed" && image.changed
      || error === "wrong" && (result === "alarm" || result === "miss"))
    && (at("folder").value === "" || image.folder === folders[at("folder").selectedIndex - 1])
    && image.name.toLowerCase().includes(at("name").value.toLowerCase());
}

function showGallery() {
  at("shown").textContent = `${gallery.update(passes)} of ${images.length} images`;
}

function filterBy(truth, verdict) {
  at("truth").value = truth;
  at("verdict").value = verdict;
  at("error").value = "";
  showGallery();
  at("tools").scrollIntoView({ behavior: "smooth" });
}

/* ---- all of it ---- */

let waiting = false;

function setThreshold(threshold) {
  state.image = threshold;
  if (waiting) return;
  waiting = true; // dragging moves faster than there is anything to see
  requestAnimationFrame(() => {
    waiting = false;
    show();
  });
}

function show() {
  for (const image of images) {
    image.anomalous = isAnomalous(image, state.image);
    image.changed = image.anomalous !== isAnomalous(image, data.imageThreshold);
  }
  chart.draw(state.image);
  if (document.activeElement !== at("threshold")) at("threshold").value = Number(state.image.toFixed(4));
  showNumbers();
  showSetting();
  showChanged();
  showGallery();
}

/* Contours are drawn by the browser: the filter's mask begins half a shade of grey above the threshold. */
function setPixelThreshold(threshold) {
  state.pixel = threshold;
  const [low, high] = data.mapRange;
  const shade = (threshold - low) / (high - low || 1);
  document.querySelector("#contour feFuncA").setAttribute("intercept", -255 * shade);
  at("pixel-value").textContent = threshold.toFixed(3);
  large.setPixelThreshold(threshold);
  showSetting();
}

const large = makeLarge(at("large"), () => gallery.shown());
const gallery = makeGallery(at("gallery"), images, image => large.open(image));
const chart = makeChart(at("chart"), images, scoreRange(), hasTruth, setThreshold);

document.body.classList.toggle("no-truth", !hasTruth);
document.body.classList.toggle("no-map", !hasMap);
if (!hasTruth) for (const option of document.querySelectorAll(".truth-option")) option.remove();
if (!hasStages) document.querySelector(".stages-option").remove();
const folders = [...new Set(images.map(image => image.folder))].sort();
at("folder").append(...folders.map(folder => make("option", "", folder || "(top)")));
at("folder").parentElement.hidden = folders.length < 2;

const count = truth => images.filter(image => image.truth === truth).length;
at("counts").textContent = `${images.length} images`
  + (hasTruth ? `: ${count(false)} good, ${count(true)} defective${count(null) ? `, ${count(null)} unknown` : ""}` : "");

at("pixel").min = data.mapRange[0];
at("pixel").max = data.mapRange[1];
at("pixel").value = state.pixel;
at("pixel").addEventListener("input", () => setPixelThreshold(Number(at("pixel").value)));
at("threshold").addEventListener("input", () => {
  if (at("threshold").value !== "") setThreshold(Number(at("threshold").value));
});
at("reset").addEventListener("click", () => {
  at("pixel").value = data.pixelThreshold;
  setPixelThreshold(data.pixelThreshold);
  setThreshold(data.imageThreshold);
});
at("copy").addEventListener("click", () => {
  getSelection().selectAllChildren(at("setting"));
  document.execCommand("copy"); // also where the newer clipboard is kept from pages of the file system
});
for (const id of ["truth", "verdict", "error", "folder"]) at(id).addEventListener("change", showGallery);
at("name").addEventListener("input", showGallery);
at("order").addEventListener("change", () => {
  gallery.sort(at("order").value);
  showGallery();
});
at("view").addEventListener("change", () => { at("gallery").dataset.view = at("view").value; });
at("gallery").dataset.view = "both";
for (const truth of ["good", "defective"]) {
  for (const verdict of ["normal", "anomalous"]) {
    at(`${truth}-${verdict}`).addEventListener("click", () => filterBy(truth, verdict));
  }
}

gallery.sort("down");
setPixelThreshold(state.pixel);
show();
