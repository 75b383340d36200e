"use strict";
(() => {
  // ---------------------------------------------------------------- data
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const n = data.tokens.length;

  const bytes = (text) => {
    const raw = atob(text);
    const out = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
    return out.buffer;
  };

  class Layer {
    constructor(fields) {
      Object.assign(this, fields);
      this.rowAt = new Map(this.rows.map((row, at) => [row, at]));
      this.offsets = [];
      let size = 0;
      for (const [start, stop] of this.spans) { this.offsets.push(size); size += stop - start; }
      this.size = size;
      this.made = new Map();
    }
    // Numbers are unpacked when they are first needed.
    numbers(name) {
      if (!this.made.has(name)) this.made.set(name, this[name] === null ? null : new Float32Array(bytes(this[name])));
      return this.made.get(name);
    }
    // One pair: what q.k is, and what becomes of it; null where the row has no such key.
    pair(head, token, key) {
      const row = this.rowAt.get(token);
      if (row === undefined) return null;
      const [start, stop] = this.spans[row];
      if (key < start || key >= stop) return null;
      const at = head * this.size + this.offsets[row] + key - start;
      const raw = this.numbers("raw")[at];
      if (Number.isNaN(raw)) return null;
      const scaled = raw * this.scale;
      const capped = this.softcap === null ? scaled : this.softcap * Math.tanh(scaled / this.softcap);
      const added = this.numbers("added");
      const score = capped + (added ? added[at] : 0);
      const lse = this.numbers("lse")[head * this.rows.length + row];
      const content = this.numbers("content");
      return {
        raw, scaled, capped, score, lse, added: added ? added[at] : null,
        content: content ? content[at] : null, rope: content ? raw - content[at] : null,
        weight: Number.isFinite(lse) ? Math.exp(score - lse) : 0,
      };
    }
    // A row of a head, from spans[row][0] on: weights, or a part of the score; NaN where hidden.
    row(head, row, part) {
      const [start, stop] = this.spans[row];
      const from = head * this.size + this.offsets[row];
      const raw = this.numbers("raw");
      const out = new Float32Array(stop - start);
      if (part !== "weight") {
        const content = this.numbers("content");
        for (let i = 0; i < out.length; i++) out[i] = part === "content" ? content[from + i] : raw[from + i] - content[from + i];
        return out;
      }
      const added = this.numbers("added");
      const lse = this.numbers("lse")[head * this.rows.length + row];
      if (!Number.isFinite(lse)) return out.fill(NaN);
      for (let i = 0; i < out.length; i++) {
        let score = raw[from + i] * this.scale;
        if (this.softcap !== null) score = this.softcap * Math.tanh(score / this.softcap);
        out[i] = Math.exp(score + (added ? added[from + i] : 0) - lse);
      }
      return out;
    }
    // Pooled squares of a head: { side, tile, peak, values }; NaN where nothing can be seen.
    pooled(head, kind) {
      const name = `${kind}${head}`;
      if (!this.made.has(name)) this.made.set(name, this.tiles ? this.unpacked(head, kind) : this.rows.length === n ? this.whole(head) : null);
      return this.made.get(name);
    }
    unpacked(head, kind) {
      const { side, lower } = this.tiles;
      const packed = `packed-${kind}`;
      if (!this.made.has(packed)) this.made.set(packed, new Uint16Array(bytes(this.tiles[kind].data)));
      const numbers = this.made.get(packed);
      const peak = this.tiles[kind].peak[head];
      const values = new Float32Array(side * side).fill(NaN);
      let at = head * (lower ? (side * (side + 1)) / 2 : side * side);
      for (let y = 0; y < side; y++) {
        for (let x = 0; x < (lower ? y + 1 : side); x++) values[y * side + x] = (numbers[at++] / 65535) * peak;
      }
      return { side, tile: this.tile, peak, values };
    }
    whole(head) {
      const values = new Float32Array(n * n).fill(NaN);
      this.rows.forEach((token, row) => values.set(this.row(head, row, "weight"), token * n + this.spans[row][0]));
      return { side: n, tile: 1, peak: 1, values };
    }
  }

  const layers = data.layers.map((fields) => new Layer(fields));
  const rows = layers[0].rows;
  const open = new Set(rows);
  const anyPooled = layers.some((layer) => layer.tile > 1 && layer.tiles);

  // ---------------------------------------------------------------- text
  const INVISIBLE = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
  const code = (mark) => {
    const point = mark.codePointAt(0);
    if (mark === "\n") return "\u23ce";
    if (mark === "\t") return "\u21e5";
    return `U+${point.toString(16).toUpperCase().padStart(4, "0")}`;
  };
  // Text in which nothing is invisible and nothing turns around what stands beside it.
  const plain = (text) => {
    const shown = text.replace(INVISIBLE, code).trim();
    return shown || (text ? "\u2423" : "\u2205");
  };
  const label = (at) => plain(data.tokens[at].text);
  const short = (at, most) => {
    const marks = Array.from(label(at));
    return marks.length > most ? marks.slice(0, most - 1).join("") + "\u2026" : marks.join("");
  };
  const element = (name, properties, ...children) => {
    const made = Object.assign(document.createElement(name), properties || {});
    made.append(...children);
    return made;
  };
  // Puts text into an element, its invisible characters as small codes.
  const write = (into, text) => {
    const shown = text.replace(/^ (?=[^])/, "");
    let last = 0;
    for (const found of shown.matchAll(INVISIBLE)) {
      into.append(shown.slice(last, found.index), element("span", { className: "code", textContent: code(found[0]) }));
      last = found.index + found[0].length;
    }
    into.append(shown.slice(last));
    if (!into.textContent.trim() && !into.querySelector(".code")) into.textContent = text ? "\u2423" : "\u2205";
  };
  const percent = (value) => (value === null || Number.isNaN(value) ? "NaN" : value >= 0.9995 ? "100%" : value >= 0.0995 ? `${(100 * value).toFixed(0)}%` : value >= 0.00095 ? `${(100 * value).toFixed(1)}%` : value > 0 ? "<0.1%" : "0%");
  const figure = (value, digits) => (Math.abs(value) < 0.5 * 10 ** -digits ? "0" : value.toFixed(digits).replace("-", "\u2212"));
  const name = (layer, head) => `${layers[layer].index}.${layers[layer].heads[head]}`;

  // ---------------------------------------------------------------- state
  const STATISTICS = {
    entropy: { label: "Entropy", unit: "bits", help: "How spread out the weight is: 2 to this power tokens at the same weight" },
    distance: { label: "Distance", unit: "tokens", help: "How far away what it attends to stands, on average" },
    first: { label: "First", unit: "%", help: "Share of the weight on the first token" },
    previous: { label: "Previous", unit: "%", help: "Share of the weight on the token before" },
    itself: { label: "Itself", unit: "%", help: "Share of the weight on the token itself" },
    pair: { label: "This pair", unit: "%", help: "Weight of the selected pair of tokens" },
  };
  const everyHead = layers.flatMap((layer, l) => layer.heads.map((_, h) => [l, h]));
  const lastPlain = [...rows].reverse().find((row) => !data.tokens[row].special && data.tokens[row].text.trim().length > 1);
  const state = {
    layer: 0, head: 0, scope: "head", query: lastPlain ?? rows[rows.length - 1], key: null,
    over: null, overKey: null, pool: "max", part: "weight", across: "layers",
    order: "layer", down: false, by: "entropy", side: "least", value: null, all: false,
    window: { x: 0, y: 0, span: n },
  };
  const asked = new URLSearchParams(location.hash.slice(1));
  const place = (text) => (/^\d+$/.test(text ?? "") ? Number(text) : -1);
  if (open.has(place(asked.get("token")))) state.query = place(asked.get("token"));
  if (place(asked.get("key")) >= 0 && place(asked.get("key")) < n) state.key = place(asked.get("key"));
  const named = (asked.get("head") ?? "").split(".").map(place);
  const found = layers.findIndex((layer) => layer.index === named[0]);
  if (found >= 0 && layers[found].heads.includes(named[1])) { state.layer = found; state.head = layers[found].heads.indexOf(named[1]); }
  if (["head", "layer", "all"].includes(asked.get("scope"))) state.scope = asked.get("scope");

  const remember = () => {
    if (location.protocol === "about:") return;
    const key = state.key === null ? "" : `&key=${state.key}`;
    history.replaceState(null, "", `#token=${state.query}&head=${name(state.layer, state.head)}&scope=${state.scope}${key}`);
  };

  const query = () => (state.over !== null && open.has(state.over) ? state.over : state.query);
  const heads = (scope) => (scope === "head" ? [[state.layer, state.head]] : scope === "layer" ? layers[state.layer].heads.map((_, h) => [state.layer, h]) : everyHead);

  // What a token attends to, [n], averaged over heads; NaN where no head can see.
  const kept = new Map();
  const mean = (pairs, token, id) => {
    const key = `${id}:${token}`;
    if (kept.has(key)) return kept.get(key);
    const sum = new Float32Array(n).fill(NaN);
    for (const [l, h] of pairs) {
      const row = layers[l].rowAt.get(token);
      const start = layers[l].spans[row][0];
      const values = layers[l].row(h, row, "weight");
      for (let i = 0; i < values.length; i++) {
        if (Number.isNaN(values[i])) continue;
        const at = start + i;
        sum[at] = (Number.isNaN(sum[at]) ? 0 : sum[at]) + values[i] / pairs.length;
      }
    }
    if (kept.size > 200) kept.delete(kept.keys().next().value);
    kept.set(key, sum);
    return sum;
  };
  const scopeId = (scope) => (scope === "head" ? `h${state.layer}.${state.head}` : scope === "layer" ? `l${state.layer}` : "a");
  const attention = (token) => mean(heads(state.scope), token, scopeId(state.scope));
  const most = (values) => values.reduce((best, value, at) => (value > (values[best] || 0) ? at : best), 0);
  const keyOf = (token) => state.overKey ?? state.key ?? most(attention(token));

  const statistic = (l, h, by) => {
    if (by === "pair") {
      const found = layers[l].pair(h, query(), keyOf(query()));
      return found ? 100 * found.weight : 0;
    }
    const value = layers[l].stats[h][data.statistics.indexOf(by)] ?? 0;
    return STATISTICS[by].unit === "%" ? 100 * value : value;
  };
  const passes = (l, h) => {
    if (state.value === null) return true;
    const value = statistic(l, h, state.by);
    return state.side === "least" ? value >= state.value : value <= state.value;
  };
  const sorted = () => {
    if (state.order === "layer") return state.down ? [...everyHead].reverse() : everyHead;
    const by = everyHead.map(([l, h]) => [statistic(l, h, state.order), l, h]);
    by.sort((a, b) => (state.down ? b[0] - a[0] : a[0] - b[0]) || a[1] - b[1] || a[2] - b[2]);
    return by.map(([, l, h]) => [l, h]);
  };

  // ---------------------------------------------------------------- colour
  let colours = null;
  const parse = (text) => text.trim().slice(1).match(/../g).map((pair) => parseInt(pair, 16));
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (one, other) => (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  const palette = () => {
    const style = getComputedStyle(document.documentElement);
    const get = (variable) => parse(style.getPropertyValue(variable));
    const between = (stops) => Array.from({ length: 256 }, (_, i) => {
      const at = (i / 255) * (stops.length - 1);
      const low = Math.min(Math.floor(at), stops.length - 2);
      return stops[low].map((c, k) => Math.round(c + (stops[low + 1][k] - c) * (at - low)));
    });
    const weight = between([get("--low"), get("--mid"), get("--high")]);
    const ink = luminance(get("--ink"));
    colours = {
      weight, signed: between([get("--rope"), get("--low"), get("--kv0")]),
      css: weight.map((c) => `rgb(${c.join(" ")})`),
      // what can be read on each: the ink, or else black or white, one of which always can
      on: weight.map((c) => (contrast(luminance(c), ink) > 5 ? style.getPropertyValue("--ink") : luminance(c) > 0.179 ? "#000" : "#fff")),
      hidden: get("--void"),
      text: style.getPropertyValue("--soft"), faint: style.getPropertyValue("--faint"),
      ink: style.getPropertyValue("--ink"), accent: style.getPropertyValue("--accent"), card: style.getPropertyValue("--card"),
    };
    const canvas = $("scale"), draw = canvas.getContext("2d");
    for (let x = 0; x < canvas.width; x++) { draw.fillStyle = colours.css[Math.round((x / (canvas.width - 1)) * 255)]; draw.fillRect(x, 0, 1, canvas.height); }
  };
  const level = (value) => Math.round(255 * Math.sqrt(Math.min(1, Math.max(0, value))));

  // ---------------------------------------------------------------- the text
  const strip = $("strip");
  const spans = [];
  const buildText = () => {
    strip.classList.toggle("many", n > 120);
    let chunk = null;
    data.tokens.forEach((token, at) => {
      if (at % 200 === 0) { chunk = element("span", { className: "chunk" }); chunk.setAttribute("role", "presentation"); strip.append(chunk); if (n > 120) chunk.style.display = "block"; }
      const span = element("span", { className: "token", id: `t${at}` });
      span.setAttribute("role", "option");
      span.setAttribute("aria-selected", "false");
      span.setAttribute("aria-label", `${label(at)}, token ${at}${open.has(at) ? "" : ", weights not kept"}`);
      if (!open.has(at)) { span.classList.add("closed"); span.setAttribute("aria-disabled", "true"); }
      if (token.special) span.classList.add("special");
      if (at >= data.prompt) span.classList.add("new");
      if (at > 0 && !token.special && !data.tokens[at - 1].special && glued(token.text)) span.classList.add("glued");
      span.dataset.at = at;
      write(span, /^##./.test(token.text) && wordPieces ? token.text.slice(2) : token.text);
      spans.push(span);
      chunk.append(span);
    });
    if (data.following) {
      const follows = element("span", { className: "follows" }, "next: ", element("b", { textContent: plain(data.following.text) }));
      strip.append(follows);
    }
  };
  const spaced = data.tokens.some((token) => token.text.startsWith(" "));
  const wordPieces = !spaced && data.tokens.some((token) => token.text.startsWith("##"));
  const glued = (text) => (spaced ? !/^\s/.test(text) : wordPieces ? text.startsWith("##") : false);

  let coloured = [];
  const drawText = () => {
    const token = query(), values = attention(token), key = keyOf(token);
    for (const at of coloured) {
      const span = spans[at];
      span.style.background = span.style.color = "";
      span.classList.remove("query", "key");
      span.setAttribute("aria-selected", "false");
    }
    coloured = [];
    for (let at = 0; at < n; at++) {
      const shade = level(values[at]);
      if (!(shade > 4) && at !== token && at !== key) continue;
      coloured.push(at);
      if (!(shade > 4)) continue;
      spans[at].style.background = colours.css[shade];
      spans[at].style.color = colours.on[shade];
    }
    spans[token].classList.add("query");
    spans[key].classList.add("key");
    spans[token].setAttribute("aria-selected", "true");
    strip.setAttribute("aria-activedescendant", `t${token}`);
    says(token, values);
  };
  const scopeWords = () => (state.scope === "head" ? `in head ${name(state.layer, state.head)}` : state.scope === "layer" ? `in layer ${layers[state.layer].index}, mean of its heads` : `mean of all ${everyHead.length} heads`);
  const says = (token, values) => {
    const order = [];
    for (let at = 0; at < n; at++) if (values[at] > 0.0005) order.push(at);
    order.sort((a, b) => values[b] - values[a]);
    $("says").replaceChildren(element("b", { textContent: label(token) }), ` (token ${token}) ${scopeWords()} attends to`);
    $("top").replaceChildren(...order.slice(0, 6).map((at) => {
      const button = element("button", { type: "button" }, element("span", { textContent: label(at) }), element("i", { textContent: percent(values[at]) }));
      button.setAttribute("aria-pressed", String(at === keyOf(token)));
      button.title = `Token ${at}: show this pair`;
      button.addEventListener("click", () => { state.key = at; all(); });
      return element("li", {}, button);
    }));
  };
  const tokenAt = (event) => {
    const found = event.target.closest?.(".token");
    return found ? Number(found.dataset.at) : null;
  };
  strip.addEventListener("pointerover", (event) => {
    const at = tokenAt(event);
    if (at === null || event.pointerType === "touch") return;
    if (open.has(at)) { state.over = at; state.overKey = null; } else { state.over = null; state.overKey = at; }
    soon(light);
  });
  strip.addEventListener("pointerleave", () => { state.over = state.overKey = null; soon(light); });
  strip.addEventListener("click", (event) => {
    const at = tokenAt(event);
    if (at === null) return;
    if (event.shiftKey || !open.has(at)) state.key = at; else choose(at);
    state.over = null;
    all();
  });
  const choose = (at) => { state.query = at; state.key = null; };
  const visible = (at) => spans[at].scrollIntoView({ block: "nearest", inline: "nearest" });
  strip.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const at = rows.indexOf(state.query);
    if (event.key === "Escape") state.key = null;
    else if (step && event.shiftKey) state.key = Math.min(n - 1, Math.max(0, keyOf(state.query) + step));
    else if (step) choose(rows[Math.min(rows.length - 1, Math.max(0, at + step))]);
    else if (event.key === "Home") choose(rows[0]);
    else if (event.key === "End") choose(rows[rows.length - 1]);
    else return;
    event.preventDefault();
    state.over = state.overKey = null;
    all();
    visible(event.shiftKey && state.key !== null ? state.key : state.query);
  });

  // ---------------------------------------------------------------- thumbnails
  const grid = $("grid");
  let thumbs = new Map();
  const paintThumb = (canvas, l, h) => {
    const layer = layers[l], pool = layer.pooled(h, state.pool);
    let values, wide, high, peak = 1;
    if (pool) { values = pool.values; wide = high = pool.side; if (state.pool === "mean" && pool.tile > 1) peak = pool.peak; }
    else {
      wide = Math.min(64, n); high = rows.length;
      values = new Float32Array(wide * high).fill(NaN);
      rows.forEach((token, row) => layer.row(h, row, "weight").forEach((value, i) => {
        const at = row * wide + Math.floor(((layer.spans[row][0] + i) * wide) / n);
        if (!(values[at] >= value)) values[at] = value;
      }));
    }
    canvas.width = wide; canvas.height = high;
    const draw = canvas.getContext("2d"), image = draw.createImageData(wide, high);
    for (let i = 0; i < values.length; i++) {
      const colour = Number.isNaN(values[i]) ? colours.hidden : colours.weight[level(values[i] / peak)];
      image.data.set(colour, 4 * i);
      image.data[4 * i + 3] = 255;
    }
    draw.putImageData(image, 0, 0);
    canvas.dataset.done = "yes";
  };
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting && !entry.target.dataset.done) {
      const [l, h] = entry.target.dataset.head.split(".").map(Number);
      paintThumb(entry.target, l, h);
    }
  }, { root: grid, rootMargin: "300px" });
  const thumb = (l, h, caption) => {
    const layer = layers[l];
    const canvas = element("canvas", { width: 8, height: 8 });
    canvas.dataset.head = `${l}.${h}`;
    const button = element("button", { type: "button", className: "head", title: headWords(l, h) }, canvas);
    button.setAttribute("aria-label", headWords(l, h));
    button.dataset.head = `${l}.${h}`;
    if (caption) button.append(element("span", { className: "caption", textContent: caption }));
    watcher.observe(canvas);
    thumbs.set(`${l}.${h}`, button);
    return button;
  };
  const headWords = (l, h) => {
    const layer = layers[l];
    const shares = layer.latent ? "the shared latent" : `kv head ${layer.kv_head_of[h]}`;
    return `Layer ${layer.index}, head ${layer.heads[h]}; reads ${shares}; entropy ${figure(statistic(l, h, "entropy"), 1)} bits`;
  };
  const buildGrid = () => {
    const widest = Math.max(...layers.map((layer) => layer.heads.length));
    const spare = grid.clientWidth - 48;
    const lines = Math.ceil((widest * 34) / spare);
    grid.style.setProperty("--thumb", `${Math.max(26, Math.min(56, Math.floor(spare / Math.ceil(widest / lines) - 8)))}px`);
    watcher.disconnect();
    thumbs = new Map();
    if (state.order === "layer") {
      const made = layers.map((layer, l) => {
        const groups = new Map();
        layer.heads.forEach((_, h) => {
          const kv = layer.kv_head_of[h];
          if (!groups.has(kv)) {
            const group = element("div", { className: layer.latent ? "group latent" : "group" });
            group.setAttribute("role", "group");
            group.setAttribute("aria-label", layer.latent ? `Heads that read one latent of ${layer.latent[0]} and a rope key of ${layer.latent[1]}` : `Heads that share kv head ${kv}`);
            group.title = group.getAttribute("aria-label");
            groups.set(kv, group);
          }
          groups.get(kv).append(thumb(l, h));
        });
        return element("div", { className: "row" }, element("span", { className: "name", textContent: `L${layer.index}` }), element("div", { className: "groups" }, ...groups.values()));
      });
      grid.replaceChildren(...(state.down ? made.reverse() : made));
    } else {
      const unit = STATISTICS[state.order].unit;
      const made = sorted().filter(([l, h]) => passes(l, h)).map(([l, h]) => thumb(l, h, `${name(l, h)}  ${figure(statistic(l, h, state.order), unit === "%" ? 0 : 1)}${unit === "%" ? "%" : ""}`));
      grid.replaceChildren(element("div", { className: "flat" }, ...made));
    }
    markGrid();
  };
  const markGrid = () => {
    let count = 0;
    for (const [l, h] of everyHead) {
      const button = thumbs.get(`${l}.${h}`), pass = passes(l, h);
      if (pass) count++;
      if (!button) continue;
      button.classList.toggle("out", !pass);
      button.setAttribute("aria-pressed", String(l === state.layer && h === state.head));
    }
    $("filter-count").textContent = state.value === null ? `${everyHead.length} heads` : `${count} of ${everyHead.length} heads`;
  };
  grid.addEventListener("click", (event) => {
    const button = event.target.closest(".head");
    if (!button) return;
    pick(...button.dataset.head.split(".").map(Number));
  });
  grid.addEventListener("keydown", (event) => {
    const button = event.target.closest?.(".head");
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!button || !step) return;
    const every = [...grid.querySelectorAll(".head")];
    const across = event.key === "ArrowRight" || event.key === "ArrowLeft";
    let next = every[every.indexOf(button) + step];
    if (!across) {
      const box = button.getBoundingClientRect();
      const rest = every.filter((other) => step * (other.getBoundingClientRect().top - box.top) > 8);
      const far = (other) => { const to = other.getBoundingClientRect(); return Math.abs(to.top - box.top) * 100 + Math.abs(to.left - box.left); };
      next = rest.sort((a, b) => far(a) - far(b))[0];
    }
    if (next) { event.preventDefault(); next.focus(); pick(...next.dataset.head.split(".").map(Number)); }
  });
  const pick = (l, h) => {
    state.layer = l; state.head = h;
    if (state.scope === "all") state.scope = "head";
    fillHeads();
    all();
  };

  // ---------------------------------------------------------------- the matrix
  const matrix = $("matrix");
  const plot = { left: 0, top: 0, size: 0, ratio: 1 };
  const fit = (canvas, height) => {
    const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth;
    const wide = Math.round(width * ratio), high = Math.round(height * ratio);
    if (canvas.width !== wide || canvas.height !== high) { canvas.width = wide; canvas.height = high; canvas.style.height = `${height}px`; }
    const draw = canvas.getContext("2d");
    draw.setTransform(ratio, 0, 0, ratio, 0, 0);
    draw.clearRect(0, 0, width, height);
    return [draw, ratio, width];
  };
  // Values of one row for `count` pixels from column x on, each the largest of what it covers.
  const across = (values, start, x, span, count, size) => {
    const out = new Float32Array(count).fill(NaN);
    for (let p = 0; p < count; p++) {
      const from = Math.floor((x + (p * span) / count) / size);
      const to = Math.max(from + 1, Math.ceil((x + ((p + 1) * span) / count) / size - 1e-6));
      for (let at = from; at < to; at++) {
        const value = values[at - start];
        if (value !== undefined && !(out[p] >= value) && !Number.isNaN(value)) {
          if (Number.isNaN(out[p]) || Math.abs(value) > Math.abs(out[p])) out[p] = value;
        }
      }
    }
    return out;
  };
  const drawMatrix = () => {
    const layer = layers[state.layer], { x, y, span } = state.window;
    const width = matrix.clientWidth;
    const labelled = (width - 90) / span >= 9.5;
    plot.left = labelled ? Math.min(92, Math.round(width * 0.22)) : 44;
    plot.top = labelled ? plot.left - 8 : 24;
    plot.size = Math.max(40, Math.min(width - plot.left - 4, 620));
    const [draw, ratio] = fit(matrix, plot.top + plot.size + 4);
    const pixels = Math.round(plot.size * ratio), image = draw.createImageData(pixels, pixels);
    const pool = state.part === "weight" ? layer.pooled(state.head, state.pool) : null;
    const peak = pool && state.pool === "mean" && pool.tile > 1 ? pool.peak : 1;
    const cell = pixels / span, thick = Math.max(cell, 2 * ratio);
    // squares stand for many weights: they are hatched, and end where a token sees no more keys
    const squares = pool && pool.tile > 1 ? pool : null, hatch = Math.round(7 * ratio);
    const lower = squares !== null && layer.tiles.lower;
    const exact = new Map();
    let largest = 1e-9;
    for (const token of rows) {
      if (token < y - 1 || token > y + span) continue;
      const row = layer.rowAt.get(token);
      const values = across(layer.row(state.head, row, state.part), layer.spans[row][0], x, span, pixels, 1);
      exact.set(token, values);
      if (state.part !== "weight") for (const value of values) if (Math.abs(value) > largest) largest = Math.abs(value);
    }
    const shown = [...exact.keys()];
    let strips = new Map();
    let next = 0;
    for (let py = 0; py < pixels; py++) {
      const at = y + (py * span) / pixels;
      while (next < shown.length && (shown[next] - y) * cell + thick <= py) next++;
      const token = next < shown.length && (shown[next] - y) * cell <= py + 0.5 ? shown[next] : null;
      let values = token === null ? null : exact.get(token);
      if (!values && pool) {
        const tile = Math.floor(at / pool.tile);
        if (!strips.has(tile)) strips.set(tile, across(pool.values.subarray(tile * pool.side, (tile + 1) * pool.side), 0, x, span, pixels, pool.tile));
        values = strips.get(tile);
      }
      const scale = token === null ? peak : 1;
      for (let px = 0, to = 4 * py * pixels; px < pixels; px++, to += 4) {
        const square = squares !== null && token === null;
        const value = values && !(square && lower && Math.floor(x + (px * span) / pixels) > at) ? values[px] : NaN;
        const colour = square && !Number.isNaN(value) && (px + py) % hatch < ratio ? colours.hidden : Number.isNaN(value) ? colours.hidden
          : state.part === "weight" ? colours.weight[level(value / scale)]
          : colours.signed[Math.round(127.5 + (127.5 * value) / largest)];
        image.data[to] = colour[0]; image.data[to + 1] = colour[1]; image.data[to + 2] = colour[2]; image.data[to + 3] = 255;
      }
    }
    draw.putImageData(image, Math.round(plot.left * ratio), Math.round(plot.top * ratio));
    ornaments(draw, labelled, squares, lower);
    const first = Math.ceil(x), last = Math.min(n, Math.floor(x + span)) - 1;
    const full = rows.length === n ? "" : `; ${rows.length} rows in full${pool && pool.tile > 1 ? `, the others in hatched squares of ${pool.tile} by ${pool.tile}: the ${state.pool === "mean" ? "mean" : "largest"} weight in each` : ""}`;
    $("window").textContent = span >= n ? `All ${n} tokens${full}` : `Columns ${first} to ${last} of ${n}${full}`;
    matrix.setAttribute("aria-label", `${state.part === "weight" ? "Weights" : "Scores"} of head ${name(state.layer, state.head)}, tokens ${first} to ${last}`);
  };
  const ornaments = (draw, labelled, squares, lower) => {
    const { x, y, span } = state.window, cell = plot.size / span;
    const toX = (at) => plot.left + (at - x) * cell, toY = (at) => plot.top + (at - y) * cell;
    if (cell >= 9) {
      draw.strokeStyle = colours.card; draw.lineWidth = 1; draw.beginPath();
      for (let at = Math.floor(y); at <= y + span; at++) {
        if (squares && !open.has(at)) continue; // no lines between weights where there are none
        const above = Math.max(plot.top, toY(at)), below = Math.min(plot.top + plot.size, toY(at + 1));
        if (above >= below) continue;
        for (let by = Math.ceil(x); by <= x + span; by++) { draw.moveTo(toX(by), above); draw.lineTo(toX(by), below); }
        for (const edge of [above, below]) { draw.moveTo(plot.left, edge); draw.lineTo(plot.left + plot.size, edge); }
      }
      draw.stroke();
    }
    if (squares && squares.tile * cell >= 12) {
      draw.save();
      draw.beginPath(); draw.rect(plot.left, plot.top, plot.size, plot.size); draw.clip();
      const wide = squares.tile * cell;
      draw.lineWidth = 1; draw.textAlign = "center"; draw.textBaseline = "middle";
      draw.font = '11px system-ui, "Liberation Sans", sans-serif';
      for (let down = Math.floor(y / squares.tile); down < squares.side && down * squares.tile < y + span; down++) {
        for (let over = Math.floor(x / squares.tile); over < (lower ? down + 1 : squares.side) && over * squares.tile < x + span; over++) {
          const value = squares.values[down * squares.side + over];
          if (Number.isNaN(value)) continue;
          draw.strokeStyle = colours.card;
          draw.strokeRect(toX(over * squares.tile), toY(down * squares.tile), wide, wide);
          if (wide < 44) continue;
          // in the middle of what is seen of it, and on the diagonal in the lower half
          const middle = (from, start, share) => {
            const low = Math.max(from, start), high = Math.min(from + wide, start + plot.size);
            return low + share * (high - low);
          };
          const shift = lower && over === down ? 0.68 : 0.5;
          const left = middle(toX(over * squares.tile), plot.left, 1 - shift), top = middle(toY(down * squares.tile), plot.top, shift);
          const said = `${state.pool === "mean" ? "mean" : "max"} ${percent(value)}`;
          draw.lineWidth = 3; draw.strokeStyle = colours.card; draw.strokeText(said, left, top);
          draw.fillStyle = colours.ink; draw.fillText(said, left, top);
          draw.lineWidth = 1;
        }
      }
      draw.restore();
    }
    const token = query(), key = keyOf(token);
    draw.textBaseline = "middle";
    const size = Math.max(9, Math.min(13, cell * 0.62));
    if (labelled) {
      for (let at = Math.max(0, Math.floor(y)); at < Math.min(n, y + span); at++) {
        if (toY(at + 0.5) < plot.top || toY(at + 0.5) > plot.top + plot.size) continue;
        draw.font = `${at === token ? "600 " : ""}${size}px system-ui, "Liberation Sans", sans-serif`;
        draw.fillStyle = at === token ? colours.accent : open.has(at) ? colours.text : colours.faint;
        draw.textAlign = "right";
        draw.fillText(fitText(draw, at, plot.left - 10), plot.left - 6, toY(at + 0.5));
      }
      for (let at = Math.max(0, Math.floor(x)); at < Math.min(n, x + span); at++) {
        if (toX(at + 0.5) < plot.left || toX(at + 0.5) > plot.left + plot.size) continue;
        draw.save();
        draw.translate(toX(at + 0.5), plot.top - 6);
        draw.rotate(-Math.PI / 2);
        draw.textAlign = "left";
        draw.font = `${at === key ? "600 " : ""}${size}px system-ui, "Liberation Sans", sans-serif`;
        draw.fillStyle = at === key ? colours.ink : colours.text;
        draw.fillText(fitText(draw, at, plot.top - 10), 0, 0);
        draw.restore();
      }
    } else {
      draw.font = '11px system-ui, "Liberation Sans", sans-serif';
      draw.fillStyle = colours.faint;
      const step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000].find((s) => (s * plot.size) / span > 56) ?? 50000;
      for (let at = Math.ceil(x / step) * step; at <= Math.min(n, x + span); at += step) { draw.textAlign = "center"; if (toX(at) < plot.left + plot.size - 8) draw.fillText(String(at), toX(at), plot.top - 11); }
      for (let at = Math.ceil(y / step) * step; at <= Math.min(n, y + span); at += step) { draw.textAlign = "right"; if (toY(at) < plot.top + plot.size - 4) draw.fillText(String(at), plot.left - 6, toY(at) + 3); }
    }
    draw.save();
    draw.beginPath(); draw.rect(plot.left - 2, plot.top - 2, plot.size + 4, plot.size + 4); draw.clip();
    if (cell < 5) {
      // an outline would cover what it is around: a mark at the edge for the row, one for the column
      draw.restore();
      const mark = (x, y, dx, dy, colour) => { draw.fillStyle = colour; draw.beginPath(); draw.moveTo(x, y); draw.lineTo(x - 7 * dx - 4 * dy, y - 7 * dy - 4 * dx); draw.lineTo(x - 7 * dx + 4 * dy, y - 7 * dy + 4 * dx); draw.fill(); };
      const row = toY(token + 0.5), column = toX(key + 0.5);
      if (row >= plot.top && row <= plot.top + plot.size) mark(plot.left, row, 1, 0, colours.accent);
      if (column >= plot.left && column <= plot.left + plot.size) mark(column, plot.top, 0, 1, colours.ink);
      return;
    }
    draw.lineWidth = 2; draw.strokeStyle = colours.accent;
    draw.strokeRect(plot.left + 1, toY(token) , plot.size - 2, Math.max(cell, 2));
    draw.strokeStyle = colours.ink;
    draw.strokeRect(toX(key), toY(token), Math.max(cell, 3), Math.max(cell, 3));
    draw.restore();
  };
  const fitText = (draw, at, room) => {
    const marks = Array.from(label(at));
    if (draw.measureText(marks.join("")).width <= room) return marks.join("");
    while (marks.length > 1 && draw.measureText(`${marks.join("")}\u2026`).width > room) marks.pop();
    return `${marks.join("")}\u2026`;
  };
  const clamp = () => {
    const w = state.window;
    w.span = Math.min(n, Math.max(Math.min(n, 4), w.span));
    w.x = Math.min(n - w.span, Math.max(0, w.x));
    w.y = Math.min(n - w.span, Math.max(0, w.y));
  };
  const zoom = (factor, px = 0.5, py = 0.5) => {
    const w = state.window, before = w.span;
    w.span = Math.min(n, Math.max(Math.min(n, 4), w.span * factor));
    w.x += px * (before - w.span); w.y += py * (before - w.span);
    clamp(); soon(drawMatrix);
  };
  const zoomPair = () => {
    const token = query(), span = Math.min(n, 24);
    state.window = { span, x: keyOf(token) - span / 2, y: token - span / 2 };
    clamp(); drawMatrix();
  };
  const under = (event) => {
    const box = matrix.getBoundingClientRect();
    const px = (event.clientX - box.left - plot.left) / plot.size, py = (event.clientY - box.top - plot.top) / plot.size;
    return { px, py, inside: px >= 0 && px < 1 && py >= 0 && py < 1, column: Math.floor(state.window.x + px * state.window.span), row: Math.floor(state.window.y + py * state.window.span) };
  };
  // The chosen row nearest to the pointer, no further away than it can be seen.
  const nearRow = (row) => {
    if (open.has(row)) return row;
    const reach = Math.max(0, (3 * state.window.span) / plot.size);
    let best = null;
    for (const token of rows) if (Math.abs(token - row) <= reach && (best === null || Math.abs(token - row) < Math.abs(best - row))) best = token;
    return best;
  };
  let drag = null;
  matrix.addEventListener("pointermove", (event) => {
    const at = under(event);
    if (drag) {
      const moved = state.window.span / plot.size;
      if (Math.abs(event.clientX - drag.clientX) + Math.abs(event.clientY - drag.clientY) > 4) drag.moved = true;
      if (drag.moved && state.window.span < n) { state.window.x = drag.x - (event.clientX - drag.clientX) * moved; state.window.y = drag.y - (event.clientY - drag.clientY) * moved; clamp(); soon(drawMatrix); }
      return;
    }
    if (event.pointerType === "touch") return;
    const row = at.inside ? nearRow(at.row) : null;
    if (row === null) { if (state.over !== null) { state.over = state.overKey = null; soon(light); } return; }
    if (state.over !== row || state.overKey !== at.column) { state.over = row; state.overKey = at.column; soon(light); }
  });
  matrix.addEventListener("pointerdown", (event) => { drag = { clientX: event.clientX, clientY: event.clientY, x: state.window.x, y: state.window.y, moved: false }; });
  window.addEventListener("pointerup", (event) => {
    const was = drag;
    drag = null;
    if (!was || was.moved || event.target !== matrix) return;
    const at = under(event), row = at.inside ? nearRow(at.row) : null;
    if (row !== null) { state.query = row; state.key = Math.min(n - 1, at.column); state.over = state.overKey = null; all(); }
  });
  matrix.addEventListener("pointerleave", () => { if (state.over !== null) { state.over = state.overKey = null; soon(light); } });
  matrix.addEventListener("wheel", (event) => {
    const at = under(event);
    if (!at.inside) return;
    event.preventDefault();
    zoom(Math.exp(Math.max(-1, Math.min(1, event.deltaY / 300))), at.px, at.py);
  }, { passive: false });
  matrix.addEventListener("keydown", (event) => {
    const step = Math.max(1, state.window.span / 8);
    const move = { ArrowRight: [step, 0], ArrowLeft: [-step, 0], ArrowDown: [0, step], ArrowUp: [0, -step] }[event.key];
    if (event.key === "+" || event.key === "=") zoom(0.6);
    else if (event.key === "-") zoom(1 / 0.6);
    else if (event.key === "0") { state.window = { x: 0, y: 0, span: n }; drawMatrix(); }
    else if (event.key === "Enter") zoomPair();
    else if (move) { state.window.x += move[0]; state.window.y += move[1]; clamp(); drawMatrix(); }
    else return;
    event.preventDefault();
  });
  $("zoom-in").addEventListener("click", () => zoom(0.6));
  $("zoom-out").addEventListener("click", () => zoom(1 / 0.6));
  $("zoom-row").addEventListener("click", zoomPair);
  $("zoom-reset").addEventListener("click", () => { state.window = { x: 0, y: 0, span: n }; drawMatrix(); });

  // ---------------------------------------------------------------- the pair
  const drawPair = () => {
    const token = query(), key = keyOf(token), layer = layers[state.layer];
    const pair = layer.pair(state.head, token, key);
    const small = element("small", { textContent: `${token} \u2192 ${key}, head ${name(state.layer, state.head)}` });
    $("pair-words").replaceChildren(element("b", { textContent: label(token) }), " \u2192 ", element("strong", { textContent: label(key) }), element("br"), small);
    const entries = [];
    const entry = (title, note, value, big) => entries.push(element("dt", {}, title, ...(note ? [element("small", { textContent: note })] : [])), element("dd", { textContent: value, className: big ? "big" : "" }));
    if (!pair) entry("Weight", key > token ? "a later token, which is masked" : "masked, or outside the window", "\u2014", true);
    else {
      entry("Weight", "", pair.weight >= 1e-5 || pair.weight === 0 ? pair.weight.toFixed(5) : pair.weight.toExponential(1), true);
      entry("Raw score", "q \u00b7 k", figure(pair.raw, 3));
      entry("Scaled score", `\u00d7 ${Number(layer.scale.toPrecision(4))}`, figure(pair.scaled, 3));
      if (layer.softcap !== null) entry("Capped score", `at \u00b1${layer.softcap}`, figure(pair.capped, 3));
      if (pair.added !== null) entry("With bias", figure(pair.added, 3), figure(pair.score, 3));
      entry("Log-sum-exp", "of the row", figure(pair.lse, 3));
      if (state.scope !== "head") entry("Mean weight", scopeWords(), (attention(token)[key] || 0).toFixed(5));
    }
    $("pair-numbers").replaceChildren(...entries);
    drawBest(token, key);
    const parts = $("pair-parts");
    parts.hidden = !pair || pair.content === null;
    if (parts.hidden) return;
    const largest = Math.max(Math.abs(pair.content), Math.abs(pair.rope), 1e-9);
    const meter = (title, value, colour) => {
      const bar = element("i");
      const wide = (50 * Math.abs(value)) / largest;
      bar.style.setProperty("--w", `${wide}%`);
      bar.style.setProperty("--x", value < 0 ? "-100%" : "0");
      bar.style.setProperty("--c", `var(${colour})`);
      return element("div", { className: "meter" }, element("span", { textContent: title }), bar, element("span", { textContent: figure(value, 3) }));
    };
    parts.replaceChildren("Raw score, by the part of the key", meter("content", pair.content, "--kv0"), meter("rope", pair.rope, "--rope"));
  };

  const drawBest = (token, key) => {
    const found = [];
    for (const [l, h] of everyHead) {
      const pair = layers[l].pair(h, token, key);
      if (pair) found.push([pair.weight, l, h]);
    }
    found.sort((a, b) => b[0] - a[0]);
    $("best").replaceChildren(...found.slice(0, 8).map(([weight, l, h]) => {
      const bar = element("i");
      bar.style.width = `${(100 * weight) / Math.max(found[0][0], 1e-9)}%`;
      const button = element("button", { type: "button", title: headWords(l, h) }, element("span", { textContent: name(l, h) }), bar, element("span", { textContent: percent(weight) }));
      button.setAttribute("aria-pressed", String(l === state.layer && h === state.head));
      button.addEventListener("click", () => { state.query = token; state.key = key; state.over = state.overKey = null; pick(l, h); });
      return element("li", {}, button);
    }));
  };

  // ---------------------------------------------------------------- all layers of one token
  const acrossCanvas = $("across");
  const acrossRows = () => (state.across === "layers" ? layers.map((layer, l) => [`L${layer.index}`, layer.heads.map((_, h) => [l, h]), `l${l}`]) : layers[state.layer].heads.map((_, h) => [name(state.layer, h), [[state.layer, h]], `h${state.layer}.${h}`]));
  const acrossPlot = { left: 40, top: 0, cellX: 1, cellY: 1 };
  const drawAcross = () => {
    const token = query(), lines = acrossRows();
    $("across-title").replaceChildren("\u201c", label(token), state.across === "layers" ? "\u201d through the layers" : `\u201d in the heads of layer ${layers[state.layer].index}`);
    const width = acrossCanvas.clientWidth;
    // labels lean over the right edge
    const labelled = (width - 84) / n >= 15, room = labelled ? width - 84 : width - 44;
    acrossPlot.cellX = room / n;
    acrossPlot.top = labelled ? 74 : 4;
    acrossPlot.cellY = Math.max(9, Math.min(26, Math.floor(360 / lines.length)));
    const { left, top, cellX, cellY } = acrossPlot;
    const [draw, ratio] = fit(acrossCanvas, top + cellY * lines.length + (labelled ? 4 : 20));
    const pixels = Math.max(1, Math.round(room * ratio));
    lines.forEach(([title, pairs, id], at) => {
      const values = across(mean(pairs, token, id), 0, 0, n, pixels, 1);
      const image = draw.createImageData(pixels, 1);
      for (let px = 0; px < pixels; px++) { image.data.set(Number.isNaN(values[px]) ? colours.hidden : colours.weight[level(values[px])], 4 * px); image.data[4 * px + 3] = 255; }
      const high = Math.round((cellY - 1) * ratio);
      for (let line = 0; line < high; line++) draw.putImageData(image, Math.round(left * ratio), Math.round((top + at * cellY) * ratio) + line);
      draw.font = `${cellY < 11 ? 9 : 11}px system-ui, "Liberation Sans", sans-serif`;
      draw.textAlign = "right"; draw.textBaseline = "middle";
      const on = state.across === "layers" ? at === state.layer : at === state.head;
      draw.fillStyle = on ? colours.accent : colours.faint;
      if (cellY >= 11 || at % 2 === 0 || on) draw.fillText(title, left - 6, top + (at + 0.5) * cellY);
    });
    draw.fillStyle = colours.card;
    if (cellX >= 9) for (let at = 1; at < n; at++) draw.fillRect(left + at * cellX - 0.5, top, 1, cellY * lines.length);
    if (labelled) {
      for (let at = 0; at < n; at++) {
        draw.save(); draw.translate(left + (at + 0.5) * cellX, top - 6); draw.rotate(-Math.PI / 3.2);
        draw.textAlign = "left"; draw.textBaseline = "middle";
        draw.font = `${at === token ? "600 " : ""}12px system-ui, "Liberation Sans", sans-serif`;
        draw.fillStyle = at === token ? colours.accent : colours.text;
        draw.fillText(fitText(draw, at, 76), 0, 0); draw.restore();
      }
    } else {
      draw.fillStyle = colours.accent; draw.fillRect(left + token * cellX - 0.5, top, Math.max(1, cellX), cellY * lines.length + 5);
      draw.font = '11px system-ui, "Liberation Sans", sans-serif'; draw.fillStyle = colours.faint; draw.textBaseline = "top"; draw.textAlign = "left";
      draw.fillText("token 0", left, top + cellY * lines.length + 6); draw.textAlign = "right"; draw.fillText(String(n - 1), left + n * cellX, top + cellY * lines.length + 6);
    }
    acrossCanvas.setAttribute("aria-label", lines.map(([title, pairs, id]) => { const values = mean(pairs, token, id), best = most(values); return `${title}: ${label(best)} ${percent(values[best] || 0)}`; }).slice(0, 64).join("; "));
  };
  acrossCanvas.addEventListener("click", (event) => {
    const box = acrossCanvas.getBoundingClientRect();
    const at = Math.floor((event.clientY - box.top - acrossPlot.top) / acrossPlot.cellY);
    const key = Math.floor((event.clientX - box.left - acrossPlot.left) / acrossPlot.cellX);
    if (at < 0 || at >= acrossRows().length) return;
    if (key >= 0 && key < n) state.key = key;
    if (state.across === "layers") { state.layer = at; state.head = Math.min(state.head, layers[at].heads.length - 1); } else state.head = at;
    fillHeads(); all();
  });

  // ---------------------------------------------------------------- figures of heads
  const columns = ["layer", ...Object.keys(STATISTICS)];
  const MOST = 120;
  const buildTable = () => {
    const line = $("table").tHead.rows[0];
    line.replaceChildren(...columns.map((column) => {
      const known = STATISTICS[column];
      const button = element("button", { type: "button", textContent: known ? known.label : "Head", title: known ? `${known.help} (${known.unit})` : "By layer" });
      button.addEventListener("click", () => {
        state.down = state.order === column ? !state.down : column !== "layer";
        state.order = column;
        $("order").value = column;
        heavy();
      });
      const cell = element("th", { scope: "col" }, button);
      cell.dataset.column = column;
      return cell;
    }));
  };
  const drawTable = () => {
    for (const cell of $("table").tHead.rows[0].cells) {
      if (cell.dataset.column === state.order) cell.setAttribute("aria-sort", state.down ? "descending" : "ascending"); else cell.removeAttribute("aria-sort");
    }
    const chosen = sorted().filter(([l, h]) => passes(l, h));
    const shown = state.all ? chosen : chosen.slice(0, MOST);
    $("table").tBodies[0].replaceChildren(...shown.map(([l, h]) => {
      const button = element("button", { type: "button", textContent: name(l, h), title: headWords(l, h) });
      button.addEventListener("click", () => pick(l, h));
      const line = element("tr", {}, element("td", {}, button));
      line.dataset.head = `${l}.${h}`;
      for (const by of Object.keys(STATISTICS)) {
        const value = statistic(l, h, by);
        line.append(element("td", { textContent: STATISTICS[by].unit === "%" ? percent(value / 100) : figure(value, value < 100 ? 1 : 0) }));
      }
      line.classList.toggle("on", l === state.layer && h === state.head);
      return line;
    }));
    $("more").hidden = chosen.length <= shown.length;
    $("more").textContent = `Show all ${chosen.length}`;
  };
  const markTable = () => {
    for (const line of $("table").tBodies[0].rows) {
      const [l, h] = line.dataset.head.split(".").map(Number);
      line.classList.toggle("on", l === state.layer && h === state.head);
      line.cells[columns.length - 1].textContent = percent(statistic(l, h, "pair") / 100);
    }
  };
  $("more").addEventListener("click", () => { state.all = true; drawTable(); });

  // ---------------------------------------------------------------- ablation
  const buildAblation = () => {
    const found = data.ablation;
    if (!found) return;
    $("ablation").hidden = false;
    $("ablation-title").textContent = `Next token without ${found.heads.map((head) => head.join(".")).join(", ")}`;
    $("ablation-note").textContent = `The output of ${found.heads.length > 1 ? "these heads" : "this head"} replaced by zeros; the prediction moves by ${found.divergence === null ? "no finite number of" : found.divergence.toFixed(4)} bits (KL)`;
    const table = (title, guesses, by, other) => {
      const body = element("tbody");
      const highest = Math.max(...guesses.map((guess) => guess[by]), 1e-9);
      for (const guess of guesses) {
        const meter = element("i", { className: "meter" });
        meter.style.width = `${(100 * guess[by]) / highest}%`;
        const rank = guess[`rank_${other}`] + 1;
        const text = element("td", { title: `token ${guess.id}` });
        write(text, guess.text);
        body.append(element("tr", {}, text, element("td", {}, meter), element("td", { textContent: percent(guess[by]) }), element("td", { className: "was", textContent: `${other === "after" ? "then" : "was"} ${percent(guess[other])}, no. ${rank}` })));
      }
      return element("div", {}, element("h3", { textContent: title }), element("table", {}, body));
    };
    $("ablation-tables").append(table("With all heads", found.before, "before", "after"), table("Without", found.after, "after", "before"));
  };

  // ---------------------------------------------------------------- mechanism
  const svg = (name, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const buildMechanism = () => {
    const layer = layers[state.layer], count = layer.all_heads, kv = layer.kv_heads;
    const step = Math.max(4, Math.min(13, 190 / count)), width = count * step + 8, high = 54;
    const root = svg("svg", { width, height: high, viewBox: `0 0 ${width} ${high}`, role: "img" });
    root.setAttribute("aria-label", "Query heads above, what they read below");
    const group = count / kv, radius = Math.min(3.6, step / 2.6);
    const x = (at) => 4 + step * (at + 0.5);
    for (let at = 0; at < count; at++) {
      const which = Math.floor(at / group), colour = `var(${layer.latent || which % 2 === 0 ? "--kv0" : "--kv1"})`;
      const below = x(which * group + (group - 1) / 2);
      root.append(svg("line", { x1: x(at), y1: 9, x2: below, y2: 41, stroke: colour, "stroke-width": count > 24 ? 0.8 : 1.3, opacity: 0.7 }));
      root.append(svg("circle", { cx: x(at), cy: 8, r: radius, fill: colour }));
    }
    if (layer.latent) {
      const wide = Math.max(60, width * 0.6), left = (width - wide) / 2;
      root.append(svg("rect", { x: left, y: 38, width: wide * 0.76, height: 10, rx: 4, fill: "var(--kv0)" }));
      root.append(svg("rect", { x: left + wide * 0.79, y: 38, width: wide * 0.21, height: 10, rx: 4, fill: "var(--rope)" }));
    } else for (let at = 0; at < kv; at++) {
      const size = Math.max(3.5, Math.min(10, step * Math.min(group, 2) - 2));
      root.append(svg("rect", { x: x(at * group + (group - 1) / 2) - size / 2, y: 39, width: size, height: 9, rx: 2, fill: `var(${at % 2 === 0 ? "--kv0" : "--kv1"})` }));
    }
    $("diagram").replaceChildren(root);
    const words = layer.latent ? `${count} query heads read one cached latent of ${layer.latent[0]}, with a rope key of ${layer.latent[1]} beside it`
      : kv === count ? `${count} query heads, each with a kv head of its own`
      : kv === 1 ? `${count} query heads share one kv head` : `${count} query heads share ${kv} kv heads, ${group} to each`;
    const reach = layer.window ? `; it sees the last ${layer.window} tokens` : "";
    $("mechanism").replaceChildren(element("b", { textContent: layer.mechanism }), words + reach);
  };

  // ---------------------------------------------------------------- controls
  const radios = (id, attribute, get, set) => {
    const buttons = [...$(id).querySelectorAll("button")];
    const mark = () => buttons.forEach((button) => {
      const on = button.dataset[attribute] === get();
      button.setAttribute("aria-checked", String(on));
      button.tabIndex = on ? 0 : -1;
    });
    buttons.forEach((button, at) => {
      button.addEventListener("click", () => { set(button.dataset[attribute]); mark(); });
      button.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (!step) return;
        event.preventDefault();
        const next = buttons[(at + step + buttons.length) % buttons.length];
        next.focus(); next.click();
      });
    });
    mark();
    return mark;
  };
  const options = (select, entries, chosen) => {
    select.replaceChildren(...entries.map(([value, text]) => element("option", { value, textContent: text })));
    select.value = chosen;
  };
  const fillHeads = () => {
    $("layer").value = String(state.layer);
    options($("head"), layers[state.layer].heads.map((head, h) => [String(h), String(head)]), String(state.head));
  };
  const setLayer = (l) => { state.layer = l; state.head = Math.min(state.head, layers[l].heads.length - 1); fillHeads(); all(); };
  const setHead = (h) => { state.head = h; fillHeads(); all(); };
  const marks = [
    radios("scope", "scope", () => state.scope, (value) => { state.scope = value; all(); }),
    radios("pooled", "pool", () => state.pool, (value) => { state.pool = value; buildGrid(); drawMatrix(); }),
    radios("part", "part", () => state.part, (value) => { state.part = value; drawMatrix(); }),
    radios("across-rows", "rows", () => state.across, (value) => { state.across = value; drawAcross(); }),
  ];
  options($("layer"), layers.map((layer, l) => [String(l), String(layer.index)]), String(state.layer));
  $("layer").addEventListener("change", (event) => setLayer(Number(event.target.value)));
  $("head").addEventListener("change", (event) => setHead(Number(event.target.value)));
  options($("order"), [["layer", "by layer"], ...Object.entries(STATISTICS).map(([key, { label }]) => [key, label.toLowerCase()])], state.order);
  $("order").addEventListener("change", (event) => { state.order = event.target.value; state.down = state.order !== "layer"; heavy(); });
  options($("filter-by"), Object.entries(STATISTICS).map(([key, { label, unit }]) => [key, `${label.toLowerCase()} (${unit})`]), state.by);
  const filter = () => {
    state.by = $("filter-by").value;
    state.side = $("filter-side").value;
    state.value = $("filter-value").value === "" ? null : Number($("filter-value").value);
    heavy();
  };
  for (const id of ["filter-by", "filter-side"]) $(id).addEventListener("change", filter);
  $("filter-value").addEventListener("input", filter);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const count = layers[state.layer].heads.length;
    if (event.key === "[") setLayer((state.layer + layers.length - 1) % layers.length);
    else if (event.key === "]") setLayer((state.layer + 1) % layers.length);
    else if (event.key === ",") setHead((state.head + count - 1) % count);
    else if (event.key === ".") setHead((state.head + 1) % count);
    else return;
    event.preventDefault();
  });

  // ---------------------------------------------------------------- export
  const download = (ending, blob) => {
    const link = element("a", { href: URL.createObjectURL(blob), download: `attention-${state.scope === "all" ? "all" : name(state.layer, state.head)}.${ending}` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  // The matrix as it is shown, under its title: what both forms of the picture hold.
  const picture = () => {
    const ratio = window.devicePixelRatio || 1, pad = 24 * ratio;
    const canvas = element("canvas", { width: matrix.width + 2 * pad, height: matrix.height + 2 * pad + 30 * ratio });
    const draw = canvas.getContext("2d");
    draw.fillStyle = colours.card; draw.fillRect(0, 0, canvas.width, canvas.height);
    draw.fillStyle = colours.ink; draw.font = `600 ${15 * ratio}px system-ui, "Liberation Sans", sans-serif`; draw.textBaseline = "top";
    draw.fillText(`${plain(data.model)}, head ${name(state.layer, state.head)}`, pad, pad * 0.8);
    draw.drawImage(matrix, pad, pad + 30 * ratio);
    return canvas;
  };
  $("export-png").addEventListener("click", () => picture().toBlob((blob) => download("png", blob), "image/png"));
  $("export-svg").addEventListener("click", () => {
    const canvas = picture(), ratio = window.devicePixelRatio || 1;
    const size = { width: canvas.width / ratio, height: canvas.height / ratio };
    const root = svg("svg", { xmlns: "http://www.w3.org/2000/svg", ...size, viewBox: `0 0 ${size.width} ${size.height}`, role: "img" });
    const title = svg("title", {});
    title.textContent = `${plain(data.model)}, head ${name(state.layer, state.head)}`;
    root.append(title, svg("image", { ...size, href: canvas.toDataURL("image/png") }));
    download("svg", new Blob([new XMLSerializer().serializeToString(root)], { type: "image/svg+xml" }));
  });
  $("export-json").addEventListener("click", () => {
    const token = query();
    const content = {
      model: data.model, token, text: data.tokens[token].text, weights_of: scopeWords(),
      attends_to: Array.from(attention(token), (weight, at) => ({ token: at, text: data.tokens[at].text, weight: Number.isNaN(weight) ? null : weight })),
    };
    download("json", new Blob([JSON.stringify(content, null, 1)], { type: "application/json" }));
  });
  const setTheme = (theme) => { document.documentElement.dataset.theme = theme; palette(); };
  $("theme").addEventListener("click", () => {
    setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    buildGrid(); all();
  });

  // ---------------------------------------------------------------- drawing
  let pending = new Set();
  const soon = (work) => {
    if (pending.size === 0) requestAnimationFrame(() => { const now = pending; pending = new Set(); for (const each of now) each(); });
    pending.add(work);
  };
  // While the pointer is over something: what depends on the token and the pair alone.
  const light = () => { drawText(); drawPair(); drawAcross(); drawMatrix(); };
  // After a choice: also what marks it.
  const all = () => {
    marks.forEach((mark) => mark());
    const layer = layers[state.layer];
    $("matrix-title").textContent = `Head ${name(state.layer, state.head)}`;
    $("part").hidden = layer.latent === null;
    if (layer.latent === null) state.part = "weight";
    buildMechanism();
    light();
    if (state.order === "pair" || (state.by === "pair" && state.value !== null)) heavy(); else { markGrid(); markTable(); }
    remember();
  };
  const heavy = () => { buildGrid(); drawTable(); };

  document.title = `${plain(data.model)} \u2013 headwise view`;
  $("model").textContent = plain(data.model);
  const made = data.tokens.length - data.prompt;
  const broken = data.not_numbers.length ? ` \u00b7 weights are NaN in ${data.not_numbers.length} heads, first ${data.not_numbers[0].join(".")}` : "";
  $("facts").textContent = `${n.toLocaleString("en")} tokens${made ? `, ${made} of them decoded` : ""} \u00b7 ${layers.length} layers \u00b7 ${everyHead.length} heads \u00b7 ${data.dtype}${broken}`;
  $("pooled").hidden = !anyPooled;
  $("heads-note").textContent = data.overview ? "Means over all tokens" : `Means over ${rows.length} tokens`;
  setTheme(asked.get("theme") === "dark" || (asked.get("theme") !== "light" && matchMedia("(prefers-color-scheme: dark)").matches) ? "dark" : "light");
  buildText();
  buildTable();
  fillHeads();
  buildAblation();
  heavy();
  all();
  if (n > 120) {
    spans[state.query].scrollIntoView({ block: "center" });
    scrollTo(0, 0); // the text is to scroll, and not the page
  }
  let width = 0;
  new ResizeObserver(() => { if (innerWidth !== width) { width = innerWidth; soon(() => { buildGrid(); light(); }); } }).observe(document.body);
})();
