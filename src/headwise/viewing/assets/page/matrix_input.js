// Pointer, wheel and keys on the matrix: they point at a pair, choose it, move and zoom.

import { hasRow, rowTokens, total } from "./data.js";
import { onClick } from "./elements.js";
import { drawMatrix, matrix } from "./matrix.js";
import { extent, plot, show, showAll, zoomBy } from "./matrix_window.js";
import { choiceChanged, soon, tokenChanged } from "./redraw.js";
import { keyOf, pointAt, query, state } from "./state.js";

const CLOSER = 0.6;

/** @param {number} factor @param {number} [across] @param {number} [down] */
const zoom = (factor, across = 0.5, down = 0.5) => {
  zoomBy(factor, across, down);
  soon(drawMatrix);
};

const zoomToPair = () => {
  const token = query();
  const span = Math.min(total, 24);
  show({ span, x: keyOf(token) - span / 2, y: token - span / 2 });
  drawMatrix();
};

const zoomOut = () => {
  showAll();
  drawMatrix();
};

/** The chosen row nearest to a row, no further away than it can be seen.
 * @param {number} row */
const nearRow = (row) => {
  if (hasRow(row)) return row;
  const reach = Math.max(0, (3 * extent.span) / plot.size);
  const distance = (/** @type {number} */ token) => Math.abs(token - row);
  const near = rowTokens.filter((token) => distance(token) <= reach);
  return near.sort((one, other) => distance(one) - distance(other))[0] ?? null;
};

/** Where the pointer is: shares of the side, the column, and the row that it means.
 * @param {MouseEvent} event */
const under = (event) => {
  const box = matrix.getBoundingClientRect();
  const across = (event.clientX - box.left - plot.left) / plot.size;
  const down = (event.clientY - box.top - plot.top) / plot.size;
  const inside = across >= 0 && across < 1 && down >= 0 && down < 1;
  const column = Math.floor(extent.x + across * extent.span);
  const row = inside ? nearRow(Math.floor(extent.y + down * extent.span)) : null;
  return { across, down, inside, column, row };
};

const letGo = () => {
  if (state.over === null) return;
  pointAt(null);
  soon(tokenChanged);
};

/** @type {{ clientX: number, clientY: number, x: number, y: number, moved: boolean } | null} */
let drag = null;

matrix.addEventListener("pointermove", (event) => {
  if (drag) {
    const right = event.clientX - drag.clientX;
    const down = event.clientY - drag.clientY;
    if (Math.abs(right) + Math.abs(down) > 4) drag.moved = true;
    if (!drag.moved || extent.span >= total) return;
    const tokens = extent.span / plot.size;
    show({ x: drag.x - right * tokens, y: drag.y - down * tokens, span: extent.span });
    soon(drawMatrix);
    return;
  }
  if (event.pointerType === "touch") return;
  const { row, column } = under(event);
  if (row === null) letGo();
  else if (state.over !== row || state.overKey !== column) {
    pointAt(row, column);
    soon(tokenChanged);
  }
});

matrix.addEventListener("pointerdown", ({ clientX, clientY }) => {
  drag = { clientX, clientY, x: extent.x, y: extent.y, moved: false };
});

window.addEventListener("pointerup", (event) => {
  const clicked = drag && !drag.moved && event.target === matrix;
  drag = null;
  const { row, column } = under(event);
  if (!clicked || row === null) return;
  state.query = row;
  state.key = Math.min(total - 1, column);
  pointAt(null);
  choiceChanged();
});

matrix.addEventListener("pointerleave", letGo);

matrix.addEventListener(
  "wheel",
  (event) => {
    const { across, down, inside } = under(event);
    if (!inside) return;
    event.preventDefault();
    zoom(Math.exp(Math.max(-1, Math.min(1, event.deltaY / 300))), across, down);
  },
  { passive: false },
);

matrix.addEventListener("keydown", (event) => {
  const step = Math.max(1, extent.span / 8);
  const move = {
    ArrowRight: [step, 0],
    ArrowLeft: [-step, 0],
    ArrowDown: [0, step],
    ArrowUp: [0, -step],
  }[event.key];
  if (event.key === "+" || event.key === "=") zoom(CLOSER);
  else if (event.key === "-") zoom(1 / CLOSER);
  else if (event.key === "0") zoomOut();
  else if (event.key === "Enter") zoomToPair();
  else if (move) {
    show({ x: extent.x + move[0], y: extent.y + move[1], span: extent.span });
    drawMatrix();
  } else return;
  event.preventDefault();
});

onClick("zoom-in", () => zoom(CLOSER));
onClick("zoom-out", () => zoom(1 / CLOSER));
onClick("zoom-row", zoomToPair);
onClick("zoom-reset", zoomOut);
