// Colours of the theme, and the scales that weights and scores are drawn in.

import { pen } from "./canvas.js";
import { byId } from "./elements.js";

/** @typedef {number[]} Colour red, green and blue, 0 to 255 */

export const colours = {
  // 256 each: of weights from 0 to 1, and of scores from the most negative to the most positive
  weight: /** @type {Colour[]} */ ([]),
  signed: /** @type {Colour[]} */ ([]),
  css: /** @type {string[]} */ ([]),
  // what can be read on each of them
  on: /** @type {string[]} */ ([]),
  hidden: /** @type {Colour} */ ([]),
  text: "",
  faint: "",
  ink: "",
  accent: "",
  card: "",
};

/** The step of the scale, 0 to 255: it follows the square root of the weight.
 * @param {number} weight */
export const level = (weight) => Math.round(255 * Math.sqrt(Math.min(1, Math.max(0, weight))));

/** @param {number} weight NaN where it is hidden */
export const weightColour = (weight) =>
  Number.isNaN(weight) ? colours.hidden : colours.weight[level(weight)];

/** @param {string} text as #5b3fd6 @returns {Colour} */
const parse = (text) => [1, 3, 5].map((start) => parseInt(text.slice(start, start + 2), 16));

/** @param {Colour} colour */
const luminance = (colour) => {
  const [red, green, blue] = colour.map((value) => {
    const share = value / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
};

/** @param {number} one @param {number} other luminances */
const contrast = (one, other) => (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);

/** 256 colours from the first stop to the last.
 * @param {Colour[]} stops */
const scale = (stops) =>
  Array.from({ length: 256 }, (_, step) => {
    const position = (step / 255) * (stops.length - 1);
    const low = Math.min(Math.floor(position), stops.length - 2);
    const share = position - low;
    return stops[low].map((from, part) => Math.round(from + (stops[low + 1][part] - from) * share));
  });

/** Switches the page to a theme, and takes its colours from the style sheet.
 * @param {string} theme light or dark */
export const setTheme = (theme) => {
  document.documentElement.dataset.theme = theme;
  const style = getComputedStyle(document.documentElement);
  const text = (/** @type {string} */ variable) => style.getPropertyValue(variable);
  const colour = (/** @type {string} */ variable) => parse(text(variable).trim());
  const weight = scale([colour("--low"), colour("--mid"), colour("--high")]);
  const ink = luminance(colour("--ink"));
  // the ink, or else black or white, one of which can always be read
  const readable = (/** @type {number} */ light) => {
    if (contrast(light, ink) > 5) return text("--ink");
    return light > 0.179 ? "#000" : "#fff";
  };
  Object.assign(colours, {
    weight,
    signed: scale([colour("--rope"), colour("--low"), colour("--kv0")]),
    css: weight.map((each) => `rgb(${each.join(" ")})`),
    on: weight.map((each) => readable(luminance(each))),
    hidden: colour("--void"),
    text: text("--soft"),
    faint: text("--faint"),
    ink: text("--ink"),
    accent: text("--accent"),
    card: text("--card"),
  });
  const legend = byId("scale", HTMLCanvasElement);
  const draw = pen(legend);
  for (let x = 0; x < legend.width; x++) {
    draw.fillStyle = colours.css[Math.round((x / (legend.width - 1)) * 255)];
    draw.fillRect(x, 0, 1, legend.height);
  }
};
