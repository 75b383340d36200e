// What Python wrote into the page: the tokens, the layers, and what silencing heads changed.

import { byId } from "./elements.js";
import { Layer } from "./layer.js";
import { plain } from "./words.js";

/** @typedef {import("./layer.js").LayerFields} LayerFields */
/** @typedef {{ id: number, text: string, special: boolean }} Token */
/** @typedef {{ before: number | null, after: number | null }} Odds null where they are NaN */
/** @typedef {{ rank_before: number, rank_after: number }} Ranks */
/** @typedef {Token & Odds & Ranks} Guess */
/** @typedef {[number, number]} HeadPlace the places of a layer and of a head among those shown */

/**
 * @typedef {object} Ablation
 * @property {[number, number][]} heads
 * @property {number | null} divergence in bits; null where it is not finite
 * @property {Guess[]} before
 * @property {Guess[]} after
 */
/**
 * @typedef {object} PageData
 * @property {string} model
 * @property {string} dtype
 * @property {Token[]} tokens
 * @property {number} prompt how many tokens the text has; the others were decoded
 * @property {Token | null} following
 * @property {boolean} overview
 * @property {Ablation | null} ablation
 * @property {[number, number][]} not_numbers heads whose weights are NaN
 * @property {number[]} states layers of linear attention, which have no weights
 * @property {string[]} statistics the order of each layer's figures
 * @property {LayerFields[]} layers
 */

/** @type {PageData} */
export const data = JSON.parse(byId("data", HTMLScriptElement).textContent);

export const total = data.tokens.length;
export const layers = data.layers.map((fields) => new Layer(fields, total));

/** The tokens whose weights are kept: they can be asked what they attend to. */
export const rowTokens = layers[0].rows;
const kept = new Set(rowTokens);

/** @param {number} token */
export const hasRow = (token) => kept.has(token);

/** @param {number} layer @returns {HeadPlace[]} */
export const headsOf = (layer) => layers[layer].heads.map((_, head) => [layer, head]);

export const everyHead = layers.flatMap((_, layer) => headsOf(layer));

/** A token's text, to be read in a line.
 * @param {number} token */
export const label = (token) => plain(data.tokens[token].text);

/** A head as layer and number: 5.2
 * @param {number} layer @param {number} head */
export const headName = (layer, head) => `${layers[layer].index}.${layers[layer].heads[head]}`;

/** @param {HeadPlace} place as an element's data attribute holds it */
export const placeText = ([layer, head]) => `${layer}.${head}`;

/** @param {HTMLElement} element @returns {HeadPlace} */
export const placeOf = (element) => {
  const [layer, head] = (element.dataset.head ?? "").split(".").map(Number);
  return [layer, head];
};
