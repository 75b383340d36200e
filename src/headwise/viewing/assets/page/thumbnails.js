// All heads as thumbnails: by layer, those that read one kv head together; or in the order of a figure.

import { pen, paint } from "./canvas.js";
import { weightColour } from "./colours.js";
import { everyHead, headName, headsOf, layers, placeOf, placeText, total } from "./data.js";
import { byId, closest, make, say } from "./elements.js";
import { choiceChanged, on } from "./redraw.js";
import { chooseHead, state } from "./state.js";
import { STATISTICS, filter, order, passes, sorted, statistic } from "./statistics.js";
import { figure } from "./words.js";

/** @typedef {import("./data.js").HeadPlace} HeadPlace */

const SIDE = 64;

const grid = byId("grid", HTMLElement);

/** @type {Map<string, HTMLButtonElement>} */
let buttons = new Map();

/** The rows that there are, squeezed to a width; each pixel the largest weight that it covers.
 * @param {HeadPlace} place */
const squeezed = ([layerPlace, head]) => {
  const layer = layers[layerPlace];
  const width = Math.min(SIDE, total);
  const values = new Float32Array(width * layer.rows.length).fill(NaN);
  layer.rows.forEach((_, row) => {
    layer.row(head, row, "weight").forEach((weight, offset) => {
      const column = Math.floor(((layer.spans[row][0] + offset) * width) / total);
      const index = row * width + column;
      if (!(values[index] >= weight)) values[index] = weight;
    });
  });
  return { values, width, height: layer.rows.length, peak: 1 };
};

/** @param {HeadPlace} place */
const content = ([layer, head]) => {
  const squares = layers[layer].pooled(head, state.pooling);
  if (squares === null) return squeezed([layer, head]);
  const peak = state.pooling === "mean" && squares.tile > 1 ? squares.peak : 1;
  return { values: squares.values, width: squares.side, height: squares.side, peak };
};

/** @param {HTMLCanvasElement} canvas */
const drawThumbnail = (canvas) => {
  const { values, width, height, peak } = content(placeOf(canvas));
  canvas.width = width;
  canvas.height = height;
  const draw = pen(canvas);
  const image = draw.createImageData(width, height);
  values.forEach((value, index) => paint(image, index, weightColour(value / peak)));
  draw.putImageData(image, 0, 0);
  canvas.dataset.done = "yes";
};

// thumbnails are drawn when they come into view
const watcher = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting || !(target instanceof HTMLCanvasElement)) continue;
      if (!target.dataset.done) drawThumbnail(target);
    }
  },
  { root: grid, rootMargin: "300px" },
);

/** @param {HeadPlace} place */
export const headWords = ([layerPlace, head]) => {
  const layer = layers[layerPlace];
  const source = layer.latent ? "the shared latent" : `kv head ${layer.kvHeadOf[head]}`;
  const entropy = figure(statistic([layerPlace, head], "entropy"), 1);
  return `Layer ${layer.index}, head ${layer.heads[head]}; reads ${source}; entropy ${entropy} bits`;
};

/** @param {HeadPlace} place @param {string} [caption] */
const makeThumbnail = (place, caption) => {
  const canvas = make("canvas", { width: 8, height: 8 });
  const title = headWords(place);
  const button = make("button", { type: "button", className: "head", title }, canvas);
  button.setAttribute("aria-label", title);
  canvas.dataset.head = button.dataset.head = placeText(place);
  if (caption) button.append(make("span", { className: "caption", textContent: caption }));
  watcher.observe(canvas);
  buttons.set(placeText(place), button);
  return button;
};

/** The heads of a layer, those that read one kv head, or the latent, in one group.
 * @param {number} layerPlace */
const makeRow = (layerPlace) => {
  const layer = layers[layerPlace];
  /** @type {Map<number, HTMLElement>} */
  const groups = new Map();
  for (const [, head] of headsOf(layerPlace)) {
    const kvHead = layer.kvHeadOf[head];
    const title = layer.latent
      ? `Heads that read one latent of ${layer.latent[0]} and a rope key of ${layer.latent[1]}`
      : `Heads that share kv head ${kvHead}`;
    let group = groups.get(kvHead);
    if (!group) {
      group = make("div", { className: layer.latent ? "group latent" : "group", title });
      group.setAttribute("role", "group");
      group.setAttribute("aria-label", title);
      groups.set(kvHead, group);
    }
    group.append(makeThumbnail([layerPlace, head]));
  }
  const name = make("span", { className: "name", textContent: `L${layer.index}` });
  const heads = make("div", { className: "groups" }, ...groups.values());
  return make("div", { className: "row" }, name, heads);
};

/** @param {HeadPlace} place @param {import("./statistics.js").Statistic} name */
const caption = (place, name) => {
  const share = STATISTICS[name].unit === "%";
  const value = figure(statistic(place, name), share ? 0 : 1);
  return `${headName(...place)}  ${value}${share ? "%" : ""}`;
};

export const buildThumbnails = () => {
  const widest = Math.max(...layers.map((layer) => layer.heads.length));
  const spare = grid.clientWidth - 48;
  const lines = Math.ceil((widest * 34) / spare);
  const side = Math.floor(spare / Math.ceil(widest / lines) - 8);
  grid.style.setProperty("--thumb", `${Math.max(26, Math.min(56, side))}px`);
  watcher.disconnect();
  buttons = new Map();
  const name = order.by;
  if (name === "layer") {
    const rows = layers.map((_, layer) => makeRow(layer));
    grid.replaceChildren(...(order.descending ? rows.reverse() : rows));
  } else {
    const chosen = sorted().filter(passes);
    const flat = chosen.map((place) => makeThumbnail(place, caption(place, name)));
    grid.replaceChildren(make("div", { className: "flat" }, ...flat));
  }
  markThumbnails();
};

const markThumbnails = () => {
  const passing = new Set(everyHead.filter(passes).map(placeText));
  for (const [name, button] of buttons) {
    button.classList.toggle("out", !passing.has(name));
    button.setAttribute("aria-pressed", String(name === placeText([state.layer, state.head])));
  }
  const heads = `${everyHead.length} heads`;
  say("filter-count", filter.value === null ? heads : `${passing.size} of ${heads}`);
};

/** Shows a head; of the mean of all heads it goes back to one.
 * @param {HeadPlace} place */
export const pick = ([layer, head]) => {
  chooseHead(layer, head);
  if (state.scope === "all") state.scope = "head";
  choiceChanged();
};

grid.addEventListener("click", (event) => {
  const button = closest(event, ".head");
  if (button) pick(placeOf(button));
});

/** The thumbnail next to one, in the line above or below it.
 * @param {HTMLElement[]} every @param {HTMLElement} button @param {number} step 1 is down */
const nextLine = (every, button, step) => {
  const from = button.getBoundingClientRect();
  const boxes = every.map((other) => ({ other, box: other.getBoundingClientRect() }));
  const distance = (/** @type {DOMRect} */ box) =>
    Math.abs(box.top - from.top) * 100 + Math.abs(box.left - from.left);
  const rest = boxes.filter(({ box }) => step * (box.top - from.top) > 8);
  rest.sort((one, other) => distance(one.box) - distance(other.box));
  return rest[0]?.other;
};

grid.addEventListener("keydown", (event) => {
  const button = closest(event, ".head");
  const across = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const down = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!button || !(across || down)) return;
  /** @type {HTMLElement[]} */
  const every = Array.from(grid.querySelectorAll(".head"));
  const next = across ? every[every.indexOf(button) + across] : nextLine(every, button, down ?? 0);
  if (!next) return;
  event.preventDefault();
  next.focus();
  pick(placeOf(next));
});

on("figures", buildThumbnails);
on("marks", markThumbnails);
