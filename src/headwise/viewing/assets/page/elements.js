// Elements of the page: found by their id, and made.

/**
 * The element with this id, which must be of this kind.
 *
 * @template {Element} T
 * @param {string} id
 * @param {new () => T} kind
 * @returns {T}
 */
export const byId = (id, kind) => {
  const element = document.getElementById(id);
  if (!(element instanceof kind)) throw new TypeError(`the page has no ${kind.name} #${id}`);
  return element;
};

/** @param {string} id @param {string} text */
export const say = (id, text) => {
  byId(id, HTMLElement).textContent = text;
};

/** @param {string} id @param {() => void} action */
export const onClick = (id, action) => byId(id, HTMLElement).addEventListener("click", action);

/**
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} name
 * @param {Partial<HTMLElementTagNameMap[K]>} properties
 * @param {...(Node | string)} children
 */
export const make = (name, properties, ...children) => {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
};

/**
 * @template {keyof SVGElementTagNameMap} K
 * @param {K} name
 * @param {Record<string, string | number>} attributes
 */
export const makeSvg = (name, attributes) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, String(value));
  return element;
};

/** The closest element of this kind around an event's target.
 * @param {Event} event @param {string} selector */
export const closest = (event, selector) => {
  const element = event.target instanceof Element ? event.target.closest(selector) : null;
  return element instanceof HTMLElement ? element : null;
};
