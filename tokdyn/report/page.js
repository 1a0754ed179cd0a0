// The script of all pages: theme, slider over noise levels, values under the pointer, copying. It loads nothing.
"use strict";

const byId = (name) => document.getElementById(name);
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

/* Theme: that of the system, light, or dark. */
function themes() {
  const button = byId("theme"), names = ["system", "light", "dark"];
  const stored = () => { try { return localStorage.getItem("tokdyn-theme"); } catch { return null; } };
  const apply = (name) => {
    if (name === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    button.textContent = `Theme: ${name}`;
    button.dataset.name = name;
    try { localStorage.setItem("tokdyn-theme", name); } catch { /* a page from disk may have no storage */ }
  };
  apply(names.includes(stored()) ? stored() : "system");
  button.hidden = false;
  button.addEventListener("click", () => apply(names[(names.indexOf(button.dataset.name) + 1) % names.length]));
}

/* Keep maps. `tokdyn.report.maps.shade` draws the same for figures: grey and hatched where dropped, outlined where kept. */
const CELL = 8;       // least width of a cell in pixels
const MIX = 0.75;     // share of the hatch in a dropped cell
const BRIGHT = 150, DARK = 90, PERIOD = 6, STROKE = 2;

function bits(hex, count) {
  const found = new Uint8Array(count);
  for (let i = 0; i < count; i++) found[i] = (parseInt(hex.substr(2 * (i >> 3), 2), 16) >> (7 - (i & 7))) & 1;
  return found;
}

function shade(context, width, height, rows, columns, keep) {
  const image = context.getImageData(0, 0, width, height), data = image.data;
  const row = Int32Array.from({ length: height }, (_, y) => Math.floor(y * rows / height));
  const column = Int32Array.from({ length: width }, (_, x) => Math.floor(x * columns / width));
  const kept = (x, y) => keep[row[y] * columns + column[x]];
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
    const here = kept(x, y), at = 4 * (y * width + x);
    const edge = (x > 0 && kept(x - 1, y) !== here) || (x < width - 1 && kept(x + 1, y) !== here)
      || (y > 0 && kept(x, y - 1) !== here) || (y < height - 1 && kept(x, y + 1) !== here);
    const grey = (x + y) % PERIOD < STROKE ? BRIGHT : DARK;
    for (let c = at; c < at + 3; c++) {
      if (edge) data[c] = here ? 255 : 0;
      else if (!here) data[c] = Math.round((1 - MIX) * data[c] + MIX * grey);
    }
  }
  context.putImageData(image, 0, 0);
}

function explore(box) {
  const content = JSON.parse(byId(box.dataset.frames).textContent);
  const [rows, columns] = content.grid, [height, width] = content.size;
  const scale = Math.max(1, Math.round(160 / width), Math.ceil(CELL * rows / height), Math.ceil(CELL * columns / width));
  const slider = box.querySelector(".slider"), map = box.querySelector(".map"), play = box.querySelector(".play");
  const output = box.querySelector("output"), canvases = [...box.querySelectorAll("canvas")];
  const captions = [...box.querySelectorAll(".kept")], plot = box.querySelector(".chart svg");
  const strips = new Map();
  for (const canvas of canvases) { canvas.width = scale * width; canvas.height = scale * height; }

  const strip = (index) => {
    if (!strips.has(index)) {
      const image = new Image();
      strips.set(index, new Promise((done) => { image.onload = () => done(image); image.src = content.frames[index].strip; }));
    }
    return strips.get(index);
  };
  const percent = (share) => `${(100 * share).toFixed(1)}%`;

  async function show() {
    const index = Number(slider.value), frame = content.frames[index], image = await strip(index);
    if (index !== Number(slider.value)) return;  // the slider has moved on while the picture was decoded
    canvases.forEach((canvas, place) => {
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.imageSmoothingEnabled = false;
      context.drawImage(image, place * width, 0, width, height, 0, 0, canvas.width, canvas.height);
      if (map.checked) shade(context, canvas.width, canvas.height, rows, columns, bits(frame.keep[place], rows * columns));
      captions[place].textContent = percent(frame.kept[place]);
      canvas.setAttribute("aria-label", `${content.names[place]} at noise level ${frame.level}, ${percent(frame.kept[place])} kept`);
    });
    const mean = frame.kept.reduce((sum, share) => sum + share, 0) / frame.kept.length;
    output.textContent = `Noise level ${frame.level.toFixed(2)}: ${percent(mean)} of the tokens kept`;
    slider.setAttribute("aria-valuetext", output.textContent);
    if (plot) markLevel(plot, frame.level);
    box.dataset.shown = index;
  }

  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (slider.value === slider.max) slider.value = 0;
    play.textContent = "Pause";
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show();
      if (slider.value === slider.max) stop();
    }, 250);
  });
  slider.addEventListener("input", () => { if (timer) stop(); show(); });
  map.addEventListener("change", show);
  show();
}

/* A vertical line in a chart, at a value of its horizontal axis. */
function markLevel(svg, value) {
  const [left, right, first, last, top, bottom] = JSON.parse(svg.dataset.span);
  let line = svg.querySelector(".at");
  if (!line) svg.append(line = shape("line", { class: "at", y1: top, y2: bottom }));
  const x = left + (value - first) / (last - first) * (right - left);
  line.setAttribute("x1", x);
  line.setAttribute("x2", x);
}

function shape(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

/* Values of charts: the point nearest to the pointer, or the next one with the arrow keys. */
function readable(svg) {
  const points = JSON.parse(svg.dataset.points), tip = byId("tip");
  const ring = shape("circle", { class: "found", r: 8, visibility: "hidden" });
  svg.append(ring);
  let current = -1;
  const show = (index) => {
    current = index;
    const [x, y, text] = points[index], box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
    ring.setAttribute("cx", x);
    ring.setAttribute("cy", y);
    ring.setAttribute("visibility", "visible");
    tip.textContent = text;
    tip.hidden = false;
    const left = box.left + x * scale, top = box.top + y * scale;
    tip.style.left = `${clamp(left + 14, 4, Math.max(4, innerWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${top + 14 + tip.offsetHeight > innerHeight ? top - 14 - tip.offsetHeight : top + 14}px`;
  };
  const hide = () => { tip.hidden = true; ring.setAttribute("visibility", "hidden"); };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
    let best = 0, least = Infinity;
    points.forEach(([px, py], index) => {
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < least) [best, least] = [index, distance];
    });
    if (least < 40 ** 2) show(best); else hide();
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") hide();
    if (!step || !points.length) return;
    event.preventDefault();
    show(clamp(current + step, 0, points.length - 1));
  });
}

async function copy(button) {
  const block = button.parentElement.querySelector("code");
  try {
    await navigator.clipboard.writeText(block.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(block);
    button.textContent = "Selected";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

themes();
document.querySelectorAll(".explorer").forEach(explore);
document.querySelectorAll("svg[data-points]").forEach(readable);
document.querySelectorAll(".copy").forEach((button) => button.addEventListener("click", () => copy(button)));
