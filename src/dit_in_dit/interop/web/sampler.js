// From noise to images: the tables of models.json, and classifier-free guidance.

/** Row k of a table applied to the noise and the predictions before call k; sums in float64. */
function combine(row, terms) {
  const sum = new Float64Array(terms[0].length);
  row.forEach((weight, term) => {
    if (weight !== 0) for (let i = 0, of = terms[term]; i < sum.length; i++) sum[i] += weight * of[i];
  });
  return Float32Array.from(sum);
}

/**
 * Sample N images, (N, C, H, W) in [-1, 1].
 *
 * @param network  async (x, t, y, count) -> prediction (count, C or 2C, H, W), Float32Array
 * @param model  an entry of models.json
 * @param how  steps and guidance, the same for all images, and their labels (N)
 * @param noise  Float32Array (N, C, H, W)
 * @param watch  called before each network call with its number, the number of calls, and x
 */
export async function sample(network, model, how, noise, watch) {
  const { times, rows } = model.tables[how.steps], terms = [noise];
  for (const [call, time] of times.entries()) {
    const x = combine(rows[call], terms);
    watch(call, times.length, x);
    terms.push(await guided(network, model, how, x, time));
  }
  return combine(rows[times.length], terms);
}

/** The prediction for x (N, C, H, W), guided within the model's interval of t, as in Python. */
async function guided(network, model, how, x, time) {
  const [channels, height, width] = model.shape, image = channels * height * width, count = x.length / image;
  const inside = model.interval[0] <= time && time <= model.interval[1];
  if (how.guidance === 1 || model.null === null || !inside) {
    return first(await network(x, time, how.labels, count), count, image);
  }
  const twice = new Float32Array(2 * x.length);
  twice.set(x);
  twice.set(x, x.length);
  const labels = [...how.labels, ...Array(count).fill(model.null)];
  const both = first(await network(twice, time, labels, 2 * count), 2 * count, image);
  const given = both.subarray(0, x.length), none = both.subarray(x.length);
  const led = model.guidance_channels * height * width;
  return given.map((value, i) => (i % image < led ? none[i] + how.guidance * (value - none[i]) : value));
}

/** The prediction's first C channels; a learned variance comes after them. */
function first(prediction, count, image) {
  const own = prediction.length / count;
  if (own === image) return prediction;
  const kept = new Float32Array(count * image);
  for (let n = 0; n < count; n++) kept.set(prediction.subarray(n * own, n * own + image), n * image);
  return kept;
}
