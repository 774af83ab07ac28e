// Normal numbers of NumPy's Generator(Philox), bit for bit up to 3.65; above, the last bit of a logarithm may differ.
// The noise of sample i has the stream (seed, purpose, i).

const WORD = (1n << 64n) - 1n, LOW = 0xffffffffn;
const MULTIPLIERS = [0xd2e7470ee14c6c93n, 0xca5a826395121157n], WEYL = [0x9e3779b97f4a7c15n, 0xbb67ae8584caa73bn];

/** Four 64-bit words of Philox-4x64-10 (Salmon et al. 2011). */
function philox([a, b, c, d], [first, second]) {
  for (let turn = 0; turn < 10; turn++) {
    const p = a * MULTIPLIERS[0], q = c * MULTIPLIERS[1];
    [a, b, c, d] = [(q >> 64n) ^ b ^ first, q & WORD, (p >> 64n) ^ d ^ second, p & WORD];
    first = (first + WEYL[0]) & WORD;
    second = (second + WEYL[1]) & WORD;
  }
  return [a, b, c, d];
}

/** 32-bit words in NumPy's order: the counter is raised before each block, and low halves come first. */
function* words(seed, purpose, index) {
  for (let block = 1n; ; block++) {
    for (const word of philox([block, 0n, 0n, BigInt(index)], [BigInt(seed), BigInt(purpose)])) {
      yield Number(word & LOW);
      yield Number(word >> 32n);
    }
  }
}

// Ziggurat of 256 levels (Marsaglia & Tsang 2000) as NumPy has it for float32, with 23 random bits.
const LEVELS = 256, BITS = 2 ** 23, AREA = 0.00492867323399, END = 3.6541528853610088;
const bound = new Uint32Array(LEVELS), width = new Float32Array(LEVELS), density = new Float32Array(LEVELS);
{
  const exact = new Float64Array(LEVELS);
  let x = END;
  exact[LEVELS - 1] = Math.exp(-0.5 * x * x);
  width[LEVELS - 1] = x / BITS;
  bound[0] = (x * exact[LEVELS - 1]) / AREA * BITS;
  width[0] = AREA / exact[LEVELS - 1] / BITS;
  exact[0] = 1;
  for (let level = LEVELS - 2; level > 0; level--) {
    const next = Math.sqrt(-2 * Math.log(AREA / x + exact[level + 1]));
    bound[level + 1] = (next / x) * BITS;
    width[level] = next / BITS;
    exact[level] = Math.exp(-0.5 * next * next);
    x = next;
  }
  density.set(exact);
}

/** `count` normal numbers, float32. */
export function normals(seed, purpose, index, count) {
  const source = words(seed, purpose, index), draw = () => source.next().value, round = Math.fround;
  const uniform = () => (draw() >>> 8) / 2 ** 24;
  const found = new Float32Array(count);
  for (let n = 0; n < count; ) {
    const bits = draw(), level = bits & 0xff, size = (bits >>> 9) & 0x7fffff;
    const x = round(size * width[level]) * (bits & 0x100 ? -1 : 1);
    if (size < bound[level]) found[n++] = x;
    else if (level === 0) found[n++] = tail(uniform) * (size & 0x100 ? -1 : 1);
    else {
      const height = round(round(round(density[level - 1] - density[level]) * uniform()) + density[level]);
      if (height < Math.exp(-0.5 * x * x)) found[n++] = x;
    }
  }
  return found;
}

/** A number above END. */
function tail(uniform) {
  const log = () => Math.fround(Math.log1p(-uniform())), scale = Math.fround(1 / END);
  for (;;) {
    const x = Math.fround(-scale * log()), y = -log();
    if (y + y > x * x) return Math.fround(Math.fround(END) + x);
  }
}
