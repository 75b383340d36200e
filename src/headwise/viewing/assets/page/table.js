// The figures of the heads as a table, ordered by a click on a column's name.

import { headName, placeOf, placeText } from "./data.js";
import { byId, make, onClick } from "./elements.js";
import { figuresChanged, on } from "./redraw.js";
import { state } from "./state.js";
import { NAMES, STATISTICS, order, passes, sorted, statistic } from "./statistics.js";
import { headWords, pick } from "./thumbnails.js";
import { figure, percent } from "./words.js";

/** @typedef {import("./data.js").HeadPlace} HeadPlace */
/** @typedef {import("./statistics.js").Order} Order */

const MOST = 120;
let showsAll = false;

const table = byId("table", HTMLTableElement);
const more = byId("more", HTMLElement);
const body = table.tBodies[0];
const titles = table.rows[0];

/** @param {Order} column */
const makeTitle = (column) => {
  const { label, help, unit } = column === "layer" ? {} : STATISTICS[column];
  const title = help ? `${help} (${unit})` : "By layer";
  const button = make("button", { type: "button", textContent: label ?? "Head", title });
  button.addEventListener("click", () => {
    order.descending = order.by === column ? !order.descending : column !== "layer";
    order.by = column;
    byId("order", HTMLSelectElement).value = column;
    figuresChanged();
  });
  const cell = make("th", { scope: "col" }, button);
  cell.dataset.column = column;
  return cell;
};

/** @param {HTMLTableRowElement} line @param {HeadPlace} place */
const mark = (line, [layer, head]) =>
  line.classList.toggle("on", layer === state.layer && head === state.head);

/** @param {HeadPlace} place */
const makeLine = (place) => {
  const name = { textContent: headName(...place), title: headWords(place) };
  const button = make("button", { type: "button", ...name });
  button.addEventListener("click", () => pick(place));
  const line = make("tr", {}, make("td", {}, button));
  line.dataset.head = placeText(place);
  for (const column of NAMES) {
    const value = statistic(place, column);
    const share = STATISTICS[column].unit === "%";
    const text = share ? percent(value / 100) : figure(value, value < 100 ? 1 : 0);
    line.append(make("td", { textContent: text }));
  }
  mark(line, place);
  return line;
};

const drawTable = () => {
  for (const cell of titles.cells) {
    cell.removeAttribute("aria-sort");
    if (cell.dataset.column === order.by) {
      cell.setAttribute("aria-sort", order.descending ? "descending" : "ascending");
    }
  }
  const chosen = sorted().filter(passes);
  const shown = showsAll ? chosen : chosen.slice(0, MOST);
  body.replaceChildren(...shown.map(makeLine));
  more.hidden = chosen.length <= shown.length;
  more.textContent = `Show all ${chosen.length}`;
};

const markTable = () => {
  for (const line of body.rows) {
    const place = placeOf(line);
    mark(line, place);
    line.cells[NAMES.length].textContent = percent(statistic(place, "pair") / 100);
  }
};

titles.replaceChildren(makeTitle("layer"), ...NAMES.map(makeTitle));
onClick("more", () => {
  showsAll = true;
  drawTable();
});
on("figures", drawTable);
on("marks", markTable);
