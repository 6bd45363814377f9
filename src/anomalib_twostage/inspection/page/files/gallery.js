/* The gallery: one card an image, in the order of their scores. Pictures are loaded as they are scrolled to. */
"use strict";

/* Names come from the file system, so they only ever become text. */
function make(name, className, text) {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function picture(folder, key, className) {
  const image = make("img", className);
  image.loading = "lazy";
  image.decoding = "async";
  image.alt = "";
  image.src = `${folder}/${key}.${folder === "maps" || folder === "truths" ? "png" : "jpg"}`;
  return image;
}

/* Pictures on top of each other, in the proportions of the image. */
function stack(image, layers) {
  const frame = make("span", "stack");
  const [width, height] = image.size || [1, 1];
  frame.style.aspectRatio = `${width} / ${height}`;
  frame.append(...layers);
  return frame;
}

function makeCard(image, open) {
  const card = make("button", "image");
  card.type = "button";
  card.title = image.path || image.name;
  const panels = make("span", "panels");
  if (image.picture) {
    const layers = [picture("thumbs", image.key)];
    if (image.map) layers.push(picture("maps", image.key, "contour"));
    const frame = stack(image, layers);
    frame.classList.add("of-image");
    panels.append(frame);
  }
  if (image.map) {
    const frame = stack(image, [picture("maps", image.key, "heat"), picture("maps", image.key, "contour")]);
    frame.classList.add("of-map");
    panels.append(frame);
  }
  if (image.stages) panels.append(picture("stages", image.key, "of-stages"));
  const caption = make("span", "caption");
  caption.append(make("span", "name", image.folder ? `${image.folder}/${image.name}` : image.name));
  caption.append(make("b", "score", image.score === null ? "NaN" : image.score.toFixed(3)));
  caption.append(make("span", "badge"));
  card.append(panels, caption);
  card.addEventListener("click", () => open(image));
  return card;
}

/* What a verdict is called, given the truth. */
function outcome(image) {
  if (image.score === null) return "nan";
  if (image.truth === null) return image.anomalous ? "anomalous" : "normal";
  if (image.truth) return image.anomalous ? "found" : "miss";
  return image.anomalous ? "alarm" : "passed";
}

const WORDS = {
  nan: "no number", anomalous: "anomalous", normal: "normal",
  found: "found", miss: "missed", alarm: "false alarm", passed: "good",
};

function makeGallery(element, images, open) {
  const cards = new Map(images.map(image => [image, makeCard(image, open)]));
  let shown = [];
  return {
    /* Reorder, which is seldom. */
    sort(order) {
      const score = image => image.score === null ? Infinity : image.score;
      const compare = {
        down: (a, b) => score(b) - score(a) || 0,
        up: (a, b) => score(a) - score(b) || 0,
        name: (a, b) => (a.folder + "/" + a.name).localeCompare(b.folder + "/" + b.name, undefined, { numeric: true }),
      }[order];
      images.sort(compare);
      element.append(...images.map(image => cards.get(image)));
    },
    /* Show those that pass, with their verdicts of the moment. */
    update(passes) {
      shown = images.filter(passes);
      const visible = new Set(shown);
      for (const [image, card] of cards) {
        card.hidden = !visible.has(image);
        const result = outcome(image);
        if (card.dataset.outcome === result) continue;
        card.dataset.outcome = result;
        card.querySelector(".badge").textContent = WORDS[result];
      }
      return shown.length;
    },
    /* The images in view of the filters, for stepping through them. */
    shown: () => shown,
  };
}
