// The text, in the colours of what the shown token attends to.

import { colours, level } from "./colours.js";
import { data, hasRow, label, rowTokens, total } from "./data.js";
import { byId, closest, make } from "./elements.js";
import { choiceChanged, on, soon, tokenChanged } from "./redraw.js";
import { attention, chooseToken, keyOf, pointAt, query, scopeWords, state } from "./state.js";
import { percent, plain, write } from "./words.js";

const LONG = 120;
const CHUNK = 200;

const strip = byId("strip", HTMLElement);

const spaced = data.tokens.some((token) => token.text.startsWith(" "));
const wordPieces = !spaced && data.tokens.some((token) => token.text.startsWith("##"));

/** Whether a token continues the word before it.
 * @param {string} text */
const continues = (text) =>
  spaced ? !/^\s/.test(text) : wordPieces ? text.startsWith("##") : false;

/** @param {number} index */
const makeToken = (index) => {
  const token = data.tokens[index];
  const span = make("span", { className: "token", id: `t${index}` });
  span.setAttribute("role", "option");
  span.setAttribute("aria-selected", "false");
  const missing = hasRow(index) ? "" : ", weights not kept";
  span.setAttribute("aria-label", `${label(index)}, token ${index}${missing}`);
  if (!hasRow(index)) {
    span.classList.add("closed");
    span.setAttribute("aria-disabled", "true");
  }
  const after = index > 0 && !token.special && !data.tokens[index - 1].special;
  span.classList.toggle("special", token.special);
  span.classList.toggle("new", index >= data.prompt);
  span.classList.toggle("glued", after && continues(token.text));
  span.dataset.token = String(index);
  write(span, wordPieces && /^##./.test(token.text) ? token.text.slice(2) : token.text);
  return span;
};

const spans = data.tokens.map((_, index) => makeToken(index));

const buildStrip = () => {
  strip.classList.toggle("many", total > LONG);
  for (let start = 0; start < total; start += CHUNK) {
    const chunk = make("span", { className: "chunk" }, ...spans.slice(start, start + CHUNK));
    chunk.setAttribute("role", "presentation");
    if (total > LONG) chunk.style.display = "block";
    strip.append(chunk);
  }
  if (data.following) {
    const next = make("b", { textContent: plain(data.following.text) });
    strip.append(make("span", { className: "follows" }, "next: ", next));
  }
};

/** @type {number[]} */
let coloured = [];

const drawStrip = () => {
  const token = query();
  const key = keyOf(token);
  const weights = attention(token);
  for (const index of coloured) {
    const span = spans[index];
    span.style.background = span.style.color = "";
    span.classList.remove("query", "key");
    span.setAttribute("aria-selected", "false");
  }
  coloured = [token, key];
  weights.forEach((weight, index) => {
    const shade = level(weight);
    if (!(shade > 4)) return;
    coloured.push(index);
    spans[index].style.background = colours.css[shade];
    spans[index].style.color = colours.on[shade];
  });
  spans[token].classList.add("query");
  spans[key].classList.add("key");
  spans[token].setAttribute("aria-selected", "true");
  strip.setAttribute("aria-activedescendant", `t${token}`);
  drawLargest(token, key, weights);
};

/** The keys with the most weight, in words and as buttons.
 * @param {number} token @param {number} key of the pair that is shown
 * @param {Float32Array} weights */
const drawLargest = (token, key, weights) => {
  const keys = [...weights.keys()].filter((index) => weights[index] > 0.0005);
  keys.sort((one, other) => weights[other] - weights[one]);
  byId("says", HTMLElement).replaceChildren(
    make("b", { textContent: label(token) }),
    ` (token ${token}) ${scopeWords()} attends to`,
  );
  const items = keys.slice(0, 6).map((index) => {
    const word = make("span", { textContent: label(index) });
    const share = make("i", { textContent: percent(weights[index]) });
    const title = `Token ${index}: show this pair`;
    const button = make("button", { type: "button", title }, word, share);
    button.setAttribute("aria-pressed", String(index === key));
    button.addEventListener("click", () => {
      state.key = index;
      choiceChanged();
    });
    return make("li", {}, button);
  });
  byId("top", HTMLElement).replaceChildren(...items);
};

/** @param {Event} event */
const tokenUnder = (event) => {
  const span = closest(event, ".token");
  return span ? Number(span.dataset.token) : null;
};

strip.addEventListener("pointerover", (event) => {
  const token = tokenUnder(event);
  if (token === null || event.pointerType === "touch") return;
  if (hasRow(token)) pointAt(token);
  else pointAt(null, token);
  soon(tokenChanged);
});

strip.addEventListener("pointerleave", () => {
  pointAt(null);
  soon(tokenChanged);
});

strip.addEventListener("click", (event) => {
  const token = tokenUnder(event);
  if (token === null) return;
  if (event.shiftKey || !hasRow(token)) state.key = token;
  else chooseToken(token);
  state.over = null;
  choiceChanged();
});

strip.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const last = rowTokens.length - 1;
  if (event.key === "Escape") state.key = null;
  else if (step && event.shiftKey) {
    state.key = Math.min(total - 1, Math.max(0, keyOf(state.query) + step));
  } else if (step) {
    const row = rowTokens.indexOf(state.query) + step;
    chooseToken(rowTokens[Math.min(last, Math.max(0, row))]);
  } else if (event.key === "Home") chooseToken(rowTokens[0]);
  else if (event.key === "End") chooseToken(rowTokens[last]);
  else return;
  event.preventDefault();
  pointAt(null);
  choiceChanged();
  const shown = event.shiftKey && state.key !== null ? state.key : state.query;
  spans[shown].scrollIntoView({ block: "nearest", inline: "nearest" });
});

buildStrip();
on("token", drawStrip);

/** Scrolls the text, and not the page, to the chosen token. */
export const showToken = () => {
  if (total <= LONG) return;
  spans[state.query].scrollIntoView({ block: "center" });
  scrollTo(0, 0);
};
