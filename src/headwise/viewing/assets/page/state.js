// What the reader has chosen and points at, and what a token then attends to.

import { data, everyHead, hasRow, headName, headsOf, layers, rowTokens, total } from "./data.js";
import { meanWeights } from "./layer.js";

/** @typedef {import("./data.js").HeadPlace} HeadPlace */
/** @typedef {import("./layer.js").Part} Part */
/** @typedef {import("./layer.js").Pooling} Pooling */
/** @typedef {"head" | "layer" | "all"} Scope */

const SCOPES = ["head", "layer", "all"];

const lastWord = [...rowTokens].reverse().find((token) => {
  const { special, text } = data.tokens[token];
  return !special && text.trim().length > 1;
});

export const state = {
  layer: 0,
  head: 0,
  scope: /** @type {Scope} */ ("head"),
  query: lastWord ?? rowTokens[rowTokens.length - 1],
  key: /** @type {number | null} */ (null),
  // the token and the key that the pointer is over
  over: /** @type {number | null} */ (null),
  overKey: /** @type {number | null} */ (null),
  pooling: /** @type {Pooling} */ ("max"),
  part: /** @type {Part} */ ("weight"),
  across: /** @type {"layers" | "heads"} */ ("layers"),
};

/** What the address says behind its #. */
export const address = new URLSearchParams(location.hash.slice(1));

/** @param {string | null | undefined} text */
const number = (text) => (/^\d+$/.test(text ?? "") ? Number(text) : -1);

const readAddress = () => {
  const token = number(address.get("token"));
  if (hasRow(token)) state.query = token;
  const key = number(address.get("key"));
  if (key >= 0 && key < total) state.key = key;
  const [index, head] = (address.get("head") ?? "").split(".").map(number);
  const layer = layers.findIndex((each) => each.index === index);
  if (layer >= 0 && layers[layer].heads.includes(head)) {
    state.layer = layer;
    state.head = layers[layer].heads.indexOf(head);
  }
  const scope = address.get("scope") ?? "";
  if (SCOPES.includes(scope)) state.scope = /** @type {Scope} */ (scope);
};
readAddress();

export const remember = () => {
  if (location.protocol === "about:") return;
  const key = state.key === null ? "" : `&key=${state.key}`;
  const head = headName(state.layer, state.head);
  const place = `#token=${state.query}&head=${head}&scope=${state.scope}${key}`;
  history.replaceState(null, "", place);
};

/** Chooses the layer at this place, and the head there or the last one that it has.
 * @param {number} layer @param {number} [head] */
export const chooseHead = (layer, head = state.head) => {
  state.layer = layer;
  state.head = Math.min(head, layers[layer].heads.length - 1);
};

/** Chooses a token, and lets go of the pair.
 * @param {number} token */
export const chooseToken = (token) => {
  state.query = token;
  state.key = null;
};

/** @param {number | null} token @param {number | null} [key] */
export const pointAt = (token, key = null) => {
  state.over = token;
  state.overKey = key;
};

/** The token whose weights are shown. */
export const query = () => (state.over !== null && hasRow(state.over) ? state.over : state.query);

/** @type {Map<string, Float32Array>} */
const means = new Map();

/** What a token attends to, [n], in the mean of some heads.
 * @param {HeadPlace[]} heads all of one layer, one of them, or all that there are
 * @param {number} token */
export const mean = (heads, token) => {
  const name = `${heads[0]}:${heads.length}:${token}`;
  const known = means.get(name);
  if (known) return known;
  const weights = meanWeights(
    heads.map(([layer, head]) => [layers[layer], head]),
    token,
    total,
  );
  if (means.size > 200) means.delete([...means.keys()][0]);
  means.set(name, weights);
  return weights;
};

/** What a token attends to in the heads that are looked at.
 * @param {number} token */
export const attention = (token) => {
  if (state.scope === "head") return mean([[state.layer, state.head]], token);
  return mean(state.scope === "layer" ? headsOf(state.layer) : everyHead, token);
};

export const scopeWords = () => {
  if (state.scope === "head") return `in head ${headName(state.layer, state.head)}`;
  if (state.scope === "layer") return `in layer ${layers[state.layer].index}, mean of its heads`;
  return `mean of all ${everyHead.length} heads`;
};

/** The place of the largest number; 0 where there is none.
 * @param {Float32Array} values */
export const largest = (values) =>
  values.reduce((best, value, place) => (value > (values[best] || 0) ? place : best), 0);

/** The key of the pair that is shown with a token.
 * @param {number} token */
export const keyOf = (token) => state.overKey ?? state.key ?? largest(attention(token));
