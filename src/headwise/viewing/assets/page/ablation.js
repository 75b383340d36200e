// The likeliest next tokens, with all heads and with some of them silenced.

import { data } from "./data.js";
import { byId, make, say } from "./elements.js";
import { percent, write } from "./words.js";

/** @typedef {import("./data.js").Guess} Guess */
/** @typedef {"before" | "after"} Side */

/** @param {string} title @param {Guess[]} guesses @param {Side} side @param {Side} other */
const makeGuesses = (title, guesses, side, other) => {
  const highest = Math.max(...guesses.map((guess) => guess[side] ?? 0), 1e-9);
  const lines = guesses.map((guess) => {
    const text = make("td", { title: `token ${guess.id}` });
    write(text, guess.text);
    const meter = make("i", { className: "meter" });
    meter.style.width = `${(100 * (guess[side] ?? 0)) / highest}%`;
    const share = make("td", { textContent: percent(guess[side]) });
    const rank = guess[`rank_${other}`] + 1;
    const word = other === "after" ? "then" : "was";
    const elsewhere = `${word} ${percent(guess[other])}, no. ${rank}`;
    const was = make("td", { className: "was", textContent: elsewhere });
    return make("tr", {}, text, make("td", {}, meter), share, was);
  });
  const table = make("table", {}, make("tbody", {}, ...lines));
  return make("div", {}, make("h3", { textContent: title }), table);
};

if (data.ablation) {
  const { heads, divergence, before, after } = data.ablation;
  const silenced = heads.length > 1 ? "these heads" : "this head";
  const bits = divergence === null ? "no finite number of" : divergence.toFixed(4);
  byId("ablation", HTMLElement).hidden = false;
  say("ablation-title", `Next token without ${heads.map((head) => head.join(".")).join(", ")}`);
  say(
    "ablation-note",
    `The output of ${silenced} replaced by zeros; the prediction moves by ${bits} bits (KL)`,
  );
  byId("ablation-tables", HTMLElement).append(
    makeGuesses("With all heads", before, "before", "after"),
    makeGuesses("Without", after, "after", "before"),
  );
}
