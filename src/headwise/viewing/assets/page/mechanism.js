// The mechanism of the shown layer, drawn and said: which query heads read what.

import { layers } from "./data.js";
import { byId, make, makeSvg } from "./elements.js";
import { on } from "./redraw.js";
import { state } from "./state.js";

/** @typedef {import("./layer.js").Layer} Layer */

const HEIGHT = 54;

/** @param {Layer} layer */
const makeDiagram = ({ allHeads, kvHeads, latent }) => {
  const step = Math.max(4, Math.min(13, 190 / allHeads));
  const width = allHeads * step + 8;
  const group = allHeads / kvHeads;
  const viewBox = `0 0 ${width} ${HEIGHT}`;
  const diagram = makeSvg("svg", { width, height: HEIGHT, viewBox, role: "img" });
  diagram.setAttribute("aria-label", "Query heads above, what they read below");
  /** @param {string} colour */
  const fill = (colour) => `var(${colour})`;
  /** @param {number} head */
  const x = (head) => 4 + step * (head + 0.5);
  /** @param {number} kvHead */
  const kvX = (kvHead) => x(kvHead * group + (group - 1) / 2);
  /** @param {number} kvHead */
  const kvColour = (kvHead) => fill(latent || kvHead % 2 === 0 ? "--kv0" : "--kv1");
  for (let head = 0; head < allHeads; head++) {
    const kvHead = Math.floor(head / group);
    const line = { x1: x(head), y1: 9, x2: kvX(kvHead), y2: 41, stroke: kvColour(kvHead) };
    const stroke = { "stroke-width": allHeads > 24 ? 0.8 : 1.3, opacity: 0.7 };
    const radius = Math.min(3.6, step / 2.6);
    diagram.append(
      makeSvg("line", { ...line, ...stroke }),
      makeSvg("circle", { cx: x(head), cy: 8, r: radius, fill: kvColour(kvHead) }),
    );
  }
  if (latent) {
    const wide = Math.max(60, width * 0.6);
    const left = (width - wide) / 2;
    const bar = { y: 38, height: 10, rx: 4 };
    diagram.append(
      makeSvg("rect", { ...bar, x: left, width: wide * 0.76, fill: fill("--kv0") }),
      makeSvg("rect", { ...bar, x: left + wide * 0.79, width: wide * 0.21, fill: fill("--rope") }),
    );
    return diagram;
  }
  const size = Math.max(3.5, Math.min(10, step * Math.min(group, 2) - 2));
  for (let kvHead = 0; kvHead < kvHeads; kvHead++) {
    const box = { x: kvX(kvHead) - size / 2, y: 39, width: size, height: 9, rx: 2 };
    diagram.append(makeSvg("rect", { ...box, fill: kvColour(kvHead) }));
  }
  return diagram;
};

/** @param {Layer} layer */
const words = ({ allHeads, kvHeads, latent }) => {
  const heads = `${allHeads} query heads`;
  if (latent) {
    return `${heads} read one cached latent of ${latent[0]}, with a rope key of ${latent[1]} beside it`;
  }
  if (kvHeads === allHeads) return `${heads}, each with a kv head of its own`;
  if (kvHeads === 1) return `${heads} share one kv head`;
  return `${heads} share ${kvHeads} kv heads, ${allHeads / kvHeads} to each`;
};

const drawMechanism = () => {
  const layer = layers[state.layer];
  byId("diagram", HTMLElement).replaceChildren(makeDiagram(layer));
  const reach = layer.window ? `; it sees the last ${layer.window} tokens` : "";
  const name = make("b", { textContent: layer.mechanism });
  byId("mechanism", HTMLElement).replaceChildren(name, words(layer) + reach);
};

on("choice", drawMechanism);
