// Text and numbers as a reader sees them: nothing invisible, nothing that turns around its neighbours.

const INVISIBLE =
  /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
const SPACE = "\u2423";
const NOTHING = "\u2205";

/** @param {string} mark an invisible character */
const code = (mark) => {
  if (mark === "\n") return "\u23ce";
  if (mark === "\t") return "\u21e5";
  return `U+${mark.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
};

/** The text with its invisible characters as codes.
 * @param {string} text */
export const plain = (text) => text.replace(INVISIBLE, code).trim() || (text ? SPACE : NOTHING);

/** Puts text into an element, its invisible characters as small codes.
 * @param {Element} element @param {string} text */
export const write = (element, text) => {
  const shown = text.replace(/^ (?=[^])/, "");
  let last = 0;
  for (const match of shown.matchAll(INVISIBLE)) {
    const small = document.createElement("span");
    small.className = "code";
    small.textContent = code(match[0]);
    element.append(shown.slice(last, match.index), small);
    last = match.index + match[0].length;
  }
  element.append(shown.slice(last));
  if (!element.textContent?.trim() && !element.querySelector(".code")) {
    element.textContent = text ? SPACE : NOTHING;
  }
};

/** A share as a percentage; null is how JSON says NaN.
 * @param {number | null} value */
export const percent = (value) => {
  if (value === null || Number.isNaN(value)) return "NaN";
  if (value >= 0.9995) return "100%";
  if (value >= 0.0995) return `${(100 * value).toFixed(0)}%`;
  if (value >= 0.00095) return `${(100 * value).toFixed(1)}%`;
  return value > 0 ? "<0.1%" : "0%";
};

/** A number with a fixed count of digits and a true minus sign.
 * @param {number} value @param {number} digits */
export const figure = (value, digits) =>
  Math.abs(value) < 0.5 * 10 ** -digits ? "0" : value.toFixed(digits).replace("-", "\u2212");
