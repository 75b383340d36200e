// The page: its title and theme, and the first drawing of all its parts.

import "./ablation.js";
import "./controls.js";
import "./downloads.js";
import "./matrix_input.js";
import "./mechanism.js";
import "./pair.js";
import "./table.js";
import { setTheme } from "./colours.js";
import { data, everyHead, layers, rowTokens, total } from "./data.js";
import { byId, onClick, say } from "./elements.js";
import { choiceChanged, figuresChanged, soon, tokenChanged } from "./redraw.js";
import { address } from "./state.js";
import { showToken } from "./strip.js";
import { buildThumbnails } from "./thumbnails.js";
import { plain } from "./words.js";

const describe = () => {
  const name = plain(data.model);
  document.title = `${name} \u2013 headwise view`;
  say("model", name);
  const decoded = total - data.prompt;
  const tokens = `${total.toLocaleString("en")} tokens`;
  const facts = [
    decoded ? `${tokens}, ${decoded} of them decoded` : tokens,
    `${layers.length} layers`,
    `${everyHead.length} heads`,
    data.dtype,
  ];
  if (data.not_numbers.length) {
    const first = data.not_numbers[0].join(".");
    facts.push(`weights are NaN in ${data.not_numbers.length} heads, first ${first}`);
  }
  if (data.states.length) {
    facts.push(`layers ${data.states.join(", ")} keep a state and have no weights`);
  }
  say("facts", facts.join(" \u00b7 "));
  say("heads-note", `Means over ${data.overview ? "all" : rowTokens.length} tokens`);
  const pooled = layers.some((layer) => layer.tile > 1 && layer.tiles);
  byId("pooled", HTMLElement).hidden = !pooled;
};

const firstTheme = () => {
  const theme = address.get("theme");
  if (theme === "dark" || theme === "light") return theme;
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
};

onClick("theme", () => {
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  buildThumbnails();
  choiceChanged();
});

let width = 0;
const resized = new ResizeObserver(() => {
  if (innerWidth === width) return;
  width = innerWidth;
  soon(() => {
    buildThumbnails();
    tokenChanged();
  });
});

describe();
setTheme(firstTheme());
figuresChanged();
choiceChanged();
showToken();
resized.observe(document.body);
