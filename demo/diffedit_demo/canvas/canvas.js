// The mask canvas. Gradio runs this file as the body of a function of `element`, `trigger`,
// `props`, `upload` and `watch`, once for each time that the component is put on the page.
//
// Three spaces, never mixed: the screen (CSS pixels), the surface (pixels of the shown copy, at most
// 2048 on its longer side; masks live here) and the original (its size is only told, never drawn).
//
// Masks are bytes of our own, not canvases: 0 = stays, 255 = may change. Edges are hard, so that
// erasing what was painted leaves nothing behind (an antialiased edge would leave a ring), and no
// browser's colour management or canvas noise reaches the mask.

/**
 * @typedef {{x: number, y: number}} Point
 * @typedef {{left: number, top: number, right: number, bottom: number}} Box pixels, half open
 * @typedef {{data: Uint8Array, width: number, height: number}} Raster
 * @typedef {{kind: "stroke", value: number, points: number[]}} Stroke points: x, y, radius, x, …
 * @typedef {{kind: "polygon", value: number, points: number[]}} Polygon points: x, y, x, …
 * @typedef {{kind: "box", value: number, box: Box}} Rectangle
 * @typedef {{kind: "invert"}} Invert
 * @typedef {{kind: "image", packed: Packed}} Image
 * @typedef {(Stroke | Polygon | Rectangle | Invert | Image) & {cost?: number}} Action
 * @typedef {{lengths: Uint32Array, values: Uint8Array} | {raw: Uint8Array}} Packed
 */

const LAYERS = ["A", "B", "C", "D"];
/** Red, green, blue of each layer; its pattern is in `inPattern`. */
const COLOURS = { A: [229, 72, 77], B: [0, 120, 230], C: [48, 150, 90], D: [142, 78, 198] };
const TOOLS = ["brush", "eraser", "rectangle", "lasso"];
/** At least so many steps can be undone; up to `SLACK` more are kept before the oldest are folded. */
const HISTORY = 100;
const SLACK = 28;
/** A snapshot is taken once replaying would test so many pixels (some 50 ms). */
const REPLAY_WORK = 2e7;
const SNAPSHOTS = 16;
const MAX_SIZE = 512;
const MAX_ZOOM = 32;
/** The fading edge is computed on a grid of at most so many cells a side. */
const FEATHER_SIDE = 512;
const PICTURE_NAMES = /\.(avif|bmp|gif|heic|heif|jfif|jpe?g|jp2|png|tiff?|webp)$/i;
const TEXT_FIELDS =
  "textarea, select, [contenteditable]:not([contenteditable=false]), [role=textbox], " +
  "input:not([type=range], [type=checkbox], [type=radio], [type=button], [type=file], [type=color])";

// ---------------------------------------------------------------------------------------- rasters

/**
 * The part of a box that lies on the raster, in whole pixels; null if none does.
 * @param {Raster} raster
 * @returns {Box | null}
 */
function clipped(raster, left, top, right, bottom) {
  const box = {
    left: Math.max(0, Math.floor(left)),
    top: Math.max(0, Math.floor(top)),
    right: Math.min(raster.width, Math.ceil(right)),
    bottom: Math.min(raster.height, Math.ceil(bottom)),
  };
  return box.left < box.right && box.top < box.bottom ? box : null;
}

/**
 * @param {Box | null} a
 * @param {Box | null} b
 * @returns {Box | null}
 */
function joined(a, b) {
  if (!a || !b) return a ?? b;
  return {
    left: Math.min(a.left, b.left),
    top: Math.min(a.top, b.top),
    right: Math.max(a.right, b.right),
    bottom: Math.max(a.bottom, b.bottom),
  };
}

/** @param {Box | null} box */
const area = (box) => (box ? (box.right - box.left) * (box.bottom - box.top) : 0);

/**
 * Set every pixel whose centre is at most the brush's radius from the segment.
 * @param {Raster} raster
 * @returns {Box | null} what was looked at
 */
function drawSegment({ data, width, height }, value, x0, y0, r0, x1, y1, r1) {
  const reach = Math.max(r0, r1);
  const box = clipped(
    { data, width, height },
    Math.min(x0, x1) - reach,
    Math.min(y0, y1) - reach,
    Math.max(x0, x1) + reach,
    Math.max(y0, y1) + reach,
  );
  if (!box) return null;
  const dx = x1 - x0;
  const dy = y1 - y0;
  const square = dx * dx + dy * dy || 1;
  for (let y = box.top; y < box.bottom; y++) {
    const py = y + 0.5 - y0;
    for (let x = box.left; x < box.right; x++) {
      const px = x + 0.5 - x0;
      const along = Math.min(1, Math.max(0, (px * dx + py * dy) / square));
      const ex = px - along * dx;
      const ey = py - along * dy;
      const radius = r0 + (r1 - r0) * along;
      if (ex * ex + ey * ey <= radius * radius) data[y * width + x] = value;
    }
  }
  return box;
}

/**
 * Draw a stroke from one of its points on: a single point is a dot.
 * @param {Raster} raster
 * @param {Stroke} stroke
 */
function drawStroke(raster, { value, points }, from = 0) {
  let touched = null;
  for (let i = from; i < points.length; i += 3) {
    const before = Math.max(0, i - 3);
    const [x0, y0, r0] = points.slice(before, before + 3);
    const [x1, y1, r1] = points.slice(i, i + 3);
    touched = joined(touched, drawSegment(raster, value, x0, y0, r0, x1, y1, r1));
  }
  return touched;
}

/**
 * Where a horizontal line crosses a closed polygon, from left to right, with the direction.
 * @param {number[]} points
 */
function crossings(points, y) {
  const found = [];
  for (let i = 0; i < points.length; i += 2) {
    const next = (i + 2) % points.length;
    const [x0, y0, x1, y1] = [points[i], points[i + 1], points[next], points[next + 1]];
    if (y0 <= y === y1 <= y) continue;
    found.push({ x: x0 + ((y - y0) * (x1 - x0)) / (y1 - y0), turn: y0 < y1 ? 1 : -1 });
  }
  return found.sort((a, b) => a.x - b.x);
}

/**
 * Set every pixel whose centre the polygon winds around.
 * @param {Raster} raster
 * @param {Polygon} polygon
 */
function drawPolygon(raster, { value, points }) {
  const xs = points.filter((_, i) => i % 2 === 0);
  const ys = points.filter((_, i) => i % 2 === 1);
  const box = clipped(raster, Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys));
  for (let y = box?.top ?? 0; y < (box?.bottom ?? 0); y++) {
    let winding = 0;
    let start = 0;
    for (const { x, turn } of crossings(points, y + 0.5)) {
      const pixel = Math.min(box.right, Math.max(box.left, Math.ceil(x - 0.5)));
      if (winding !== 0) raster.data.fill(value, y * raster.width + start, y * raster.width + pixel);
      winding += turn;
      start = pixel;
    }
  }
  return box;
}

/**
 * @param {Raster} raster
 * @param {Rectangle} rectangle
 */
function drawBox(raster, { value, box }) {
  const inside = clipped(raster, box.left, box.top, box.right, box.bottom);
  for (let y = inside?.top ?? 0; y < (inside?.bottom ?? 0); y++) {
    raster.data.fill(value, y * raster.width + inside.left, y * raster.width + inside.right);
  }
  return inside;
}

/** @param {Raster} raster */
const whole = (raster) => ({ left: 0, top: 0, right: raster.width, bottom: raster.height });

/**
 * @param {Raster} raster
 * @param {Action} action
 * @returns {Box | null} the part that may have changed
 */
function draw(raster, action) {
  if (action.kind === "stroke") return drawStroke(raster, action);
  if (action.kind === "polygon") return drawPolygon(raster, action);
  if (action.kind === "box") return drawBox(raster, action);
  if (action.kind === "image") unpack(action.packed, raster.data);
  else for (let i = 0; i < raster.data.length; i++) raster.data[i] = 255 - raster.data[i];
  return whole(raster);
}

/**
 * A mask as runs of equal bytes, or as it is where runs would be no smaller.
 * @param {Uint8Array} data
 * @returns {Packed}
 */
function pack(data) {
  let runs = 1;
  for (let i = 1; i < data.length; i++) if (data[i] !== data[i - 1]) runs++;
  if (runs > data.length / 8) return { raw: data.slice() };
  const lengths = new Uint32Array(runs);
  const values = new Uint8Array(runs);
  let run = 0;
  let start = 0;
  for (let i = 1; i <= data.length; i++) {
    if (i < data.length && data[i] === data[i - 1]) continue;
    lengths[run] = i - start;
    values[run++] = data[start];
    start = i;
  }
  return { lengths, values };
}

/**
 * @param {Packed} packed
 * @param {Uint8Array} data
 */
function unpack(packed, data) {
  if ("raw" in packed) return data.set(packed.raw);
  let at = 0;
  packed.lengths.forEach((length, i) => data.fill(packed.values[i], at, (at += length)));
}

/** One mask: its pixels, what was done to it, and whether the server has it. */
class Layer {
  constructor(width, height) {
    /** @type {Raster} */
    this.raster = { data: new Uint8Array(width * height), width, height };
    /** @type {Action[]} */
    this.actions = [];
    this.done = 0;
    /** @type {Map<number, Packed>} after how many actions -> the pixels then; 0 is always there */
    this.snapshots = new Map([[0, pack(this.raster.data)]]);
    /** Counts changes; `sent` is the version that the server has. */
    this.version = 0;
    this.sent = 0;
    this.file = null;
    this.measure();
  }

  /** Look at the pixels again after a change: the masked share and whether there is any. */
  measure() {
    const { data } = this.raster;
    let sum = 0;
    for (let i = 0; i < data.length; i++) sum += data[i];
    this.share = data.length ? sum / 255 / data.length : 0;
    this.painted = sum > 0;
  }

  /** Note an action; `drawn` says what it touched if its pixels are there already. */
  commit(action, drawn = draw(this.raster, action)) {
    this.actions.length = this.done;
    for (const at of [...this.snapshots.keys()]) if (at > this.done) this.snapshots.delete(at);
    this.actions.push(action);
    this.done++;
    action.cost = action.kind === "stroke" ? (action.points.length / 3) * dab(action) : area(drawn);
    if (this.replayCost() > REPLAY_WORK) this.remember();
    if (this.actions.length > HISTORY + SLACK) this.fold(SLACK);
    this.changed();
    return drawn;
  }

  changed() {
    this.version++;
    this.measure();
  }

  /** After how many actions the last snapshot up to there was taken. */
  snapshotBefore(count) {
    return Math.max(...[...this.snapshots.keys()].filter((at) => at <= count));
  }

  /** Pixels that going back here would test. */
  replayCost() {
    const redone = this.actions.slice(this.snapshotBefore(this.done), this.done);
    return redone.reduce((sum, { cost }) => sum + cost, 0);
  }

  remember() {
    this.snapshots.set(this.done, pack(this.raster.data));
    if (this.snapshots.size <= SNAPSHOTS) return;
    [...this.snapshots.keys()].forEach((at, i) => i % 2 && this.snapshots.delete(at));
  }

  /** Forget the oldest actions: their outcome becomes the ground that all others stand on. */
  fold(count) {
    const ground = this.pixelsAfter(count);
    const kept = [...this.snapshots].filter(([at]) => at > count);
    this.snapshots = new Map([[0, pack(ground)], ...kept.map(([at, packed]) => [at - count, packed])]);
    this.actions.splice(0, count);
    this.done -= count;
  }

  /** The pixels after so many actions, from the last snapshot before. */
  pixelsAfter(count) {
    const from = this.snapshotBefore(count);
    const raster = { ...this.raster, data: new Uint8Array(this.raster.data.length) };
    unpack(this.snapshots.get(from), raster.data);
    for (const action of this.actions.slice(from, count)) draw(raster, action);
    return raster.data;
  }

  /** Go to the state after so many actions; also takes back a stroke that was not committed. */
  go(count) {
    this.raster.data.set(this.pixelsAfter(count));
    this.done = count;
    this.changed();
  }
}

/** Pixels that one step of a stroke tests, about. */
const dab = ({ points }) => (2 * (points[2] ?? 1) + 4) ** 2;

// -------------------------------------------------------------------------------------- PNG files

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

/** @param {Uint8Array} bytes */
function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = CRC_TABLE[(crc ^ byte) & 255] ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}

/**
 * @param {string} type four letters
 * @param {Uint8Array} content
 */
function pngChunk(type, content) {
  const chunk = new Uint8Array(content.length + 12);
  const view = new DataView(chunk.buffer);
  view.setUint32(0, content.length);
  chunk.set(new TextEncoder().encode(type), 4);
  chunk.set(content, 8);
  view.setUint32(content.length + 8, crc32(chunk.subarray(4, content.length + 8)));
  return chunk;
}

/**
 * An 8-bit grey PNG. A canvas would write four channels, and some browsers add noise to what is
 * read from one.
 * @param {Raster} raster copied before the first wait
 * @returns {Promise<Blob>}
 */
async function greyPng({ data, width, height }) {
  const rows = new Uint8Array((width + 1) * height);
  for (let y = 0; y < height; y++) {
    rows.set(data.subarray(y * width, (y + 1) * width), y * (width + 1) + 1);
  }
  const head = new Uint8Array(13);
  new DataView(head.buffer).setUint32(0, width);
  new DataView(head.buffer).setUint32(4, height);
  head[8] = 8;
  const zlib = new Blob([rows]).stream().pipeThrough(new CompressionStream("deflate"));
  const body = new Uint8Array(await new Response(zlib).arrayBuffer());
  const signature = new Uint8Array([137, 80, 78, 71, 13, 10, 26, 10]);
  const end = pngChunk("IEND", new Uint8Array());
  return new Blob([signature, pngChunk("IHDR", head), pngChunk("IDAT", body), end], {
    type: "image/png",
  });
}

/**
 * A picture file as a mask: luminance (Rec. 601) on black, stretched to the surface.
 * @param {Blob} file
 * @returns {Promise<Uint8Array>}
 */
async function luminance(file, width, height) {
  const bitmap = await createImageBitmap(file);
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  const { data } = context.getImageData(0, 0, width, height);
  return Uint8Array.from({ length: width * height }, (_, i) =>
    Math.round(0.299 * data[4 * i] + 0.587 * data[4 * i + 1] + 0.114 * data[4 * i + 2]),
  );
}

// ------------------------------------------------------------------------------- the fading edge

/**
 * One row or column of squared distances to the nearest zero (Felzenszwalb and Huttenlocher 2012).
 * @param {Float64Array} row changed in place
 */
function squaredDistances(row, length, hulls, bounds, out) {
  let last = 0;
  hulls[0] = 0;
  bounds[0] = -Infinity;
  bounds[1] = Infinity;
  for (let q = 1; q < length; q++) {
    let meet = -Infinity;
    for (; last >= 0; last--) {
      const p = hulls[last];
      meet = (row[q] + q * q - row[p] - p * p) / (2 * (q - p));
      if (meet > bounds[last]) break;
    }
    last++;
    hulls[last] = q;
    bounds[last] = last ? meet : -Infinity;
    bounds[last + 1] = Infinity;
  }
  for (let q = 0, k = 0; q < length; q++) {
    while (bounds[k + 1] < q) k++;
    out[q] = (q - hulls[k]) ** 2 + row[hulls[k]];
  }
  row.set(out.subarray(0, length));
}

/**
 * How far each cell is from the nearest masked one, in cells, squared.
 * @param {Uint8Array} solid 1 = masked
 */
function distanceField(solid, width, height) {
  const far = (width + height) ** 2;
  const field = Float64Array.from(solid, (cell) => (cell ? 0 : far));
  const side = Math.max(width, height);
  const spare = [new Uint32Array(side + 1), new Float64Array(side + 2), new Float64Array(side)];
  const column = new Float64Array(height);
  for (let x = 0; x < width; x++) {
    for (let y = 0; y < height; y++) column[y] = field[y * width + x];
    squaredDistances(column, height, ...spare);
    for (let y = 0; y < height; y++) field[y * width + x] = column[y];
  }
  for (let y = 0; y < height; y++) {
    squaredDistances(field.subarray(y * width, (y + 1) * width), width, ...spare);
  }
  return field;
}

/** 1 at the mask's edge, 0 from `reach` on, smooth between. */
function fade(distance, reach) {
  const t = Math.min(1, distance / reach);
  return 1 - t * t * (3 - 2 * t);
}

/**
 * Show the fading edge of a layer on a canvas (coarser than the surface where that is large).
 * @param {HTMLCanvasElement} canvas
 * @param {Layer} layer
 * @param {number} reach in surface pixels
 * @param {number[]} colour
 */
function drawFeather(canvas, layer, reach, colour) {
  const { data, width, height } = layer.raster;
  const step = Math.max(1, Math.ceil(Math.max(width, height) / FEATHER_SIDE));
  canvas.width = Math.ceil(width / step);
  canvas.height = Math.ceil(height / step);
  if (!layer.painted || reach <= 0) return;
  const solid = new Uint8Array(canvas.width * canvas.height);
  for (let y = 0; y < height; y++) {
    const row = Math.floor(y / step) * canvas.width;
    for (let x = 0; x < width; x++) if (data[y * width + x] > 127) solid[row + Math.floor(x / step)] = 1;
  }
  const field = distanceField(solid, canvas.width, canvas.height);
  const image = new ImageData(canvas.width, canvas.height);
  const nearby = (reach / step) ** 2;
  for (let i = 0; i < field.length; i++) {
    if (solid[i] || field[i] >= nearby) continue;
    image.data.set(colour, 4 * i);
    image.data[4 * i + 3] = Math.round(140 * fade(Math.sqrt(field[i]) * step, reach));
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// --------------------------------------------------------------------------------- showing layers

/** Whether a layer's pattern is set at a place in its tile: what tells layers apart without colour. */
function inPattern(name, x, y, period) {
  const half = period / 2;
  if (name === "A") return (x + y) % period < half;
  if (name === "B") return (x - y + period) % period < half;
  if (name === "C") return (x - half) ** 2 + (y - half) ** 2 < (0.36 * period) ** 2;
  return y % period < half;
}

/** Colours of a layer for every value, in the pattern and between it, as ImageData's words. */
function palette(name, active) {
  const [red, green, blue] = COLOURS[name];
  const words = new Uint32Array(512);
  const bytes = new Uint8Array(words.buffer);
  for (let i = 0; i < 512; i++) {
    const opacity = (i < 256 ? 0.34 : 0.66) * (active ? 1 : 0.6);
    bytes.set([red, green, blue, Math.round((i % 256) * opacity)], 4 * i);
  }
  return words;
}

/**
 * Redraw a part of the layers: the active one hides the others.
 * @param {CanvasRenderingContext2D} context
 * @param {[string, Layer][]} layers topmost last
 * @param {Box} box
 * @param {number} period of the patterns, in surface pixels
 */
function compose(context, layers, box, period) {
  const width = box.right - box.left;
  const image = new ImageData(width, box.bottom - box.top);
  const words = new Uint32Array(image.data.buffer);
  layers.forEach(([name, layer], rank) => {
    const colours = palette(name, rank === layers.length - 1);
    const tile = Uint8Array.from({ length: period * period }, (_, i) =>
      Number(inPattern(name, i % period, Math.floor(i / period), period)),
    );
    for (let y = box.top; y < box.bottom; y++) {
      const tileRow = (y % period) * period;
      for (let x = box.left; x < box.right; x++) {
        const value = layer.raster.data[y * layer.raster.width + x];
        if (!value) continue;
        words[(y - box.top) * width + x - box.left] = colours[256 * tile[tileRow + (x % period)] + value];
      }
    }
  });
  context.putImageData(image, box.left, box.top);
}

// ------------------------------------------------------------------------------------ the toolbar

/** Drawings on a field of 24 × 24, by line only. */
const ICONS = {
  open: "M3 19V6h6l2 2h8v3 M3 19l3-8h16l-3 8z",
  brush: "M20 4L10 14 M10 14c-3 0-4 2-4 4 0 1-1 2-3 2 5 2 9 0 9-4z",
  eraser: "M8 20h12 M4 15L14 5l6 6-9 9H8z M9 10l6 6",
  rectangle: "M4 6h16v12H4z",
  lasso: "M7 15c-8-5 0-11 6-11 8 0 11 6 5 9-4 2-9 2-11 2z M7 15c-2 2-2 4 1 5",
  fill: "M4 12l8-8 8 8-8 8z M4 12h16 M12 4L9 1 M21 16c2 3 1 5 0 5s-2-2 0-5z",
  invert: "M4 4h16v16H4z M4 20L20 4 M9 20l11-11 M15 20l5-5",
  clear: "M5 7h14 M9 7V4h6v3 M7 7l1 13h8l1-13 M10 11v5 M14 11v5",
  undo: "M9 7L4 12l5 5 M4 12h10c4 0 6 2 6 6",
  redo: "M15 7l5 5-5 5 M20 12H10c-4 0-6 2-6 6",
  maskFile: "M6 3h8l4 4v14H6z M14 3v4h4 M12 18v-7 M9 14l3-3 3 3",
  zoomOut: "M5 12h14",
  zoomIn: "M5 12h14 M12 5v14",
  fit: "M4 9V4h5 M15 4h5v5 M20 15v5h-5 M9 20H4v-5",
};
/** What a key does, as it stands in titles and `aria-keyshortcuts`. */
const KEYS = {
  brush: "B",
  eraser: "E",
  rectangle: "R",
  lasso: "L",
  invert: "I",
  undo: "Control+Z",
  redo: "Control+Shift+Z",
  zoomIn: "+",
  zoomOut: "-",
  fit: "0",
};

const icon = (name) => drawing(ICONS[name]);

/**
 * One tab stop for all buttons; arrow keys, Home and End move within.
 * @param {HTMLElement} toolbar
 */
function roving(toolbar) {
  const buttons = () => [...toolbar.querySelectorAll("button")];
  const choose = (chosen) => buttons().forEach((button) => (button.tabIndex = button === chosen ? 0 : -1));
  choose(buttons()[0]);
  toolbar.addEventListener("focusin", (event) => choose(event.target.closest("button")));
  toolbar.addEventListener("keydown", (event) => {
    const all = buttons();
    const here = all.indexOf(document.activeElement);
    const steps = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: -1 };
    if (!(event.key in steps) || here < 0) return;
    event.preventDefault();
    event.stopPropagation();
    all.at(steps[event.key] % all.length).focus();
  });
}

// ------------------------------------------------------------------------------------- the canvas

const say = speaker(props.texts);

/** A text with its {places} filled. */
const percent = (share) => (share > 0 && share < 0.01 ? "< 1" : String(Math.round(100 * share)));

/** Everything that changes. `surface` is null until a picture is shown. */
const my = {
  tool: "brush",
  size: 40,
  active: "A",
  feather: 0,
  /** @type {number | null} what the server gave last, and what the surface shows */
  revision: null,
  shown: null,
  /** @type {{width: number, height: number} | null} */
  surface: null,
  /** The value that the server gave last, whatever went wrong since. */
  given: blank(),
  /** @type {Record<string, Layer>} */
  layers: {},
  view: { x: 0, y: 0, scale: 1, fitted: true },
  /** The gesture under way: {kind: "stroke" | "rectangle" | "lasso" | "pan", …}. */
  gesture: null,
  /** @type {Map<number, Point>} fingers on the surface */
  fingers: new Map(),
  /** @type {Point | null} where the pointer hovers, on the screen */
  hover: null,
  /** @type {{x: number, y: number, corner: Point | null} | null} the keyboard's crosshair */
  crosshair: null,
  space: false,
  /** The painted layers that the page was told of, joined. */
  told: "",
  /** @type {Box | null} */
  dirty: null,
  frame: 0,
  loading: Promise.resolve(),
  flushing: Promise.resolve(),
};
const life = new AbortController();

function blank() {
  return {
    picture: null, name: "", width: 0, height: 0, mask: "A", masks: {}, feather: 0, revision: 0,
    upload: null, painted: [], problem: "",
  }; // prettier-ignore
}

const ui = buildPage();

function button(name, act, options = {}) {
  const key = KEYS[name];
  const node = make("button", {
    type: "button",
    "aria-label": say(name),
    title: key ? `${say(name)} (${key.replace("Control", "Ctrl")})` : say(name),
    "data-name": name,
    ...(key ? { "aria-keyshortcuts": key } : {}),
    ...(options.toggle ? { "aria-pressed": "false" } : {}),
  });
  node.append(icon(name));
  node.addEventListener("click", () => node.getAttribute("aria-disabled") !== "true" && act());
  return node;
}

function layerButton(name) {
  const node = make(
    "button",
    { type: "button", class: `layer layer-${name}`, "aria-pressed": "false", "data-layer": name },
    make("span", { class: "swatch", "aria-hidden": "true" }),
    make("span", {}, name),
  );
  node.addEventListener("click", () => choose({ layer: name }));
  return node;
}

/** A hidden file chooser; `take` gets what was chosen. */
function chooser(name, take) {
  const input = make("input", { type: "file", accept: "image/*,.tif,.tiff", hidden: "", "data-name": name });
  input.addEventListener("change", () => {
    if (input.files[0]) take(input.files[0]);
    input.value = ""; // so that the same file can be chosen again
  });
  return input;
}

function buildToolbar(files) {
  const tools = TOOLS.map((tool) => button(tool, () => choose({ tool }), { toggle: true }));
  const group = (...nodes) => make("span", { class: "group" }, ...nodes);
  const toolbar = make(
    "div",
    { class: "tools", role: "toolbar", "aria-label": say("tools") },
    group(button("open", () => files.picture.click())),
    group(...tools),
    group(button("undo", undo), button("redo", redo)),
    group(
      button("fill", () => act({ kind: "box", value: 255, box: whole(my.surface) })),
      button("invert", () => act({ kind: "invert" })),
      button("clear", () => act({ kind: "box", value: 0, box: whole(my.surface) })),
      button("maskFile", () => files.mask.click()),
    ),
    group(...LAYERS.map(layerButton)),
  );
  return toolbar;
}

function buildSlider() {
  const slider = make("input", { type: "range", min: "0", max: "9", step: "0.05", "aria-label": say("size") });
  slider.addEventListener("input", () => choose({ size: Math.round(2 ** Number(slider.value)) }));
  const shown = make("output", {});
  return { slider, shown, box: make("label", { class: "size", title: `${say("size")} ([ ])` }, say("size"), slider, shown) };
}

function buildSurface() {
  const image = make("img", { alt: "", draggable: "false" });
  const feather = make("canvas", { class: "feather" });
  const layers = make("canvas", { class: "layers" });
  const world = make("div", { class: "world", hidden: "" }, image, feather, layers);
  const marks = make("canvas", { class: "marks" });
  const surface = make("div", { class: "surface", role: "img", tabindex: "0" }, world, marks);
  return { image, feather, layers, world, marks, surface };
}

function buildPage() {
  const files = { picture: chooser("picture", openPicture), mask: chooser("mask", openMask) };
  const parts = buildSurface();
  const size = buildSlider();
  const tools = buildToolbar(files);
  const zoomed = make("span", { class: "zoomed" });
  const zoom = make(
    "div",
    { class: "zoom", role: "toolbar", "aria-label": say("zoom") },
    button("zoomOut", () => zoomBy(1 / 1.25)),
    zoomed,
    button("zoomIn", () => zoomBy(1.25)),
    button("fit", fit),
  );
  const alert = make("p", { class: "alert", role: "alert", hidden: "" });
  const live = make("p", { class: "unseen", "aria-live": "polite" });
  const invite = make("button", { type: "button", class: "invite" }, say("invite"));
  invite.addEventListener("click", () => files.picture.click());
  const stage = make("div", { class: "stage" }, parts.surface, invite, zoom);
  const root = element.querySelector(".diffedit-canvas");
  root.replaceChildren(make("div", { class: "bar" }, tools, size.box), alert, stage, live, files.picture, files.mask);
  [tools, zoom].forEach(roving);
  return { ...parts, ...size, root, tools, zoom, zoomed, alert, live, invite, stage };
}

/** One line of trouble, or none. */
function complain(line) {
  ui.alert.textContent = line;
  ui.alert.hidden = !line;
}

let announcing = 0;
/** Tell a screen reader, once things are quiet. */
function announce(line) {
  clearTimeout(announcing);
  announcing = setTimeout(() => (ui.live.textContent = line), 400);
}

/** What the surface shows, in words. */
function describe() {
  if (!my.surface) return say("empty");
  const { name, width, height } = my.given;
  const share = percent(my.layers[my.active].share);
  return say("surface", { name, width, height, layer: my.active, share });
}

/** Make buttons, labels and the slider say what is so. */
function refresh() {
  const layer = my.surface && my.layers[my.active];
  const idle = { undo: !layer?.done, redo: !layer || layer.done === layer.actions.length };
  for (const node of ui.root.querySelectorAll("button[data-name]")) {
    const { name } = node.dataset;
    if (TOOLS.includes(name)) node.setAttribute("aria-pressed", String(name === my.tool));
    if (name !== "open") node.setAttribute("aria-disabled", String(!my.surface || (idle[name] ?? false)));
  }
  for (const node of ui.root.querySelectorAll("button[data-layer]")) {
    const name = node.dataset.layer;
    const painted = my.layers[name]?.painted ?? false;
    const label = say(painted ? "layerPainted" : "layer", { layer: name });
    node.setAttribute("aria-pressed", String(name === my.active));
    node.setAttribute("aria-label", label);
    node.title = label;
    node.classList.toggle("painted", painted);
  }
  ui.slider.value = String(Math.log2(my.size));
  ui.slider.setAttribute("aria-valuetext", say("pixels", { size: my.size }));
  ui.shown.textContent = String(my.size);
  ui.surface.dataset.tool = my.tool;
  ui.invite.hidden = Boolean(my.surface);
  const words = describe();
  if (ui.surface.getAttribute("aria-label") !== words) announce(words);
  ui.surface.setAttribute("aria-label", words);
}

/** Choose a tool, a size in surface pixels, a layer or the previewed feather in original pixels. */
function choose({ tool, size, layer, feather }) {
  if (TOOLS.includes(tool)) my.tool = tool;
  if (size) my.size = Math.min(MAX_SIZE, Math.max(1, Math.round(size)));
  if (LAYERS.includes(layer) && layer !== my.active) {
    my.active = layer;
    publish();
    repaint();
  }
  if (feather !== undefined && feather !== my.feather) {
    my.feather = Math.max(0, feather);
    repaint();
  }
  refresh();
  mark();
}

// ----------------------------------------------------------------------------- the view on things

/** @param {{clientX: number, clientY: number}} event */
function onScreen(event) {
  const frame = ui.surface.getBoundingClientRect();
  return { x: event.clientX - frame.left, y: event.clientY - frame.top };
}

/** @param {Point} point on the screen */
const onSurface = ({ x, y }) => ({ x: (x - my.view.x) / my.view.scale, y: (y - my.view.y) / my.view.scale });

function fitScale() {
  const { clientWidth, clientHeight } = ui.surface;
  return Math.min((clientWidth - 16) / my.surface.width, (clientHeight - 16) / my.surface.height, 8);
}

function fit() {
  if (!my.surface || !ui.surface.clientWidth) return;
  const scale = Math.max(0.01, fitScale());
  const x = (ui.surface.clientWidth - my.surface.width * scale) / 2;
  const y = (ui.surface.clientHeight - my.surface.height * scale) / 2;
  look({ x, y, scale, fitted: true });
}

/** Zoom by a factor about a point of the screen (the middle if none is given). */
function zoomBy(factor, about = { x: ui.surface.clientWidth / 2, y: ui.surface.clientHeight / 2 }) {
  if (!my.surface) return;
  const { x, y, scale: old } = my.view;
  const scale = Math.min(MAX_ZOOM, Math.max(fitScale() / 4, old * factor));
  const ratio = scale / old;
  look({ x: about.x - (about.x - x) * ratio, y: about.y - (about.y - y) * ratio, scale, fitted: false });
}

/** Move the view; a corner of the picture always stays in sight. */
function look(view) {
  const kept = 40;
  const { width, height } = my.surface;
  const within = (at, side, room) => Math.min(room - kept, Math.max(kept - side * view.scale, at));
  view.x = within(view.x, width, ui.surface.clientWidth);
  view.y = within(view.y, height, ui.surface.clientHeight);
  my.view = view;
  ui.world.style.transform = `translate(${view.x}px, ${view.y}px) scale(${view.scale})`;
  ui.world.classList.toggle("near", view.scale >= 3);
  ui.zoomed.textContent = say("zoomed", { percent: Math.round(100 * view.scale) });
  mark();
}

/** Redraw at the next frame: the given part of the layers (all of it if none is given). */
function repaint(box = my.surface && whole(my.surface)) {
  my.dirty = joined(my.dirty, box);
  if (!my.frame) my.frame = requestAnimationFrame(paintFrame);
}

function paintFrame() {
  my.frame = 0;
  const box = my.dirty;
  my.dirty = null;
  if (!my.surface || !box) return;
  const names = [...LAYERS.filter((name) => name !== my.active), my.active];
  const shown = names.filter((name) => my.layers[name]).map((name) => [name, my.layers[name]]);
  const period = 2 * Math.max(3, Math.round(6 / Math.max(0.05, fitScale())));
  compose(ui.layers.getContext("2d"), shown, box, period);
  refreshFeather();
}

let feathering = 0;
/** The fading edge follows once the hand rests: it takes longer than a frame. */
function refreshFeather() {
  clearTimeout(feathering);
  feathering = setTimeout(() => {
    if (!my.surface) return;
    const reach = (my.feather * my.surface.width) / (my.given.width || my.surface.width);
    drawFeather(ui.feather, my.layers[my.active], reach, COLOURS[my.active]);
  }, 120);
}

let marking = 0;
/** Redraw what lies above the picture: cursor, crosshair, the outline under way. */
function mark() {
  if (!marking) marking = requestAnimationFrame(drawMarks);
}

function drawMarks() {
  marking = 0;
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [ui.surface.clientWidth, ui.surface.clientHeight];
  ui.marks.width = Math.round(width * ratio);
  ui.marks.height = Math.round(height * ratio);
  const context = ui.marks.getContext("2d");
  context.scale(ratio, ratio);
  if (!my.surface) return;
  const outline = new Path2D();
  const screen = ({ x, y }) => ({ x: my.view.x + x * my.view.scale, y: my.view.y + y * my.view.scale });
  outlineGesture(outline, screen);
  outlineCrosshair(outline, screen);
  if (my.hover && (my.tool === "brush" || my.tool === "eraser") && !my.space) {
    outline.moveTo(my.hover.x + (my.size / 2) * my.view.scale, my.hover.y);
    outline.arc(my.hover.x, my.hover.y, (my.size / 2) * my.view.scale, 0, 2 * Math.PI);
  }
  // White on black: seen on any picture.
  for (const [style, line] of [["#000", 3], ["#fff", 1.25]]) {
    context.strokeStyle = style;
    context.lineWidth = line;
    context.stroke(outline);
  }
}

/** @param {Path2D} path */
function outlineGesture(path, screen) {
  const gesture = my.gesture;
  if (gesture?.kind === "rectangle") outlineBox(path, screen, boxBetween(gesture.from, gesture.to));
  if (gesture?.kind !== "lasso") return;
  for (let i = 0; i < gesture.points.length; i += 2) {
    const { x, y } = screen({ x: gesture.points[i], y: gesture.points[i + 1] });
    if (i) path.lineTo(x, y);
    else path.moveTo(x, y);
  }
}

function outlineBox(path, screen, box) {
  const start = screen({ x: box.left, y: box.top });
  const end = screen({ x: box.right, y: box.bottom });
  path.rect(start.x, start.y, end.x - start.x, end.y - start.y);
}

/** @param {Path2D} path */
function outlineCrosshair(path, screen) {
  const cross = my.crosshair;
  if (!cross || document.activeElement !== ui.surface) return;
  const { x, y } = screen({ x: cross.x + 0.5, y: cross.y + 0.5 });
  path.moveTo(x - 12, y);
  path.lineTo(x + 12, y);
  path.moveTo(x, y - 12);
  path.lineTo(x, y + 12);
  if (cross.corner) outlineBox(path, screen, boxBetween(cross.corner, cross));
}

/** The pixels from one corner to the other, both within. */
function boxBetween(a, b) {
  return {
    left: Math.floor(Math.min(a.x, b.x)),
    top: Math.floor(Math.min(a.y, b.y)),
    right: Math.floor(Math.max(a.x, b.x)) + 1,
    bottom: Math.floor(Math.max(a.y, b.y)) + 1,
  };
}

// ---------------------------------------------------------------------------------------- editing

/** Do something to the active layer. */
function act(action, drawn) {
  if (!my.surface) return;
  const layer = my.layers[my.active];
  repaint(layer.commit(action, drawn) ?? undefined);
  settle();
}

function undo() {
  travel(-1);
}

function redo() {
  travel(1);
}

function travel(step) {
  const layer = my.surface && my.layers[my.active];
  const target = (layer?.done ?? 0) + step;
  if (!layer || my.gesture || target < 0 || target > layer.actions.length) return;
  layer.go(target);
  repaint();
  settle();
}

/** After a change: tell the page if a layer was painted for the first time, or is empty again. */
function settle() {
  const painted = LAYERS.filter((name) => my.layers[name]?.painted);
  if (painted.join() !== my.told) {
    my.told = painted.join();
    publish();
    trigger("painted", { painted });
  }
  refresh();
}

/** Whether this gesture takes away: the eraser does, and every other tool with Alt. */
const takesAway = (event) => my.tool === "eraser" || event.altKey;

/** @param {PointerEvent} event */
function radius({ pointerType, pressure }) {
  const pressed = pointerType === "pen" && pressure > 0 && pressure < 1 ? pressure : 1;
  return Math.max(Math.SQRT1_2, (my.size / 2) * pressed); // the pixel below the pen is always hit
}

/** @param {PointerEvent} event */
function begin(event) {
  const at = onSurface(onScreen(event));
  const value = takesAway(event) ? 0 : 255;
  my.crosshair = null;
  if (my.tool === "rectangle") my.gesture = { kind: "rectangle", from: at, to: at, value };
  else if (my.tool === "lasso") my.gesture = { kind: "lasso", points: [at.x, at.y], value };
  else {
    my.gesture = { kind: "stroke", action: { kind: "stroke", value, points: [] }, drawn: null };
    extend([event]);
  }
  my.gesture.pointer = event.pointerId;
}

/** @param {PointerEvent[]} events */
function extend(events) {
  const gesture = my.gesture;
  for (const event of events) {
    const at = onSurface(onScreen(event));
    if (gesture.kind === "rectangle") gesture.to = at;
    if (gesture.kind === "lasso") gesture.points.push(at.x, at.y);
    if (gesture.kind === "stroke") gesture.action.points.push(at.x, at.y, radius(event));
  }
  if (gesture.kind !== "stroke") return;
  const from = gesture.action.points.length - 3 * events.length;
  const layer = my.layers[my.active];
  const drawn = drawStroke(layer.raster, gesture.action, from);
  layer.version++;
  gesture.drawn = joined(gesture.drawn, drawn);
  if (drawn) repaint(drawn);
}

function finish() {
  const gesture = my.gesture;
  my.gesture = null;
  if (gesture?.kind === "stroke") act(gesture.action, gesture.drawn);
  if (gesture?.kind === "rectangle") {
    act({ kind: "box", value: gesture.value, box: boxBetween(gesture.from, gesture.to) });
  }
  if (gesture?.kind === "lasso" && gesture.points.length > 4) {
    act({ kind: "polygon", value: gesture.value, points: gesture.points });
  }
  mark();
}

/** Take back what the gesture under way has done. */
function abandon() {
  const gesture = my.gesture;
  my.gesture = null;
  if (gesture?.kind === "stroke") {
    const layer = my.layers[my.active];
    layer.go(layer.done);
    repaint();
  }
  mark();
}

// --------------------------------------------------------------------------------------- pointers

/** @param {PointerEvent} event */
function pointerDown(event) {
  if (!my.surface || (event.button !== 0 && event.button !== 1)) return;
  event.preventDefault();
  ui.surface.classList.add("pointed"); // focused by the pointer: no ring
  ui.surface.focus({ preventScroll: true });
  ui.surface.setPointerCapture(event.pointerId);
  const at = onScreen(event);
  if (event.pointerType === "touch") {
    my.fingers.set(event.pointerId, at);
    if (my.fingers.size === 2) return startPinch();
    if (my.fingers.size > 2) return;
  }
  if (my.gesture) return;
  if (event.button === 1 || my.space) my.gesture = { kind: "pan", pointer: event.pointerId, at };
  else begin(event);
  mark();
}

/** A second finger: what the first one drew was not meant. */
function startPinch() {
  abandon();
  my.gesture = { kind: "pinch", ...pinch() };
}

/** The middle and the spread of the two fingers. */
function pinch() {
  const [a, b] = [...my.fingers.values()];
  return { middle: { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 }, spread: Math.hypot(a.x - b.x, a.y - b.y) || 1 };
}

function movePinch() {
  const { middle, spread } = pinch();
  const before = my.gesture;
  my.gesture = { kind: "pinch", middle, spread };
  look({ ...my.view, x: my.view.x + middle.x - before.middle.x, y: my.view.y + middle.y - before.middle.y, fitted: false });
  zoomBy(spread / before.spread, middle);
}

/** @param {PointerEvent} event */
function pointerMove(event) {
  const at = onScreen(event);
  my.hover = event.pointerType === "touch" ? null : at;
  if (my.fingers.has(event.pointerId)) my.fingers.set(event.pointerId, at);
  const gesture = my.gesture;
  if (gesture?.kind === "pinch" && my.fingers.size === 2) movePinch();
  else if (gesture && gesture.pointer === event.pointerId) {
    if (gesture.kind === "pan") {
      look({ ...my.view, x: my.view.x + at.x - gesture.at.x, y: my.view.y + at.y - gesture.at.y, fitted: false });
      gesture.at = at;
    } else {
      const all = event.getCoalescedEvents?.() ?? [];
      extend(all.length ? all : [event]);
    }
  }
  mark();
}

/** @param {PointerEvent} event */
function pointerUp(event) {
  my.fingers.delete(event.pointerId);
  if (my.gesture?.kind === "pinch") {
    if (my.fingers.size < 2) my.gesture = null;
  } else if (my.gesture?.pointer === event.pointerId) {
    if (event.type === "pointercancel") abandon();
    else finish();
  }
}

/** @param {WheelEvent} event */
function wheel(event) {
  if (!my.surface) return;
  event.preventDefault();
  const lines = event.deltaMode === 1 ? 16 : 1;
  zoomBy(Math.exp(-event.deltaY * lines * (event.ctrlKey ? 0.01 : 0.0015)), onScreen(event));
}

// --------------------------------------------------------------------------------------- keyboard

/** Shortcuts of the whole page, while no text is being typed. */
const SHORTCUTS = {
  b: () => choose({ tool: "brush" }),
  e: () => choose({ tool: "eraser" }),
  r: () => choose({ tool: "rectangle" }),
  l: () => choose({ tool: "lasso" }),
  i: () => act({ kind: "invert" }),
  "[": () => choose({ size: Math.min(my.size - 1, my.size / 1.2) || 1 }),
  "]": () => choose({ size: Math.max(my.size + 1, my.size * 1.2) }),
  0: fit,
  "+": () => zoomBy(1.25),
  "=": () => zoomBy(1.25),
  "-": () => zoomBy(1 / 1.25),
};

/** @param {KeyboardEvent} event */
function keyDown(event) {
  if (!present() || event.defaultPrevented || !my.surface) return;
  const target = event.target instanceof Element ? event.target : document.body;
  if (target.closest(TEXT_FIELDS)) return;
  if (event.key === " ") return spaceDown(event, target);
  const deed = event.ctrlKey || event.metaKey ? commandOf(event) : !event.altKey && SHORTCUTS[event.key.toLowerCase()];
  if (!deed) return;
  event.preventDefault();
  deed();
}

/** @param {KeyboardEvent} event */
function commandOf(event) {
  const key = event.key.toLowerCase();
  if (key === "z") return event.shiftKey ? redo : undo;
  return key === "y" ? redo : null;
}

/** Space lets the picture be dragged; elsewhere it presses buttons and scrolls the page. */
function spaceDown(event, target) {
  const ours = target === ui.surface || (target === document.body && my.hover);
  if (!ours) return;
  event.preventDefault();
  my.space = true;
  ui.surface.classList.add("panning");
  mark();
}

function spaceUp(event) {
  if (event.key !== " ") return;
  my.space = false;
  ui.surface.classList.remove("panning");
}

/** A rectangle without a pointer: arrows move, Enter sets one corner and then the other. */
function surfaceKey(event) {
  ui.surface.classList.remove("pointed");
  if (!my.surface || event.ctrlKey || event.metaKey || event.altKey) return;
  const { width, height } = my.surface;
  const step = event.shiftKey ? 10 : 1;
  const cross = my.crosshair ?? { x: Math.floor(width / 2), y: Math.floor(height / 2), corner: null };
  const moves = {
    ArrowLeft: [cross.x - step, cross.y],
    ArrowRight: [cross.x + step, cross.y],
    ArrowUp: [cross.x, cross.y - step],
    ArrowDown: [cross.x, cross.y + step],
    Home: [0, cross.y],
    End: [width - 1, cross.y],
    PageUp: [cross.x, 0],
    PageDown: [cross.x, height - 1],
  };
  if (event.key in moves) moveCrosshair(cross, ...moves[event.key]);
  else if (event.key === "Enter") setCorner(cross);
  else if (event.key === "Escape") cancelAll();
  else return;
  event.preventDefault();
  mark();
}

function moveCrosshair(cross, x, y) {
  const { width, height } = my.surface;
  my.crosshair = { ...cross, x: Math.min(width - 1, Math.max(0, x)), y: Math.min(height - 1, Math.max(0, y)) };
  announce(say("crosshair", my.crosshair));
  keepInSight(my.crosshair);
}

/** Pan so that a point of the surface is on the screen. */
function keepInSight({ x, y }) {
  const { scale } = my.view;
  const into = (offset, at, room) => Math.min(room - 20, Math.max(20, offset + at * scale)) - at * scale;
  const moved = { x: into(my.view.x, x, ui.surface.clientWidth), y: into(my.view.y, y, ui.surface.clientHeight) };
  if (moved.x !== my.view.x || moved.y !== my.view.y) look({ ...my.view, ...moved, fitted: false });
}

function setCorner(cross) {
  if (!cross.corner) {
    my.crosshair = { ...cross, corner: { x: cross.x, y: cross.y } };
    announce(say("corner", my.crosshair));
    return;
  }
  my.crosshair = { ...cross, corner: null };
  act({ kind: "box", value: my.tool === "eraser" ? 0 : 255, box: boxBetween(cross.corner, cross) });
}

function cancelAll() {
  if (my.gesture) abandon();
  if (my.crosshair) my.crosshair.corner = null;
}

// -------------------------------------------------------------------------------- files and values

/** Whether the component is still on the page; if not, listeners on the document go. */
function present() {
  if (!element.isConnected) life.abort();
  return element.isConnected && element.offsetParent !== null;
}

/** The server decides what a picture is; this only saves an upload that cannot succeed. */
const maybePicture = (file) =>
  file.type.startsWith("image/") ? !file.type.includes("svg") : !file.type && PICTURE_NAMES.test(file.name);

/** Send a picture as it is and ask the server to show it. */
async function openPicture(file) {
  if (!maybePicture(file)) return complain(say("notPicture", { name: file.name }));
  complain("");
  announce(say("sending", { name: file.name }));
  ui.root.classList.add("busy");
  try {
    publish({ upload: await sent(file) });
    trigger("opened", { name: file.name });
  } catch (error) {
    complain(say("uploadFailed", { name: file.name, reason: reasonOf(error) }));
  } finally {
    ui.root.classList.remove("busy");
  }
}

async function openMask(file) {
  if (!my.surface) return;
  const { width, height } = my.surface;
  const layer = my.layers[my.active];
  try {
    const data = await luminance(file, width, height);
    complain("");
    if (my.layers[my.active] === layer) act({ kind: "image", packed: pack(data) });
  } catch {
    complain(say("notPicture", { name: file.name }));
  }
}

/** Put what the browser knows into the component's value. */
function publish(more = {}) {
  const masks = {};
  for (const name of LAYERS) if (my.layers[name]?.file) masks[name] = my.layers[name].file;
  const painted = LAYERS.filter((name) => my.layers[name]?.painted);
  props.value = { ...my.given, upload: null, mask: my.active, masks, painted, ...more };
}

/** Show what the server gave. Another revision is another picture: its strokes start anew. */
function receive() {
  const value = JSON.parse(JSON.stringify(props.value || blank()));
  complain(value.problem ?? "");
  if (value.problem) return publish();
  const before = my.given?.picture?.url;
  my.given = value;
  choose({ feather: value.feather });
  if (value.revision === my.revision && value.picture) {
    if (value.picture.url !== before) my.loading = exchange(value);
    return publish();
  }
  my.revision = value.revision;
  my.loading = value.picture ? show(value) : Promise.resolve(reset(null));
}

/** Another state of the same picture: what is painted on it stays. */
async function exchange({ picture, name, revision }) {
  const image = make("img", { alt: "", draggable: "false", src: picture.url });
  const failed = await image.decode().then(() => false, () => true);
  if (revision !== my.revision || picture.url !== my.given.picture?.url) return;
  if (failed) return complain(say("notShown", { name }));
  ui.image.replaceWith(image);
  ui.image = image;
  const { naturalWidth: width, naturalHeight: height } = image;
  if (width !== my.surface?.width || height !== my.surface?.height) {
    reset({ width, height });
    fit();
  }
  refresh();
}

async function show({ picture, name, revision }) {
  const image = make("img", { alt: "", draggable: "false", src: picture.url });
  const failed = await image.decode().then(() => false, () => true);
  if (revision !== my.revision) return;
  if (failed) {
    complain(say("notShown", { name }));
    return reset(null);
  }
  ui.image.replaceWith(image);
  ui.image = image;
  reset({ width: image.naturalWidth, height: image.naturalHeight });
  fit();
  refresh();
}

/** The brush as large on another surface as it was on this one; at first a twentieth of it. */
function sizeOn(surface) {
  if (!surface) return my.size;
  const side = Math.max(surface.width, surface.height);
  const size = my.surface ? (my.size * side) / Math.max(my.surface.width, my.surface.height) : side / 20;
  return Math.min(MAX_SIZE, Math.max(1, Math.round(size)));
}

/** A new, empty surface. */
function reset(surface) {
  my.gesture = null;
  my.crosshair = null;
  my.size = sizeOn(surface);
  my.surface = surface;
  my.shown = my.revision;
  my.layers = {};
  for (const name of surface ? LAYERS : []) my.layers[name] = new Layer(surface.width, surface.height);
  ui.world.hidden = !surface;
  Object.assign(ui.world.style, { width: `${surface?.width ?? 0}px`, height: `${surface?.height ?? 0}px` });
  ui.layers.width = surface?.width ?? 0;
  ui.layers.height = surface?.height ?? 0;
  ui.feather.width = 0;
  settle();
  publish();
  mark();
}

/** Send the layers that changed since they were last sent. */
async function sendMasks() {
  await my.loading;
  for (const name of LAYERS) {
    const layer = my.layers[name];
    if (!layer || layer.version === layer.sent) continue;
    const { version } = layer;
    layer.measure();
    if (layer.painted) {
      const file = new File([await greyPng(layer.raster)], `mask-${name}.png`, { type: "image/png" });
      layer.file = await sent(file);
    } else layer.file = null;
    layer.sent = version;
  }
  publish();
  return JSON.parse(JSON.stringify(props.value));
}

/**
 * Upload what changed; one at a time.
 * @returns {Promise<object>} the component's value, for a `js=` to put in its place among the inputs
 * @throws if an upload fails: a run without the last stroke is worse than none
 */
function flush() {
  my.flushing = my.flushing.catch(() => {}).then(sendMasks);
  return my.flushing.catch((error) => {
    complain(say("masksFailed", { reason: reasonOf(error) }));
    throw error;
  });
}

// ------------------------------------------------------------------------------------------ wiring

/** @param {DataTransfer | null} transfer */
const pictureIn = (transfer) => [...(transfer?.files ?? [])][0];

function listen() {
  const surface = ui.surface;
  const on = (target, type, act, options = {}) => target.addEventListener(type, act, { signal: life.signal, ...options });
  on(surface, "pointerdown", pointerDown);
  on(surface, "pointermove", pointerMove);
  on(surface, "pointerup", pointerUp);
  on(surface, "pointercancel", pointerUp);
  on(surface, "lostpointercapture", pointerUp);
  on(surface, "pointerleave", () => ((my.hover = null), mark()));
  on(surface, "wheel", wheel, { passive: false });
  on(surface, "keydown", surfaceKey);
  on(surface, "contextmenu", (event) => my.gesture && event.preventDefault());
  on(surface, "focus", mark);
  on(surface, "blur", () => (surface.classList.remove("pointed"), mark()));
  on(document, "keydown", keyDown);
  on(document, "keyup", spaceUp);
  on(document, "paste", (event) => {
    // Into a prompt one pastes text, even where a program has put a picture beside it.
    const typing = event.target instanceof Element && event.target.closest(TEXT_FIELDS);
    const file = pictureIn(event.clipboardData);
    if (file && !typing && present()) openPicture(file);
  });
  for (const type of ["dragover", "dragleave", "drop"]) on(ui.root, type, drag);
  // The browser's own scrolling by the middle button.
  on(surface, "mousedown", (event) => event.button === 1 && event.preventDefault());
  new ResizeObserver(resized).observe(surface);
}

function resized() {
  if (!my.surface || !ui.surface.clientWidth) return; // nothing yet, or in a folded tab
  if (my.view.fitted) fit();
  else look(my.view);
}

/** @param {DragEvent} event */
function drag(event) {
  event.preventDefault();
  ui.root.classList.toggle("dropping", event.type === "dragover");
  const file = event.type === "drop" && pictureIn(event.dataTransfer);
  if (file) openPicture(file);
}

/** What is so, for tests and for the page. */
function state() {
  const layers = {};
  for (const [name, layer] of Object.entries(my.layers)) {
    const { share, painted, done, actions } = layer;
    layers[name] = { share, painted, undo: done, redo: actions.length - done };
  }
  const { tool, size, active, feather, shown, surface } = my;
  return { tool, size, zoom: my.view.scale, active, feather, revision: shown, surface, layers };
}

/** @returns {number} 0 = stays, 255 = may change */
function maskAt(name, x, y) {
  const raster = my.layers[name]?.raster;
  return raster && x >= 0 && y >= 0 && x < raster.width && y < raster.height ? raster.data[y * raster.width + x] : 0;
}

/** Where a point of the surface is in the window. */
function clientAt(x, y) {
  const frame = ui.surface.getBoundingClientRect();
  return { x: frame.left + my.view.x + x * my.view.scale, y: frame.top + my.view.y + y * my.view.scale };
}

listen();
refresh();
watch("value", receive);
receive();
window.diffedit = { ...window.diffedit, canvas: { flush, state, maskAt, clientAt, choose, undo, redo } };
