// What one token attends to, line by line: in each layer, or in each head of a layer.

import { fit, font, pixelRow, paint, ratio, shortened } from "./canvas.js";
import { colours, weightColour } from "./colours.js";
import { headName, headsOf, label, layers, total } from "./data.js";
import { byId } from "./elements.js";
import { choiceChanged, on } from "./redraw.js";
import { chooseHead, largest, mean, query, state } from "./state.js";
import { percent } from "./words.js";

/** @typedef {CanvasRenderingContext2D} Pen */
/** @typedef {{ title: string, weights: Float32Array, chosen: boolean }} Line */

const SLANT = -Math.PI / 3.2;

const canvas = byId("across", HTMLCanvasElement);
const plot = { left: 40, top: 0, cellX: 1, cellY: 1 };

/** @param {number} token @returns {Line[]} */
const lines = (token) => {
  if (state.across === "layers") {
    return layers.map(({ index }, layer) => {
      const weights = mean(headsOf(layer), token);
      return { title: `L${index}`, weights, chosen: layer === state.layer };
    });
  }
  return headsOf(state.layer).map((place) => {
    const chosen = place[1] === state.head;
    return { title: headName(...place), weights: mean([place], token), chosen };
  });
};

/** @param {Pen} draw @param {Line} line @param {number} place @param {number} pixels */
const drawLine = (draw, { title, weights, chosen }, place, pixels) => {
  const { left, top, cellY } = plot;
  const image = draw.createImageData(pixels, 1);
  pixelRow(weights, 0, 0, total, pixels, 1).forEach((weight, pixel) => {
    paint(image, pixel, weightColour(weight));
  });
  const y = Math.round((top + place * cellY) * ratio());
  const high = Math.round((cellY - 1) * ratio());
  for (let row = 0; row < high; row++) {
    draw.putImageData(image, Math.round(left * ratio()), y + row);
  }
  draw.font = font(cellY < 11 ? 9 : 11);
  draw.textAlign = "right";
  draw.textBaseline = "middle";
  draw.fillStyle = chosen ? colours.accent : colours.faint;
  if (cellY < 11 && place % 2 !== 0 && !chosen) return;
  draw.fillText(title, left - 6, top + (place + 0.5) * cellY);
};

/** @param {Pen} draw @param {number} token */
const drawNames = (draw, token) => {
  const { left, top, cellX } = plot;
  for (let index = 0; index < total; index++) {
    draw.save();
    draw.translate(left + (index + 0.5) * cellX, top - 6);
    draw.rotate(SLANT);
    draw.textAlign = "left";
    draw.textBaseline = "middle";
    draw.font = font(12, index === token);
    draw.fillStyle = index === token ? colours.accent : colours.text;
    draw.fillText(shortened(draw, label(index), 76), 0, 0);
    draw.restore();
  }
};

/** The token as a line, and the positions of the first and the last one.
 * @param {Pen} draw @param {number} token @param {number} bottom */
const drawPositions = (draw, token, bottom) => {
  const { left, top, cellX } = plot;
  draw.fillStyle = colours.accent;
  const x = left + token * cellX - 0.5;
  draw.fillRect(x, top, Math.max(1, cellX), bottom - top + 5);
  draw.font = font(11);
  draw.fillStyle = colours.faint;
  draw.textBaseline = "top";
  draw.textAlign = "left";
  draw.fillText("token 0", left, bottom + 6);
  draw.textAlign = "right";
  draw.fillText(String(total - 1), left + total * cellX, bottom + 6);
};

export const drawAcross = () => {
  const token = query();
  const shown = lines(token);
  const place =
    state.across === "layers"
      ? "\u201d through the layers"
      : `\u201d in the heads of layer ${layers[state.layer].index}`;
  byId("across-title", HTMLElement).replaceChildren("\u201c", label(token), place);
  // names lean over the right edge
  const named = (canvas.clientWidth - 84) / total >= 15;
  const room = canvas.clientWidth - (named ? 84 : 44);
  plot.cellX = room / total;
  plot.top = named ? 74 : 4;
  plot.cellY = Math.max(9, Math.min(26, Math.floor(360 / shown.length)));
  const { left, top, cellX, cellY } = plot;
  const bottom = top + cellY * shown.length;
  const draw = fit(canvas, bottom + (named ? 4 : 20));
  const pixels = Math.max(1, Math.round(room * ratio()));
  shown.forEach((line, index) => drawLine(draw, line, index, pixels));
  draw.fillStyle = colours.card;
  if (cellX >= 9) {
    for (let index = 1; index < total; index++) {
      draw.fillRect(left + index * cellX - 0.5, top, 1, bottom - top);
    }
  }
  if (named) drawNames(draw, token);
  else drawPositions(draw, token, bottom);
  const words = shown.slice(0, 64).map(({ title, weights }) => {
    const key = largest(weights);
    return `${title}: ${label(key)} ${percent(weights[key] || 0)}`;
  });
  canvas.setAttribute("aria-label", words.join("; "));
};

canvas.addEventListener("click", (event) => {
  const box = canvas.getBoundingClientRect();
  const line = Math.floor((event.clientY - box.top - plot.top) / plot.cellY);
  const key = Math.floor((event.clientX - box.left - plot.left) / plot.cellX);
  const count = state.across === "layers" ? layers.length : layers[state.layer].heads.length;
  if (line < 0 || line >= count) return;
  if (key >= 0 && key < total) state.key = key;
  if (state.across === "layers") chooseHead(line);
  else chooseHead(state.layer, line);
  choiceChanged();
});

on("token", drawAcross);
