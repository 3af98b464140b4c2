"use strict";
// The page can be read without this: it shows the last step of the run then, and pictures cannot be opened.

const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const byId = (id) => document.getElementById(id);

// --- along the run ---

const slider = byId("step");

function showStep() {
  const place = slider.value;
  const step = JSON.parse(slider.dataset.steps)[place];
  byId("at").textContent = step.toLocaleString("en");
  slider.setAttribute("aria-valuetext", `step ${step}`);
  for (const layer of all(".layer")) layer.classList.toggle("on", layer.dataset.place === place);
  for (const chart of all(".chart")) {
    const [from, to] = JSON.parse(chart.dataset.curves).steps;
    const here = chart.querySelector(".here");
    here.hidden = step <= from || step >= to;
    here.style.left = `${(100 * (step - from)) / (to - from)}%`;
  }
  all(".marks span").forEach((mark, index) => mark.classList.toggle("on", String(index) === place));
}

function goTo(place) {
  slider.value = place;
  showStep();
}

let playing = 0;

function stop() {
  clearInterval(playing);
  playing = 0;
  byId("play").classList.remove("on");
  byId("play").setAttribute("aria-label", "Play");
}

function play() {
  if (playing) return stop();
  const last = Number(slider.max);
  if (Number(slider.value) === last) goTo(0);
  byId("play").classList.add("on");
  byId("play").setAttribute("aria-label", "Stop");
  playing = setInterval(() => {
    goTo(Number(slider.value) + 1);
    if (Number(slider.value) === last) stop();
  }, Math.max(120, Math.min(700, 6000 / last)));
}

// --- curves: what the values are where the pointer is ---

function nearest(points, step) {
  let best = points[0];
  for (const point of points) if (Math.abs(point[0] - step) < Math.abs(best[0] - step)) best = point;
  return best;
}

function readable(chart) {
  const { steps, lines } = JSON.parse(chart.dataset.curves);
  const plot = chart.querySelector(".plot");
  const hair = chart.querySelector(".hair");
  const read = chart.querySelector(".read");
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const asked = steps[0] + share * (steps[1] - steps[0]);
    const longest = lines.reduce((a, b) => (b.points.length > a.points.length ? b : a));
    const [step] = nearest(longest.points, asked);
    hair.hidden = false;
    hair.style.left = `${(100 * (step - steps[0])) / (steps[1] - steps[0])}%`;
    const values = lines.map((line) => nearest(line.points, step)[1]);
    read.textContent = `step ${step.toLocaleString("en")}: ${values.join(" / ")}`;
  });
  plot.addEventListener("pointerleave", () => {
    hair.hidden = true;
    read.textContent = "";
  });
}

// --- a picture by itself, and the line that draws it again ---

const viewer = byId("viewer");
let opened = null;

const visible = () => all("button.open").filter((button) => button.offsetParent && !button.closest(".layer:not(.on)"));

function open(button) {
  const image = button.querySelector("img");
  const line = byId("viewer-line");
  opened = button;
  byId("viewer-image").src = image.src;
  byId("viewer-image").alt = image.alt;
  byId("viewer-image").classList.toggle("small", button.classList.contains("small"));
  byId("viewer-facts").textContent = button.dataset.facts;
  byId("viewer-prompt").textContent = button.dataset.prompt;
  byId("viewer-missing").textContent = button.dataset.missing || "To draw it again:";
  line.hidden = !button.dataset.line;
  line.querySelector("code").textContent = button.dataset.line;
  line.querySelector("button").textContent = "Copy";
  if (!viewer.open) viewer.showModal();
}

function openNext(by) {
  const buttons = visible();
  open(buttons[(buttons.indexOf(opened) + by + buttons.length) % buttons.length]);
}

async function copy(button) {
  const code = button.parentElement.querySelector("code");
  try {
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(code);
    button.textContent = document.execCommand("copy") ? "Copied" : "Press Ctrl C";
  }
}

// --- the data ---

function filter() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const only = byId("held-out") && byId("held-out").checked;
  const cards = all(".card");
  let shown = 0;
  for (const card of cards) {
    const text = card.textContent.toLowerCase();
    card.hidden = (only && card.dataset.heldOut !== "yes") || !words.every((word) => text.includes(word));
    shown += card.hidden ? 0 : 1;
  }
  byId("shown").textContent = shown === cards.length ? "" : `${shown} of ${cards.length}`;
  byId("nothing").hidden = shown > 0;
}

function begin() {
  if (slider) {
    document.querySelector(".slider").hidden = false;
    slider.addEventListener("input", () => {
      stop();
      showStep();
    });
    byId("play").addEventListener("click", play);
    showStep();
  }
  all(".chart").forEach(readable);
  for (const button of all("button.open")) button.addEventListener("click", () => open(button));
  for (const button of all(".copy-line")) button.addEventListener("click", () => copy(button));
  byId("before").addEventListener("click", () => openNext(-1));
  byId("after").addEventListener("click", () => openNext(1));
  byId("close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("click", (event) => {
    if (event.target === viewer) viewer.close();
  });
  if (byId("search")) {
    document.querySelector(".tools").hidden = false;
    byId("search").addEventListener("input", filter);
    if (byId("held-out")) byId("held-out").addEventListener("change", filter);
  }
  document.addEventListener("keydown", (event) => {
    if (/^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "/" && byId("search") && !viewer.open) {
      event.preventDefault();
      byId("search").focus();
    } else if (by && viewer.open) {
      openNext(by);
    } else if (by && slider && !event.target.closest(".scroll")) {
      stop();
      goTo(Number(slider.value) + by);
    }
  });
}

begin();
