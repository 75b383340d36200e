// The matrix of a head, pixel by pixel: rows of chosen tokens in full, between them pooled squares.

import { paint, pixelRow, ratio } from "./canvas.js";
import { colours, weightColour } from "./colours.js";
import { layers, rowTokens } from "./data.js";
import { extent, plot } from "./matrix_window.js";
import { state } from "./state.js";

/** @typedef {import("./layer.js").Squares} Squares */

/** The pooled squares of the shown head; none where a part of the score is shown. */
const shownSquares = () =>
  state.part === "weight" ? layers[state.layer].pooled(state.head, state.pooling) : null;

/** Squares that stand for many weights: they are hatched. */
export const hatchedSquares = () => {
  const squares = shownSquares();
  return squares && squares.tile > 1 ? squares : null;
};

/** Whether a square ends at the diagonal: no token of the layer sees later keys. */
export const isLower = () => hatchedSquares() !== null && Boolean(layers[state.layer].tiles?.lower);

/** The rows that are there in full and in view, by token, as pixels.
 * @param {number} pixels */
const fullRows = (pixels) => {
  const { x, y, span } = extent;
  const layer = layers[state.layer];
  const inView = rowTokens.filter((token) => token >= y - 1 && token <= y + span);
  return inView.map((token) => {
    const row = layer.rowOf(token);
    const values = layer.row(state.head, row, state.part);
    return { token, values: pixelRow(values, layer.spans[row][0], x, span, pixels, 1) };
  });
};

/** Gives each row of pixels its weights, of one token or of many in hatched squares.
 * @param {Squares} squares @param {number} pixels */
const squareRows = (squares, pixels) => {
  const { x, y, span } = extent;
  const { tile, side } = squares;
  const peak = state.pooling === "mean" ? squares.peak : 1;
  const lower = isLower();
  const hatch = Math.round(7 * ratio());
  let last = -1;
  let line = new Float32Array();
  return (/** @type {number} */ down) => {
    const row = y + (down * span) / pixels;
    if (Math.floor(row / tile) !== last) {
      last = Math.floor(row / tile);
      const values = squares.values.subarray(last * side, (last + 1) * side);
      line = pixelRow(values, 0, x, span, pixels, tile);
    }
    if (tile === 1) return line;
    return line.map((weight, across) => {
      const isLater = lower && Math.floor(x + (across * span) / pixels) > row;
      return isLater || (across + down) % hatch < ratio() ? NaN : weight / peak;
    });
  };
};

/** What gives the parts of scores their colours: the largest of them has the strongest.
 * @param {Float32Array[]} rows */
const scoreColours = (rows) => {
  let largest = 1e-9;
  for (const row of rows) {
    for (const value of row) if (Math.abs(value) > largest) largest = Math.abs(value);
  }
  return (/** @type {number} */ value) =>
    Number.isNaN(value)
      ? colours.hidden
      : colours.signed[Math.round(127.5 + (127.5 * value) / largest)];
};

/** @param {CanvasRenderingContext2D} draw */
export const drawImage = (draw) => {
  const pixels = Math.round(plot.size * ratio());
  const image = draw.createImageData(pixels, pixels);
  const cell = pixels / extent.span;
  const thick = Math.max(cell, 2 * ratio());
  const full = fullRows(pixels);
  const squares = shownSquares();
  const squareRow = squares && squareRows(squares, pixels);
  const nothing = new Float32Array(pixels).fill(NaN);
  const colour =
    state.part === "weight" ? weightColour : scoreColours(full.map(({ values }) => values));
  /** @param {{ token: number }} row */
  const top = ({ token }) => (token - extent.y) * cell;

  let next = 0;
  for (let down = 0; down < pixels; down++) {
    while (next < full.length && top(full[next]) + thick <= down) next++;
    const isFull = next < full.length && top(full[next]) <= down + 0.5;
    const values = isFull ? full[next].values : (squareRow?.(down) ?? nothing);
    values.forEach((value, across) => paint(image, down * pixels + across, colour(value)));
  }
  draw.putImageData(image, Math.round(plot.left * ratio()), Math.round(plot.top * ratio()));
};
