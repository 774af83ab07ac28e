// The controls, and the pictures of each model.
const $ = (name) => document.getElementById(name);
const element = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};
const state = (text) => (document.body.dataset.state = text);

const { purpose, models } = await (await fetch("models.json")).json();
const [first] = models, [channels, height, width] = first.shape;
const worker = new Worker("worker.js", { type: "module" });
let canvases = [];
const ALL = "all"; // of the class menu

/** The settings; those of the address (#class=1&seed=5) come before the run's own. */
function makeControls() {
  const given = new URLSearchParams(location.hash.slice(1));
  if (first.classes.length) $("class").append(element("option", { value: ALL, textContent: "all in turn" }));
  first.classes.forEach((name, value) => $("class").append(element("option", { value, textContent: name })));
  const shared = Object.keys(first.tables).filter((steps) => models.every((model) => steps in model.tables));
  shared.forEach((value) => $("steps").append(element("option", { value, textContent: value })));
  $("class").parentElement.hidden = !first.classes.length;
  $("guidance").parentElement.hidden = models.every((model) => model.null === null);
  const defaults = { class: ALL, seed: 0, count: 4, guidance: first.guidance, steps: first.steps };
  for (const [name, value] of Object.entries(defaults)) $(name).value = given.get(name) ?? value;
  if (!$("steps").value) $("steps").value = shared[0];
  $("controls").addEventListener("submit", (event) => { event.preventDefault(); start(); });
}

/** The class of each image; as in Python, all classes take turns. */
function labels(count) {
  const chosen = $("class").value;
  return Array.from({ length: count }, (_, i) => (chosen === ALL ? i % first.classes.length : Number(chosen)));
}

function makeRows() {
  models.forEach((model, number) => $("models").append(element("section", {},
    element("h2", { textContent: model.name }),
    element("p", { textContent: `${model.about}; ${model.sampler}` }),
    element("div", { className: "images", id: `images-${number}` }),
    element("progress", { id: `progress-${number}`, value: 0, max: 1 }),
  )));
}

function start() {
  if (!$("controls").reportValidity()) return;
  const numbers = Object.fromEntries(["count", "guidance", "steps"].map((name) => [name, Number($(name).value)]));
  const how = { ...numbers, labels: labels(numbers.count), seed: $("seed").value };
  const names = ["class", "seed", "count", "guidance", "steps"];
  history.replaceState(null, "", "#" + new URLSearchParams(names.map((name) => [name, $(name).value])));
  canvases = models.map((_, number) => {
    const made = Array.from({ length: how.count }, () => element("canvas", { width, height }));
    $(`images-${number}`).replaceChildren(...made);
    return made;
  });
  $("draw").disabled = true;
  $("message").textContent = "loading";
  state("busy");
  worker.postMessage({ models, purpose, how });
}

/** Images (N, C, H, W) in [-1, 1] on the canvases of a model. */
function show(number, x) {
  const pixels = height * width;
  canvases[number].forEach((canvas, n) => {
    const image = new ImageData(width, height);
    for (let i = 0; i < pixels; i++) {
      for (let c = 0; c < 3; c++) image.data[4 * i + c] = x[(n * channels + c % channels) * pixels + i] * 127.5 + 127.5;
      image.data[4 * i + 3] = 255;
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  });
}

worker.onmessage = ({ data }) => {
  if (data.kind === "load") $("message").textContent = `${data.file}: ${(data.bytes / 1e6).toFixed(1)} MB`;
  if (data.kind === "step" || data.kind === "image") {
    show(data.number, data.x);
    Object.assign($(`progress-${data.number}`), data.kind === "image" ? { value: 1, max: 1 } : { value: data.call, max: data.calls });
    $("message").textContent = data.kind === "step" ? `${models[data.number].name}: ${data.call + 1} of ${data.calls}` : "";
  }
  if (data.kind === "done" || data.kind === "error") {
    $("draw").disabled = false;
    $("message").textContent = data.text ?? "";
    state(data.kind);
  }
};
worker.onerror = (event) => { $("message").textContent = `worker: ${event.message}`; state("error"); };

makeControls();
makeRows();
start();
