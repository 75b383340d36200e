// What is drawn anew after a change: each part of the page says what it depends on.

import { remember } from "./state.js";
import { dependOnPair } from "./statistics.js";

/**
 * What a part depends on. token: the token and the pair that are pointed at. choice: what was chosen
 * by a click or a key. figures: the order of the heads and which pass. marks: which head is chosen,
 * where the figures stay.
 *
 * @typedef {"token" | "choice" | "figures" | "marks"} Change
 */

/** @type {Record<Change, (() => void)[]>} */
const parts = { token: [], choice: [], figures: [], marks: [] };

/** @param {Change} change @param {() => void} draw */
export const on = (change, draw) => parts[change].push(draw);

/** @param {Change} change */
const run = (change) => parts[change].forEach((draw) => draw());

export const tokenChanged = () => run("token");

export const figuresChanged = () => run("figures");

export const choiceChanged = () => {
  run("choice");
  run("token");
  run(dependOnPair() ? "figures" : "marks");
  remember();
};

/** @type {Set<() => void>} */
let pending = new Set();

/** Draws in the next frame, once.
 * @param {() => void} draw */
export const soon = (draw) => {
  if (pending.size === 0) {
    requestAnimationFrame(() => {
      const now = pending;
      pending = new Set();
      for (const each of now) each();
    });
  }
  pending.add(draw);
};
