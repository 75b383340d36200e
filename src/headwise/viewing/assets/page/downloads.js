// The matrix as a picture, and what the shown token attends to as numbers, to be kept.

import { pen, font, ratio } from "./canvas.js";
import { colours } from "./colours.js";
import { data, headName } from "./data.js";
import { make, makeSvg, onClick } from "./elements.js";
import { matrix } from "./matrix.js";
import { attention, query, scopeWords, state } from "./state.js";
import { plain } from "./words.js";

/** @param {string} ending @param {Blob} blob */
const download = (ending, blob) => {
  const name = state.scope === "all" ? "all" : headName(state.layer, state.head);
  const href = URL.createObjectURL(blob);
  make("a", { href, download: `attention-${name}.${ending}` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 1000);
};

const title = () => `${plain(data.model)}, head ${headName(state.layer, state.head)}`;

/** The matrix as it is shown, under its title: what both forms of the picture hold. */
const picture = () => {
  const pad = 24 * ratio();
  const width = matrix.width + 2 * pad;
  const height = matrix.height + 2 * pad + 30 * ratio();
  const canvas = make("canvas", { width, height });
  const draw = pen(canvas);
  draw.fillStyle = colours.card;
  draw.fillRect(0, 0, canvas.width, canvas.height);
  draw.fillStyle = colours.ink;
  draw.font = font(15 * ratio(), true);
  draw.textBaseline = "top";
  draw.fillText(title(), pad, pad * 0.8);
  draw.drawImage(matrix, pad, pad + 30 * ratio());
  return canvas;
};

onClick("export-png", () => {
  picture().toBlob((blob) => {
    if (blob) download("png", blob);
  }, "image/png");
});

onClick("export-svg", () => {
  const canvas = picture();
  const size = { width: canvas.width / ratio(), height: canvas.height / ratio() };
  const viewBox = `0 0 ${size.width} ${size.height}`;
  const xmlns = "http://www.w3.org/2000/svg";
  const root = makeSvg("svg", { xmlns, ...size, viewBox, role: "img" });
  const name = makeSvg("title", {});
  name.textContent = title();
  root.append(name, makeSvg("image", { ...size, href: canvas.toDataURL("image/png") }));
  const text = new XMLSerializer().serializeToString(root);
  download("svg", new Blob([text], { type: "image/svg+xml" }));
});

onClick("export-json", () => {
  const token = query();
  const weights = Array.from(attention(token), (weight, index) => ({
    token: index,
    text: data.tokens[index].text,
    weight: Number.isNaN(weight) ? null : weight,
  }));
  const content = {
    model: data.model,
    token,
    text: data.tokens[token].text,
    weights_of: scopeWords(),
    attends_to: weights,
  };
  const text = JSON.stringify(content, null, 1);
  download("json", new Blob([text], { type: "application/json" }));
});
