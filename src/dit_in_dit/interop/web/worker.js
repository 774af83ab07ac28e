// Networks and sampling, beside the page's own thread.
import * as ort from "./ort.wasm.bundle.min.mjs";
import { normals } from "./noise.js";
import { sample } from "./sampler.js";

ort.env.wasm.wasmPaths = { wasm: new URL("./ort-wasm-simd-threaded.wasm", import.meta.url).href };
ort.env.wasm.numThreads = 1; // more need headers that static servers do not send

const sessions = new Map();

/** The bytes of a file; reports those that have arrived. */
async function load(file, report) {
  const answer = await fetch(file);
  if (!answer.ok) throw new Error(`${file}: ${answer.status}`);
  const parts = [];
  let bytes = 0;
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    report((bytes += value.length));
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

async function session(model) {
  if (!sessions.has(model.file)) {
    const bytes = await load(model.file, (loaded) => postMessage({ kind: "load", file: model.file, bytes: loaded }));
    sessions.set(model.file, await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] }));
  }
  return sessions.get(model.file);
}

function network(loaded, model) {
  return async (x, time, labels, count) => {
    const feeds = {
      x: new ort.Tensor("float32", x, [count, ...model.shape]),
      t: new ort.Tensor("float32", new Float32Array(count).fill(time), [count]),
    };
    if (model.classes.length) feeds.y = new ort.Tensor("int64", BigInt64Array.from(labels, BigInt), [count]);
    return (await loaded.run(feeds)).prediction.data;
  };
}

async function draw({ models, purpose, how }) {
  const size = models[0].shape.reduce((a, b) => a * b), noise = new Float32Array(how.count * size);
  for (let i = 0; i < how.count; i++) noise.set(normals(how.seed, purpose, i, size), i * size);
  for (const [number, model] of models.entries()) {
    const run = network(await session(model), model);
    const watch = (call, calls, x) => postMessage({ kind: "step", number, call, calls, x });
    postMessage({ kind: "image", number, x: await sample(run, model, how, noise, watch) });
  }
  postMessage({ kind: "done" });
}

// One picture after the other: a session runs one call at a time.
let before = Promise.resolve();
onmessage = ({ data }) => {
  before = before.then(() => draw(data)).catch((error) => postMessage({ kind: "error", text: String(error) }));
};
