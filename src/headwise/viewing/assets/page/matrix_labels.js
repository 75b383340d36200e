// What stands on and around the matrix: lines between cells, weights of squares, names of tokens.

import { font, shortened } from "./canvas.js";
import { colours } from "./colours.js";
import { hasRow, label, total } from "./data.js";
import { hatchedSquares, isLower } from "./matrix_image.js";
import { cellSize, extent, insideX, insideY, plot, toX, toY } from "./matrix_window.js";
import { keyOf, query, state } from "./state.js";
import { percent } from "./words.js";

/** @typedef {CanvasRenderingContext2D} Pen */
/** @typedef {import("./layer.js").Squares} Squares */

const STEPS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000];

/** Lines between single tokens; none across squares, whose weights are not there.
 * @param {Pen} draw @param {boolean} squared */
const drawLines = (draw, squared) => {
  const { x, y, span } = extent;
  draw.strokeStyle = colours.card;
  draw.lineWidth = 1;
  draw.beginPath();
  for (let row = Math.floor(y); row <= y + span; row++) {
    if (squared && !hasRow(row)) continue;
    const above = Math.max(plot.top, toY(row));
    const below = Math.min(plot.top + plot.size, toY(row + 1));
    if (above >= below) continue;
    for (let column = Math.ceil(x); column <= x + span; column++) {
      draw.moveTo(toX(column), above);
      draw.lineTo(toX(column), below);
    }
    for (const edge of [above, below]) {
      draw.moveTo(plot.left, edge);
      draw.lineTo(plot.left + plot.size, edge);
    }
  }
  draw.stroke();
};

/** @param {Pen} draw @param {number} margin around the matrix */
const clip = (draw, margin) => {
  const side = plot.size + 2 * margin;
  draw.beginPath();
  draw.rect(plot.left - margin, plot.top - margin, side, side);
  draw.clip();
};

/** The weight of each square, where there is room.
 * @param {Pen} draw @param {Squares} squares */
const drawSquares = (draw, squares) => {
  const { tile, side, values } = squares;
  const { x, y, span } = extent;
  const wide = tile * cellSize();
  const lower = isLower();
  draw.save();
  clip(draw, 0);
  draw.textAlign = "center";
  draw.textBaseline = "middle";
  draw.font = font(11);
  for (let row = Math.floor(y / tile); row < side && row * tile < y + span; row++) {
    const columns = lower ? row + 1 : side;
    for (
      let column = Math.floor(x / tile);
      column < columns && column * tile < x + span;
      column++
    ) {
      const value = values[row * side + column];
      if (Number.isNaN(value)) continue;
      draw.lineWidth = 1;
      draw.strokeStyle = colours.card;
      draw.strokeRect(toX(column * tile), toY(row * tile), wide, wide);
      if (wide >= 44) drawSquareWeight(draw, squares, row, column, value);
    }
  }
  draw.restore();
};

/** In the middle of what is seen of the square; on the diagonal in its lower half.
 * @param {Pen} draw @param {Squares} squares
 * @param {number} row @param {number} column @param {number} value */
const drawSquareWeight = (draw, { tile }, row, column, value) => {
  /** @param {number} start @param {number} edge @param {number} share */
  const middle = (start, edge, share) => {
    const low = Math.max(start, edge);
    const high = Math.min(start + tile * cellSize(), edge + plot.size);
    return low + share * (high - low);
  };
  const share = isLower() && row === column ? 0.68 : 0.5;
  const left = middle(toX(column * tile), plot.left, 1 - share);
  const top = middle(toY(row * tile), plot.top, share);
  const text = `${state.pooling} ${percent(value)}`;
  draw.lineWidth = 3;
  draw.strokeStyle = colours.card;
  draw.strokeText(text, left, top);
  draw.fillStyle = colours.ink;
  draw.fillText(text, left, top);
};

/** The shown tokens from a first one on.
 * @param {number} first */
const tokensFrom = (first) => {
  const start = Math.max(0, Math.floor(first));
  const stop = Math.min(total, Math.ceil(first + extent.span));
  return Array.from({ length: Math.max(0, stop - start) }, (_, offset) => start + offset);
};

/** @param {Pen} draw @param {number} token @param {number} key of the pair that is shown */
const drawNames = (draw, token, key) => {
  const size = Math.max(9, Math.min(13, cellSize() * 0.62));
  for (const row of tokensFrom(extent.y)) {
    if (!insideY(toY(row + 0.5))) continue;
    draw.font = font(size, row === token);
    const plain = hasRow(row) ? colours.text : colours.faint;
    draw.fillStyle = row === token ? colours.accent : plain;
    draw.textAlign = "right";
    draw.fillText(shortened(draw, label(row), plot.left - 10), plot.left - 6, toY(row + 0.5));
  }
  for (const column of tokensFrom(extent.x)) {
    if (!insideX(toX(column + 0.5))) continue;
    draw.save();
    draw.translate(toX(column + 0.5), plot.top - 6);
    draw.rotate(-Math.PI / 2);
    draw.textAlign = "left";
    draw.font = font(size, column === key);
    draw.fillStyle = column === key ? colours.ink : colours.text;
    draw.fillText(shortened(draw, label(column), plot.top - 10), 0, 0);
    draw.restore();
  }
};

/** Positions of tokens, where there is no room for their names.
 * @param {Pen} draw */
const drawPositions = (draw) => {
  const { x, y, span } = extent;
  draw.font = font(11);
  draw.fillStyle = colours.faint;
  const step = STEPS.find((each) => each * cellSize() > 56) ?? 50000;
  draw.textAlign = "center";
  for (
    let column = Math.ceil(x / step) * step;
    column <= Math.min(total, x + span);
    column += step
  ) {
    const place = toX(column);
    if (place < plot.left + plot.size - 8) draw.fillText(String(column), place, plot.top - 11);
  }
  draw.textAlign = "right";
  for (let row = Math.ceil(y / step) * step; row <= Math.min(total, y + span); row += step) {
    const place = toY(row);
    if (place < plot.top + plot.size - 4) draw.fillText(String(row), plot.left - 6, place + 3);
  }
};

/** A mark at the edge that points right or down.
 * @param {Pen} draw @param {number} x @param {number} y
 * @param {boolean} down @param {string} colour */
const drawMark = (draw, x, y, down, colour) => {
  draw.fillStyle = colour;
  draw.beginPath();
  draw.moveTo(x, y);
  for (const side of [-4, 4]) {
    if (down) draw.lineTo(x + side, y - 7);
    else draw.lineTo(x - 7, y + side);
  }
  draw.fill();
};

/** The pair, outlined; where an outline would cover what it is around, marked at the edges.
 * @param {Pen} draw @param {number} token @param {number} key */
const drawPlace = (draw, token, key) => {
  const cell = cellSize();
  if (cell < 5) {
    const x = toX(key + 0.5);
    const y = toY(token + 0.5);
    if (insideY(y)) drawMark(draw, plot.left, y, false, colours.accent);
    if (insideX(x)) drawMark(draw, x, plot.top, true, colours.ink);
    return;
  }
  draw.save();
  clip(draw, 2);
  draw.lineWidth = 2;
  draw.strokeStyle = colours.accent;
  draw.strokeRect(plot.left + 1, toY(token), plot.size - 2, cell);
  draw.strokeStyle = colours.ink;
  draw.strokeRect(toX(key), toY(token), cell, cell);
  draw.restore();
};

/** @param {Pen} draw @param {boolean} named whether there is room for the tokens' names */
export const drawLabels = (draw, named) => {
  const token = query();
  const key = keyOf(token);
  const squares = hatchedSquares();
  if (cellSize() >= 9) drawLines(draw, squares !== null);
  if (squares && squares.tile * cellSize() >= 12) drawSquares(draw, squares);
  draw.textBaseline = "middle";
  if (named) drawNames(draw, token, key);
  else drawPositions(draw);
  drawPlace(draw, token, key);
};
