// Which part of the matrix is shown, and where on its canvas.

import { total } from "./data.js";

/** In tokens: the first column and row, and how many of each. */
export const extent = { x: 0, y: 0, span: total };

/** In pixels of the page: where the matrix stands on its canvas, and its side. */
export const plot = { left: 0, top: 0, size: 0 };

/** How wide a token is, in pixels of the page. */
export const cellSize = () => plot.size / extent.span;

/** @param {number} column */
export const toX = (column) => plot.left + (column - extent.x) * cellSize();

/** @param {number} row */
export const toY = (row) => plot.top + (row - extent.y) * cellSize();

/** @param {number} x */
export const insideX = (x) => x >= plot.left && x <= plot.left + plot.size;

/** @param {number} y */
export const insideY = (y) => y >= plot.top && y <= plot.top + plot.size;

/** Shows this part, moved and widened to what there is.
 * @param {{ x: number, y: number, span: number }} wanted */
export const show = ({ x, y, span }) => {
  extent.span = Math.min(total, Math.max(Math.min(total, 4), span));
  extent.x = Math.min(total - extent.span, Math.max(0, x));
  extent.y = Math.min(total - extent.span, Math.max(0, y));
};

export const showAll = () => show({ x: 0, y: 0, span: total });

/** Shows more or fewer tokens around a point, whose place is a share of the side.
 * @param {number} factor @param {number} across @param {number} down */
export const zoomBy = (factor, across, down) => {
  const span = Math.min(total, Math.max(Math.min(total, 4), extent.span * factor));
  const less = extent.span - span;
  show({ x: extent.x + across * less, y: extent.y + down * less, span });
};
