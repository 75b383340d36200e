// Figures of the heads: what they are called, their values, and the heads in their order.

import { data, everyHead, layers } from "./data.js";
import { keyOf, query } from "./state.js";

/** @typedef {import("./data.js").HeadPlace} HeadPlace */
/** @typedef {keyof typeof STATISTICS} Statistic */
/** @typedef {Statistic | "layer"} Order */

export const STATISTICS = {
  entropy: {
    label: "Entropy",
    unit: "bits",
    help: "How spread out the weight is: 2 to this power tokens at the same weight",
  },
  distance: {
    label: "Distance",
    unit: "tokens",
    help: "How far away what it attends to stands, on average",
  },
  first: { label: "First", unit: "%", help: "Share of the weight on the first token" },
  previous: { label: "Previous", unit: "%", help: "Share of the weight on the token before" },
  itself: { label: "Itself", unit: "%", help: "Share of the weight on the token itself" },
  pair: { label: "This pair", unit: "%", help: "Weight of the selected pair of tokens" },
};

export const NAMES = /** @type {Statistic[]} */ (Object.keys(STATISTICS));

/** How the heads are ordered, and which of them pass: those whose figure is on that side of value. */
export const order = { by: /** @type {Order} */ ("layer"), descending: false };
export const filter = {
  by: /** @type {Statistic} */ ("entropy"),
  side: "least",
  value: /** @type {number | null} */ (null),
};

/** A head's figure; shares in percent.
 * @param {HeadPlace} place @param {Statistic} name */
export const statistic = ([layer, head], name) => {
  if (name === "pair") {
    const token = query();
    return 100 * (layers[layer].pair(head, token, keyOf(token))?.weight ?? 0);
  }
  const value = layers[layer].statistics[head][data.statistics.indexOf(name)] ?? 0;
  return STATISTICS[name].unit === "%" ? 100 * value : value;
};

/** @param {HeadPlace} place */
export const passes = (place) => {
  if (filter.value === null) return true;
  const value = statistic(place, filter.by);
  return filter.side === "least" ? value >= filter.value : value <= filter.value;
};

/** All heads in their order.
 * @returns {HeadPlace[]} */
export const sorted = () => {
  const name = order.by;
  if (name === "layer") return order.descending ? [...everyHead].reverse() : everyHead;
  const sign = order.descending ? -1 : 1;
  const values = new Map(everyHead.map((place) => [place, statistic(place, name)]));
  const value = (/** @type {HeadPlace} */ place) => values.get(place) ?? 0;
  return [...everyHead].sort((one, other) => sign * (value(one) - value(other)));
};

/** Whether order or filter change with the pair that is pointed at. */
export const dependOnPair = () =>
  order.by === "pair" || (filter.by === "pair" && filter.value !== null);
