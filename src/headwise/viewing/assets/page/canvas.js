// Drawing on a canvas: its size in pixels, its text, and rows of numbers as rows of pixels.

/** @param {HTMLCanvasElement} canvas */
export const pen = (canvas) => {
  const draw = canvas.getContext("2d");
  if (draw === null) throw new TypeError("this browser does not draw on a canvas");
  return draw;
};

export const ratio = () => window.devicePixelRatio || 1;

/** @param {number} size in pixels of the page @param {boolean} [bold] */
export const font = (size, bold = false) =>
  `${bold ? "600 " : ""}${size}px system-ui, "Liberation Sans", sans-serif`;

/** Clears the canvas, in its own width and this height, and gives what draws on it.
 * @param {HTMLCanvasElement} canvas @param {number} height */
export const fit = (canvas, height) => {
  const wide = Math.round(canvas.clientWidth * ratio());
  const high = Math.round(height * ratio());
  if (canvas.width !== wide || canvas.height !== high) {
    canvas.width = wide;
    canvas.height = high;
    canvas.style.height = `${height}px`;
  }
  const draw = pen(canvas);
  draw.setTransform(ratio(), 0, 0, ratio(), 0, 0);
  draw.clearRect(0, 0, canvas.clientWidth, height);
  return draw;
};

/** The text, or as much of its beginning as there is room for.
 * @param {CanvasRenderingContext2D} draw @param {string} text @param {number} room */
export const shortened = (draw, text, room) => {
  if (draw.measureText(text).width <= room) return text;
  const marks = Array.from(text);
  while (marks.length > 1 && draw.measureText(`${marks.join("")}\u2026`).width > room) marks.pop();
  return `${marks.join("")}\u2026`;
};

/**
 * Numbers of one row as `pixels` pixels, each the largest of what it covers; NaN where nothing is.
 *
 * @param {Float32Array} values each `size` tokens wide, from token `start` * `size` on
 * @param {number} start
 * @param {number} from the token at the left edge
 * @param {number} span how many tokens there is room for
 * @param {number} pixels
 * @param {number} size
 */
export const pixelRow = (values, start, from, span, pixels, size) => {
  const row = new Float32Array(pixels).fill(NaN);
  for (let pixel = 0; pixel < pixels; pixel++) {
    const first = Math.floor((from + (pixel * span) / pixels) / size);
    const end = Math.ceil((from + ((pixel + 1) * span) / pixels) / size - 1e-6);
    for (let index = first; index < Math.max(first + 1, end); index++) {
      const value = values[index - start];
      if (value === undefined || Number.isNaN(value) || row[pixel] >= value) continue;
      if (!(Math.abs(value) <= Math.abs(row[pixel]))) row[pixel] = value;
    }
  }
  return row;
};

/** Sets one pixel.
 * @param {ImageData} image @param {number} index of the pixel
 * @param {number[]} colour red, green and blue */
export const paint = ({ data }, index, colour) => {
  data[4 * index] = colour[0];
  data[4 * index + 1] = colour[1];
  data[4 * index + 2] = colour[2];
  data[4 * index + 3] = 255;
};
