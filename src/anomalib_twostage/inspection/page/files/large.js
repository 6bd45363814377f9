/* The large view of one image: layers to switch, regions, stages. */
"use strict";

function makeLarge(dialog, neighbors) {
  const part = id => dialog.querySelector(`#large-${id}`);
  let current = null, pixelThreshold = 0;

  const boxed = (image, region) => {
    const [left, top, right, bottom] = region;
    const box = make("span", "box");
    box.style.cssText = `left:${100 * left}%;top:${100 * top}%;width:${100 * (right - left)}%;height:${100 * (bottom - top)}%`;
    return box;
  };

  // Shares of the map's side come rounded, so what is a whole pixel but for that is meant to be one.
  const pixels = (from, to, side) => `${Math.floor(from * side + 0.02)} to ${Math.ceil(to * side - 0.02)}`;

  // Infinite ones come without a value.
  const score = value => value === null ? "no number" : value.toFixed(3);

  function fillRegions(image) {
    const body = part("regions").tBodies[0];
    const boxes = [];
    body.replaceChildren();
    const [width, height] = image.size || [1, 1];
    for (const region of image.regions) {
      const [left, top, right, bottom, area, mean, peak] = region;
      const row = body.insertRow();
      const box = boxed(image, region);
      const cells = [
        `x ${pixels(left, right, width)}, y ${pixels(top, bottom, height)}`,
        String(area), score(mean), score(peak),
      ];
      for (const text of cells) row.insertCell().textContent = text;
      // A region that the pixel threshold has left behind.
      const isBelow = peak !== null && peak <= pixelThreshold;
      row.classList.toggle("below", isBelow);
      box.classList.toggle("below", isBelow);
      row.addEventListener("mouseenter", () => box.classList.add("pointed"));
      row.addEventListener("mouseleave", () => box.classList.remove("pointed"));
      boxes.push(box);
    }
    const more = image.numRegions - image.regions.length;
    part("regions-note").textContent = !image.map ? "need an anomaly map"
      : image.numRegions === 0 ? "none at the model's pixel threshold"
      : `at the model's pixel threshold${more > 0 ? `; ${more} more are not listed` : ""}`;
    return boxes;
  }

  function fill(image) {
    current = image;
    part("name").textContent = image.folder ? `${image.folder}/${image.name}` : image.name;
    const truth = image.truth === null ? "" : ` · truth: ${image.truth ? "defective" : "good"}`;
    const verdict = image.score === null ? "no number" : image.anomalous ? "anomalous" : "normal";
    part("facts").textContent = `score ${image.score === null ? "NaN" : image.score.toFixed(4)} · ${verdict}${truth}`;
    part("facts").dataset.outcome = outcome(image);
    part("path").textContent = image.path;
    const layers = [];
    if (image.picture) layers.push(picture("images", image.key, "of-image"));
    if (image.map) layers.push(picture("maps", image.key, image.picture ? "heat" : "heat only"));
    if (image.map) layers.push(picture("maps", image.key, "contour"));
    if (image.truthMask) layers.push(picture("truths", image.key, "truth-contour"));
    const frame = stack(image, [...layers, ...fillRegions(image)]);
    part("stack").replaceChildren(frame);
    part("stages").hidden = !image.stages;
    if (image.stages) part("stages").querySelector("img").src = `stages/${image.key}.jpg`;
    switchLayers();
  }

  function switchLayers() {
    for (const box of part("layers").querySelectorAll("input")) {
      part("stack").classList.toggle(`without-${box.dataset.layer}`, !box.checked);
    }
  }

  function step(by) {
    const images = neighbors();
    const next = images[images.indexOf(current) + by];
    if (next) fill(next);
  }

  part("layers").addEventListener("change", switchLayers);
  dialog.querySelector("#previous").addEventListener("click", () => step(-1));
  dialog.querySelector("#next").addEventListener("click", () => step(1));
  dialog.addEventListener("keydown", event => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  dialog.addEventListener("click", event => {
    if (event.target === dialog) dialog.close(); // beside it
  });
  return {
    open(image) {
      fill(image);
      dialog.showModal();
    },
    setPixelThreshold(threshold) {
      pixelThreshold = threshold;
    },
  };
}
