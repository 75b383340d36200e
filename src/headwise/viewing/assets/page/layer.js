// One layer's attention, unpacked: scores, weights and pooled squares, as Python's LayerView has them.

/**
 * What Python says of a layer with h heads, of whose n tokens r have their rows in full.
 *
 * @typedef {object} LayerFields
 * @property {number} index
 * @property {string} mechanism
 * @property {number} all_heads
 * @property {number} kv_heads
 * @property {number[]} kv_head_of for each of the h heads
 * @property {[number, number] | null} latent the latent's rank and the rope key's dims, for MLA
 * @property {number} scale
 * @property {number | null} softcap
 * @property {number | null} window
 * @property {number[]} heads the indices of the h heads
 * @property {number[]} rows the tokens of the r rows
 * @property {[number, number][]} spans the keys from and to which each row reaches
 * @property {string} raw q.k of each head, row and key in its span: float32, base64, NaN if hidden
 * @property {string | null} added what the model adds to a score after scale and cap, in that form
 * @property {string | null} content the part of raw that comes from the content, for MLA
 * @property {string} lse the log-sum-exp of each head and row
 * @property {number[][]} stats [h, statistics]
 * @property {number} tile tokens at the side of a pooled square
 * @property {Tiles | null} tiles null where the page pools the rows itself
 */
/** @typedef {{ side: number, lower: boolean, max: Fractions, mean: Fractions }} Tiles */
/** @typedef {{ peak: number[], data: string }} Fractions 16-bit fractions of each head's peak */
/** @typedef {"max" | "mean"} Pooling */
/** @typedef {"weight" | "content" | "rope"} Part */
/** @typedef {{ side: number, tile: number, peak: number, values: Float32Array }} Squares */

/** @param {string} text base64 */
const bytes = (text) => {
  const raw = atob(text);
  const values = new Uint8Array(raw.length);
  for (let index = 0; index < raw.length; index++) values[index] = raw.charCodeAt(index);
  return values.buffer;
};

/** @param {string | null} text */
const floats = (text) => (text === null ? null : new Float32Array(bytes(text)));

/** @param {Fractions} fractions */
const unpacked = ({ peak, data }) => ({ peak, fractions: new Uint16Array(bytes(data)) });

export class Layer {
  #raw;
  #added;
  #content;
  #lse;
  #size = 0;
  /** @type {number[]} */
  #offsets = [];
  /** @type {Map<number, number>} */
  #rowOf;
  /** @type {Map<string, Squares | null>} */
  #pooled = new Map();
  #total;

  /**
   * @param {LayerFields} fields
   * @param {number} total how many tokens there are
   */
  constructor(fields, total) {
    this.index = fields.index;
    this.mechanism = fields.mechanism;
    this.allHeads = fields.all_heads;
    this.kvHeads = fields.kv_heads;
    this.kvHeadOf = fields.kv_head_of;
    this.latent = fields.latent;
    this.scale = fields.scale;
    this.softcap = fields.softcap;
    this.window = fields.window;
    this.heads = fields.heads;
    this.rows = fields.rows;
    this.spans = fields.spans;
    this.statistics = fields.stats;
    this.tile = fields.tile;
    this.tiles = fields.tiles && {
      ...fields.tiles,
      max: unpacked(fields.tiles.max),
      mean: unpacked(fields.tiles.mean),
    };
    this.#total = total;
    this.#raw = new Float32Array(bytes(fields.raw));
    this.#added = floats(fields.added);
    this.#content = floats(fields.content);
    this.#lse = new Float32Array(bytes(fields.lse));
    this.#rowOf = new Map(fields.rows.map((token, row) => [token, row]));
    for (const [start, stop] of fields.spans) {
      this.#offsets.push(this.#size);
      this.#size += stop - start;
    }
  }

  /** @param {number} scaled */
  #capped(scaled) {
    return this.softcap === null ? scaled : this.softcap * Math.tanh(scaled / this.softcap);
  }

  /** What enters the softmax.
   * @param {number} index of a head's, row's and key's number */
  #score(index) {
    return this.#capped(this.#raw[index] * this.scale) + (this.#added?.[index] ?? 0);
  }

  /** The index of the first number of a head's row.
   * @param {number} head @param {number} row */
  #first(head, row) {
    return head * this.#size + this.#offsets[row];
  }

  /** The row of a token that has one.
   * @param {number} token */
  rowOf(token) {
    const row = this.#rowOf.get(token);
    if (row === undefined) throw new RangeError(`the weights of token ${token} are not kept`);
    return row;
  }

  /** One pair: what q.k is, and what becomes of it; null where the row does not have such a key.
   * @param {number} head @param {number} token @param {number} key */
  pair(head, token, key) {
    const row = this.#rowOf.get(token);
    if (row === undefined) return null;
    const [start, stop] = this.spans[row];
    if (key < start || key >= stop) return null;
    const index = this.#first(head, row) + key - start;
    const raw = this.#raw[index];
    if (Number.isNaN(raw)) return null;
    const scaled = raw * this.scale;
    const score = this.#score(index);
    const lse = this.#lse[head * this.rows.length + row];
    const content = this.#content?.[index] ?? null;
    return {
      raw,
      scaled,
      capped: this.#capped(scaled),
      added: this.#added?.[index] ?? null,
      score,
      lse,
      weight: Number.isFinite(lse) ? Math.exp(score - lse) : 0,
      content,
      rope: content === null ? null : raw - content,
    };
  }

  /** A row of a head, from its span's first key on: weights, or a part of q.k; NaN where hidden.
   * @param {number} head @param {number} row @param {Part} part */
  row(head, row, part) {
    const [start, stop] = this.spans[row];
    const first = this.#first(head, row);
    const values = new Float32Array(stop - start);
    if (part === "weight") {
      const lse = this.#lse[head * this.rows.length + row];
      if (!Number.isFinite(lse)) return values.fill(NaN);
      return values.map((_, key) => Math.exp(this.#score(first + key) - lse));
    }
    const content = this.#content;
    if (content === null) return values.fill(NaN);
    if (part === "content") return content.slice(first, first + values.length);
    return values.map((_, key) => this.#raw[first + key] - content[first + key]);
  }

  /** A head's weights in squares, NaN where nothing can be seen; null where there are none.
   * @param {number} head @param {Pooling} pooling */
  pooled(head, pooling) {
    const name = `${pooling}${head}`;
    if (!this.#pooled.has(name)) this.#pooled.set(name, this.#squares(head, pooling));
    return this.#pooled.get(name) ?? null;
  }

  /** @param {number} head @param {Pooling} pooling @returns {Squares | null} */
  #squares(head, pooling) {
    if (this.tiles) return this.#ofTiles(this.tiles, head, pooling);
    const side = this.#total;
    if (this.rows.length < side) return null;
    const values = new Float32Array(side * side).fill(NaN);
    this.rows.forEach((token, row) => {
      values.set(this.row(head, row, "weight"), token * side + this.spans[row][0]);
    });
    return { side, tile: 1, peak: 1, values };
  }

  /** @param {NonNullable<Layer["tiles"]>} tiles @param {number} head @param {Pooling} pooling */
  #ofTiles(tiles, head, pooling) {
    const { side, lower } = tiles;
    const { peak, fractions } = tiles[pooling];
    const values = new Float32Array(side * side).fill(NaN);
    let index = head * (lower ? (side * (side + 1)) / 2 : side * side);
    for (let y = 0; y < side; y++) {
      for (let x = 0; x < (lower ? y + 1 : side); x++) {
        values[y * side + x] = (fractions[index++] / 65535) * peak[head];
      }
    }
    return { side, tile: this.tile, peak: peak[head], values };
  }
}

/**
 * What a token attends to, [n], in the mean of some heads; NaN where none of them can see.
 *
 * @param {[Layer, number][]} heads
 * @param {number} token
 * @param {number} total
 */
export const meanWeights = (heads, token, total) => {
  const sum = new Float32Array(total).fill(NaN);
  for (const [layer, head] of heads) {
    const row = layer.rowOf(token);
    const start = layer.spans[row][0];
    layer.row(head, row, "weight").forEach((weight, offset) => {
      if (Number.isNaN(weight)) return;
      const before = sum[start + offset];
      sum[start + offset] = (Number.isNaN(before) ? 0 : before) + weight / heads.length;
    });
  }
  return sum;
};
