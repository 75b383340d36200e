// Buttons, lists and keys that choose what is shown: layer, head, mean, order and filter.

import { drawAcross } from "./across.js";
import { layers } from "./data.js";
import { byId, make } from "./elements.js";
import { drawMatrix } from "./matrix.js";
import { choiceChanged, figuresChanged, on } from "./redraw.js";
import { chooseHead, state } from "./state.js";
import { NAMES, STATISTICS, filter, order } from "./statistics.js";
import { buildThumbnails } from "./thumbnails.js";

/**
 * A row of buttons of which one is chosen, by a click or the arrow keys.
 *
 * @template {string} V
 * @param {string} id
 * @param {string} attribute the data attribute that holds each button's value
 * @param {() => V} get
 * @param {(value: V) => void} set
 */
const radios = (id, attribute, get, set) => {
  /** @type {HTMLButtonElement[]} */
  const buttons = Array.from(byId(id, HTMLElement).querySelectorAll("button"));
  const mark = () =>
    buttons.forEach((button) => {
      const chosen = button.dataset[attribute] === get();
      button.setAttribute("aria-checked", String(chosen));
      button.tabIndex = chosen ? 0 : -1;
    });
  buttons.forEach((button, place) => {
    button.addEventListener("click", () => {
      set(/** @type {V} */ (button.dataset[attribute]));
      mark();
    });
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const next = buttons[(place + step + buttons.length) % buttons.length];
      next.focus();
      next.click();
    });
  });
  mark();
  on("choice", mark);
};

/** @param {string} id @param {[string, string][]} entries values and their texts */
const fill = (id, entries) => {
  const options = entries.map(([value, textContent]) => make("option", { value, textContent }));
  byId(id, HTMLSelectElement).replaceChildren(...options);
};

/** @param {string} id @param {(value: string) => void} set */
const onChange = (id, set) => {
  const list = byId(id, HTMLSelectElement);
  list.addEventListener("change", () => set(list.value));
};

radios(
  "scope",
  "scope",
  () => state.scope,
  (value) => {
    state.scope = value;
    choiceChanged();
  },
);
radios(
  "pooled",
  "pool",
  () => state.pooling,
  (value) => {
    state.pooling = value;
    buildThumbnails();
    drawMatrix();
  },
);
radios(
  "part",
  "part",
  () => state.part,
  (value) => {
    state.part = value;
    drawMatrix();
  },
);
radios(
  "across-rows",
  "rows",
  () => state.across,
  (value) => {
    state.across = value;
    drawAcross();
  },
);

fill(
  "layer",
  layers.map((layer, place) => [String(place), String(layer.index)]),
);
on("choice", () => {
  const { heads } = layers[state.layer];
  fill(
    "head",
    heads.map((head, place) => [String(place), String(head)]),
  );
  byId("layer", HTMLSelectElement).value = String(state.layer);
  byId("head", HTMLSelectElement).value = String(state.head);
});

/** @param {number} layer @param {number} [head] */
const choose = (layer, head) => {
  chooseHead(layer, head);
  choiceChanged();
};
onChange("layer", (value) => choose(Number(value)));
onChange("head", (value) => choose(state.layer, Number(value)));

/** @param {import("./statistics.js").Statistic} name */
const lowered = (name) => STATISTICS[name].label.toLowerCase();

/** @type {[string, string][]} */
const orders = NAMES.map((name) => [name, lowered(name)]);
fill("order", [["layer", "by layer"], ...orders]);
onChange("order", (value) => {
  order.by = /** @type {import("./statistics.js").Order} */ (value);
  order.descending = value !== "layer";
  figuresChanged();
});

/** @type {[string, string][]} */
const filters = NAMES.map((name) => [name, `${lowered(name)} (${STATISTICS[name].unit})`]);
fill("filter-by", filters);
onChange("filter-by", (value) => {
  filter.by = /** @type {import("./statistics.js").Statistic} */ (value);
  figuresChanged();
});
onChange("filter-side", (value) => {
  filter.side = value;
  figuresChanged();
});
const value = byId("filter-value", HTMLInputElement);
value.addEventListener("input", () => {
  filter.value = value.value === "" ? null : Number(value.value);
  figuresChanged();
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target instanceof Element && event.target.matches("input, select, textarea")) return;
  const { layer, head } = state;
  const heads = layers[layer].heads.length;
  if (event.key === "[") choose((layer + layers.length - 1) % layers.length);
  else if (event.key === "]") choose((layer + 1) % layers.length);
  else if (event.key === ",") choose(layer, (head + heads - 1) % heads);
  else if (event.key === ".") choose(layer, (head + 1) % heads);
  else return;
  event.preventDefault();
});
