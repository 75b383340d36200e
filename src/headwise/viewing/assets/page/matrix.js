// The matrix of the shown head: rows attend to columns.

import { fit } from "./canvas.js";
import { headName, layers, rowTokens, total } from "./data.js";
import { byId, say } from "./elements.js";
import { drawImage, hatchedSquares } from "./matrix_image.js";
import { drawLabels } from "./matrix_labels.js";
import { extent, plot } from "./matrix_window.js";
import { on } from "./redraw.js";
import { state } from "./state.js";

export const matrix = byId("matrix", HTMLCanvasElement);

/** What of the tokens is shown in full, in words. */
const fullWords = () => {
  if (rowTokens.length === total) return "";
  const full = `; ${rowTokens.length} rows in full`;
  const squares = hatchedSquares();
  if (squares === null) return full;
  const kind = state.pooling === "mean" ? "mean" : "largest";
  const size = `${squares.tile} by ${squares.tile}`;
  return `${full}, the others in hatched squares of ${size}: the ${kind} weight in each`;
};

export const drawMatrix = () => {
  const { x, span } = extent;
  const width = matrix.clientWidth;
  const named = (width - 90) / span >= 9.5;
  plot.left = named ? Math.min(92, Math.round(width * 0.22)) : 44;
  plot.top = named ? plot.left - 8 : 24;
  plot.size = Math.max(40, Math.min(width - plot.left - 4, 620));
  const draw = fit(matrix, plot.top + plot.size + 4);
  drawImage(draw);
  drawLabels(draw, named);
  const first = Math.ceil(x);
  const last = Math.min(total, Math.floor(x + span)) - 1;
  const columns = span >= total ? `All ${total} tokens` : `Columns ${first} to ${last} of ${total}`;
  say("window", columns + fullWords());
  const kind = state.part === "weight" ? "Weights" : "Scores";
  const head = headName(state.layer, state.head);
  matrix.setAttribute("aria-label", `${kind} of head ${head}, tokens ${first} to ${last}`);
};

on("choice", () => {
  say("matrix-title", `Head ${headName(state.layer, state.head)}`);
  const hasParts = layers[state.layer].latent !== null;
  byId("part", HTMLElement).hidden = !hasParts;
  if (!hasParts) state.part = "weight";
});
on("token", drawMatrix);
