// Small charts on canvas: the last two minutes of one number. Decoration beside a figure that is said in text.

const SPAN_MS = 120_000;
const LEAST_MS = 30_000;  // a chart that has just begun takes up its place soon
const GAP_MS = 6_000;

// Sizes and colours are asked for when they change, not with each drawing: asking makes the browser lay out the page.
const sizes = new WeakMap();
const resized = new ResizeObserver((entries) => {
  for (const { target, contentRect } of entries) sizes.set(target, [contentRect.width, contentRect.height]);
});
let colours = new WeakMap();
document.addEventListener("theme", () => { colours = new WeakMap(); });

function sizeOf(canvas) {
  if (!sizes.has(canvas)) {
    sizes.set(canvas, [canvas.clientWidth, canvas.clientHeight]);
    resized.observe(canvas);
  }
  return sizes.get(canvas);
}

function colourOf(canvas) {
  if (!colours.has(canvas)) colours.set(canvas, getComputedStyle(canvas).color);
  return colours.get(canvas);
}

/** Makes a canvas draw with another colour after its class changed. */
export const recolour = (canvas) => colours.delete(canvas);

/** Fits a canvas to its place on the screen; returns its context, in CSS pixels, or null while it is not shown. */
export function fit(canvas) {
  const [width, height] = sizeOf(canvas);
  if (!width || !height) return null;
  const scale = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  return { pen, width, height };
}

/** Draws [[time_ms, value], ...]; where nothing was read for a while the line is broken. */
export function spark(canvas, points) {
  const place = fit(canvas);
  if (!place || points.length < 2) return;
  const { pen, width, height } = place;
  const end = points.at(-1)[0];
  const top = Math.max(1e-9, ...points.map(([, value]) => value));
  const long = Math.min(SPAN_MS, Math.max(LEAST_MS, end - points[0][0]));
  const x = (time) => width - ((end - time) / long) * width - 1;
  const y = (value) => height - 2 - (value / top) * (height - 5);
  pen.strokeStyle = pen.fillStyle = colourOf(canvas);
  pen.lineWidth = 1.6;
  pen.lineJoin = "round";
  for (const part of parts(points)) {
    pen.beginPath();
    part.forEach(([time, value], index) => pen[index ? "lineTo" : "moveTo"](x(time), y(value)));
    pen.stroke();
    pen.lineTo(x(part.at(-1)[0]), height);
    pen.lineTo(x(part[0][0]), height);
    pen.globalAlpha = 0.13;
    pen.fill();
    pen.globalAlpha = 1;
  }
}

function parts(points) {
  const found = [[]];
  points.forEach((point, index) => {
    if (index && point[0] - points[index - 1][0] > GAP_MS) found.push([]);
    found.at(-1).push(point);
  });
  return found;
}
