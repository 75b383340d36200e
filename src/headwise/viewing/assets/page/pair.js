// The pair of a token and a key: what becomes of q.k, and the heads in which its weight is largest.

import { everyHead, headName, label, layers } from "./data.js";
import { byId, make } from "./elements.js";
import { on } from "./redraw.js";
import { attention, keyOf, pointAt, query, scopeWords, state } from "./state.js";
import { headWords, pick } from "./thumbnails.js";
import { figure, percent } from "./words.js";

/** @typedef {import("./data.js").HeadPlace} HeadPlace */
/** @typedef {NonNullable<ReturnType<import("./layer.js").Layer["pair"]>>} Pair */

const MOST = 8;

/** @param {string} title @param {string} note @param {string} value @param {string} [className] */
const entry = (title, note, value, className = "") => {
  const small = note ? [make("small", { textContent: note })] : [];
  return [make("dt", {}, title, ...small), make("dd", { textContent: value, className })];
};

/** @param {number} weight */
const exactly = (weight) =>
  weight >= 1e-5 || weight === 0 ? weight.toFixed(5) : weight.toExponential(1);

/** @param {Pair} pair @param {number} token @param {number} key */
const entries = (pair, token, key) => {
  const { scale, softcap } = layers[state.layer];
  const factor = `\u00d7 ${Number(scale.toPrecision(4))}`;
  const rows = [
    entry("Weight", "", exactly(pair.weight), "big"),
    entry("Raw score", "q \u00b7 k", figure(pair.raw, 3)),
    entry("Scaled score", factor, figure(pair.scaled, 3)),
  ];
  if (softcap !== null) {
    rows.push(entry("Capped score", `at \u00b1${softcap}`, figure(pair.capped, 3)));
  }
  if (pair.added !== null) {
    rows.push(entry("With bias", figure(pair.added, 3), figure(pair.score, 3)));
  }
  rows.push(entry("Log-sum-exp", "of the row", figure(pair.lse, 3)));
  if (state.scope !== "head") {
    rows.push(entry("Mean weight", scopeWords(), (attention(token)[key] || 0).toFixed(5)));
  }
  return rows.flat();
};

/** @param {string} title @param {number} value @param {number} largest @param {string} colour */
const meter = (title, value, largest, colour) => {
  const bar = make("i", {});
  bar.style.setProperty("--w", `${(50 * Math.abs(value)) / largest}%`);
  bar.style.setProperty("--x", value < 0 ? "-100%" : "0");
  bar.style.setProperty("--c", `var(${colour})`);
  const number = make("span", { textContent: figure(value, 3) });
  const name = make("span", { textContent: title });
  return make("div", { className: "meter" }, name, bar, number);
};

/** @param {Pair | null} pair */
const drawParts = (pair) => {
  const parts = byId("pair-parts", HTMLElement);
  const { content, rope } = pair ?? {};
  parts.hidden = content == null || rope == null;
  if (content == null || rope == null) return;
  const largest = Math.max(Math.abs(content), Math.abs(rope), 1e-9);
  parts.replaceChildren(
    "Raw score, by the part of the key",
    meter("content", content, largest, "--kv0"),
    meter("rope", rope, largest, "--rope"),
  );
};

/** @param {number} token @param {number} key */
const drawBest = (token, key) => {
  /** @type {{ place: HeadPlace, weight: number }[]} */
  const best = [];
  for (const place of everyHead) {
    const pair = layers[place[0]].pair(place[1], token, key);
    if (pair) best.push({ place, weight: pair.weight });
  }
  best.sort((one, other) => other.weight - one.weight);
  const items = best.slice(0, MOST).map(({ place, weight }) => {
    const bar = make("i", {});
    bar.style.width = `${(100 * weight) / Math.max(best[0].weight, 1e-9)}%`;
    const name = make("span", { textContent: headName(...place) });
    const share = make("span", { textContent: percent(weight) });
    const title = headWords(place);
    const button = make("button", { type: "button", title }, name, bar, share);
    const [layer, head] = place;
    button.setAttribute("aria-pressed", String(layer === state.layer && head === state.head));
    button.addEventListener("click", () => {
      state.query = token;
      state.key = key;
      pointAt(null);
      pick(place);
    });
    return make("li", {}, button);
  });
  byId("best", HTMLElement).replaceChildren(...items);
};

const drawPair = () => {
  const token = query();
  const key = keyOf(token);
  const pair = layers[state.layer].pair(state.head, token, key);
  const place = `${token} \u2192 ${key}, head ${headName(state.layer, state.head)}`;
  byId("pair-words", HTMLElement).replaceChildren(
    make("b", { textContent: label(token) }),
    " \u2192 ",
    make("strong", { textContent: label(key) }),
    make("br", {}),
    make("small", { textContent: place }),
  );
  const reason = key > token ? "a later token, which is masked" : "masked, or outside the window";
  byId("pair-numbers", HTMLElement).replaceChildren(
    ...(pair ? entries(pair, token, key) : entry("Weight", reason, "\u2014", "big")),
  );
  drawBest(token, key);
  drawParts(pair);
};

on("token", drawPair);
