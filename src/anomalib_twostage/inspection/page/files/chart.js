/* The distribution of scores, good images above and defective ones below, and the threshold to drag. */
"use strict";

const CHART = { width: 800, height: 240, left: 12, right: 788, middle: 112, tall: 96, ticks: 234, bins: 50 };

/* Returns { draw }, which moves the line to a threshold. While it is dragged, onMove gets the score under it. */
function makeChart(svg, images, [low, high], hasTruth, onMove) {
  const { left, right, middle, tall, bins } = CHART;
  const toX = score => left + (score - low) / (high - low) * (right - left);
  const add = (name, attributes, parent = svg) => {
    const element = document.createElementNS(svg.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return parent.appendChild(element);
  };

  // What lies left and right of the threshold is drawn in two colors, by clipping the same bars.
  const sides = {};
  for (const side of ["normal", "anomalous"]) {
    sides[side] = add("rect", { y: 0, height: CHART.height }, add("clipPath", { id: `side-${side}` }));
  }
  const kinds = hasTruth
    ? [["good", image => image.truth === false, 1], ["defective", image => image.truth === true, -1]]
    : [["unknown", () => true, 1]];
  for (const [kind, belongs, up] of kinds) {
    const counts = new Array(bins).fill(0);
    for (const image of images) {
      if (image.score === null || !belongs(image)) continue;
      const bin = Math.floor((image.score - low) / (high - low) * bins);
      counts[Math.min(bins - 1, Math.max(0, bin))]++;
    }
    const most = Math.max(1, ...counts);
    for (const side of ["normal", "anomalous"]) {
      const group = add("g", { class: `bars ${kind} ${side}`, "clip-path": `url(#side-${side})` });
      counts.forEach((count, i) => {
        if (!count) return;
        // A single image among many is still to be seen.
        const length = Math.max(3, count / most * tall);
        const width = (right - left) / bins;
        const bar = add("rect", {
          x: left + i * width + 0.5, width: width - 1, height: length, y: up > 0 ? middle - length : middle + 1,
        }, group);
        add("title", {}, bar).textContent = `${count} ${kind === "unknown" ? "images" : kind}`;
      });
    }
  }
  add("line", { class: "axis", x1: left, x2: right, y1: middle + 0.5, y2: middle + 0.5 });
  for (let i = 0; i <= 10; i++) {
    const score = low + (high - low) * i / 10;
    const text = add("text", { x: toX(score), y: CHART.ticks, "text-anchor": ["start", "middle", "end"][i ? i === 10 ? 2 : 1 : 0] });
    text.textContent = Number(score.toPrecision(3));
  }

  const handle = add("g", {
    class: "handle", tabindex: 0, role: "slider", "aria-label": "image threshold",
    "aria-valuemin": low, "aria-valuemax": high,
  });
  add("line", { y1: 4, y2: 218 }, handle);
  add("circle", { cy: middle, r: 9 }, handle);

  let current = low;
  const move = score => {
    current = Math.min(high, Math.max(low, score));
    onMove(current);
  };
  const scoreAt = event => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * CHART.width;
    return low + (x - left) / (right - left) * (high - low);
  };
  svg.addEventListener("pointerdown", event => {
    svg.setPointerCapture(event.pointerId);
    move(scoreAt(event));
    event.preventDefault();
  });
  svg.addEventListener("pointermove", event => {
    if (svg.hasPointerCapture(event.pointerId)) move(scoreAt(event));
  });
  handle.addEventListener("keydown", event => {
    const step = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10 }[event.key];
    if (!step) return;
    move(current + step * (high - low) / 200);
    event.preventDefault();
  });

  return {
    draw(threshold) {
      current = threshold;
      const x = Math.min(right, Math.max(left, toX(threshold)));
      handle.setAttribute("transform", `translate(${x} 0)`);
      handle.setAttribute("aria-valuenow", threshold);
      sides.normal.setAttribute("x", 0);
      sides.normal.setAttribute("width", x);
      sides.anomalous.setAttribute("x", x);
      sides.anomalous.setAttribute("width", CHART.width - x);
    },
  };
}
