// Lays out vectors in two dimensions, in a worker. Equal vectors always give equal positions.
//
// Gets { vectors: Float32Array [n * dimension], dimension, layout: "pca" or "neighbours" }. Posts { progress: 0 to 1, text }
// and { positions: Float32Array [n * 2], isFinal }.

const COMPONENTS = 30;
const NEIGHBOURS = 12;
const EPOCHS = 200;
const GRAVITY = 0.03; // pulls everything to the centre, so that groups do not drift far apart
const COVARIANCE_BUDGET = 1e9; // products; a larger matrix is computed from every second, third, ... vector

self.addEventListener("message", ({ data: { vectors, dimension, layout } }) => {
  const n = vectors.length / dimension;
  progress(0, "principal components");
  const { rows, width } = principalComponents(vectors, n, dimension);
  const positions = new Float32Array(n * 2);
  for (let i = 0; i < n; i++) {
    positions[2 * i] = rows[i * width];
    positions[2 * i + 1] = width > 1 ? rows[i * width + 1] : 0;
  }
  normalise(positions);
  if (layout === "pca" || n < 4) return send(positions, true);
  send(positions, false);
  const neighbours = nearestNeighbours(rows, n, width, Math.min(NEIGHBOURS, Math.max(3, Math.round(n / 8))));
  embed(positions, neighbours, n);
  normalise(positions);
  send(positions, true);
});

const progress = (share, text) => self.postMessage({ progress: share, text });
const send = (positions, isFinal) => self.postMessage({ positions: positions.slice(), isFinal });

/** A generator of equal numbers from 0 to 1 in every run (xorshift). */
function generator() {
  let state = 2463534242;
  return () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) / 4294967296;
  };
}

/** The first principal components of all vectors: { rows: Float32Array [n * width], width }. */
function principalComponents(vectors, n, dimension) {
  const width = Math.min(COMPONENTS, dimension);
  const mean = new Float64Array(dimension);
  for (let i = 0; i < n; i++) for (let j = 0; j < dimension; j++) mean[j] += vectors[i * dimension + j] / n;
  const basis = eigenvectors(covariance(vectors, n, dimension, mean), dimension, width);
  const rows = new Float32Array(n * width);
  const centred = new Float64Array(dimension);
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < dimension; j++) centred[j] = vectors[i * dimension + j] - mean[j];
    for (let c = 0; c < width; c++) {
      let sum = 0;
      for (let j = 0; j < dimension; j++) sum += centred[j] * basis[c * dimension + j];
      rows[i * width + c] = sum;
    }
  }
  return { rows, width };
}

function covariance(vectors, n, dimension, mean) {
  const step = Math.max(1, Math.ceil((n * dimension * dimension) / 2 / COVARIANCE_BUDGET));
  const matrix = new Float64Array(dimension * dimension);
  const centred = new Float64Array(dimension);
  for (let i = 0; i < n; i += step) {
    for (let j = 0; j < dimension; j++) centred[j] = vectors[i * dimension + j] - mean[j];
    for (let a = 0; a < dimension; a++) {
      const factor = centred[a];
      const row = a * dimension;
      for (let b = a; b < dimension; b++) matrix[row + b] += factor * centred[b];
    }
    if (i % 500 < step) progress((0.3 * i) / n, "principal components");
  }
  for (let a = 0; a < dimension; a++) for (let b = 0; b < a; b++) matrix[a * dimension + b] = matrix[b * dimension + a];
  return matrix;
}

/** The eigenvectors of the `count` largest eigenvalues, one per row, by power iteration of all of them together. */
function eigenvectors(matrix, dimension, count) {
  const random = generator();
  let basis = Float64Array.from({ length: count * dimension }, () => random() - 0.5);
  orthonormalise(basis, count, dimension);
  for (let step = 0; step < 40; step++) {
    const next = new Float64Array(count * dimension);
    for (let c = 0; c < count; c++) {
      for (let a = 0; a < dimension; a++) {
        let sum = 0;
        for (let b = 0; b < dimension; b++) sum += matrix[a * dimension + b] * basis[c * dimension + b];
        next[c * dimension + a] = sum;
      }
    }
    orthonormalise(next, count, dimension);
    basis = next;
  }
  for (let c = 0; c < count; c++) {
    // The sign of an eigenvector is arbitrary: make its sum positive.
    const vector = basis.subarray(c * dimension, (c + 1) * dimension);
    if (vector.reduce((sum, value) => sum + value, 0) < 0) vector.forEach((value, j) => (vector[j] = -value));
  }
  return basis;
}

/** Gram-Schmidt. Vectors that depend on earlier ones become zero. */
function orthonormalise(basis, count, dimension) {
  for (let c = 0; c < count; c++) {
    const vector = basis.subarray(c * dimension, (c + 1) * dimension);
    const before = Math.hypot(...vector);
    for (let other = 0; other < c; other++) {
      const first = basis.subarray(other * dimension, (other + 1) * dimension);
      let product = 0;
      for (let j = 0; j < dimension; j++) product += vector[j] * first[j];
      for (let j = 0; j < dimension; j++) vector[j] -= product * first[j];
    }
    const norm = Math.hypot(...vector);
    const scale = norm > 1e-9 * before && norm > 0 ? 1 / norm : 0;
    for (let j = 0; j < dimension; j++) vector[j] *= scale;
  }
}

/** Centre the positions, and scale them so that their largest absolute coordinate is 10. */
function normalise(positions) {
  for (const axis of [0, 1]) {
    let [low, high] = [Infinity, -Infinity];
    for (let i = axis; i < positions.length; i += 2) [low, high] = [Math.min(low, positions[i]), Math.max(high, positions[i])];
    for (let i = axis; i < positions.length; i += 2) positions[i] -= (low + high) / 2;
  }
  const largest = positions.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  if (largest > 0) for (let i = 0; i < positions.length; i++) positions[i] *= 10 / largest;
}

/** The `k` nearest neighbours of each row, by comparing all pairs: Int32Array [n * k], not ordered. */
function nearestNeighbours(rows, n, width, k) {
  const ids = new Int32Array(n * k).fill(-1);
  const distances = new Float32Array(n * k).fill(Infinity);
  const worst = new Float32Array(n).fill(Infinity); // the largest distance among the neighbours of a row
  const slot = new Int32Array(n); // where that neighbour is
  const insert = (i, j, distance) => {
    const at = i * k + slot[i];
    ids[at] = j;
    distances[at] = distance;
    let largest = -1;
    for (let s = 0; s < k; s++) {
      if (distances[i * k + s] > largest) [largest, slot[i]] = [distances[i * k + s], s];
    }
    worst[i] = largest;
  };
  for (let i = 0; i < n; i++) {
    for (let j = i + 1; j < n; j++) {
      const most = worst[i] > worst[j] ? worst[i] : worst[j];
      let distance = 0;
      // The first components have the largest variance, so most pairs need only a few of them.
      for (let c = 0; c < width && distance < most; c++) {
        const difference = rows[i * width + c] - rows[j * width + c];
        distance += difference * difference;
      }
      if (distance < worst[i]) insert(i, j, distance);
      if (distance < worst[j]) insert(j, i, distance);
    }
    if (i % 200 === 0) progress(0.3 + 0.3 * (1 - (1 - i / n) ** 2), "nearest neighbours");
  }
  return ids;
}

/** Move the positions, so that neighbours attract and random pairs repel each other, with decreasing steps. */
function embed(positions, neighbours, n) {
  const random = generator();
  const k = neighbours.length / n;
  for (let epoch = 0; epoch < EPOCHS; epoch++) {
    const rate = 1 - epoch / EPOCHS;
    for (let i = 0; i < positions.length; i++) positions[i] *= 1 - GRAVITY * rate;
    for (let edge = 0; edge < neighbours.length; edge++) {
      const i = Math.floor(edge / k);
      if (neighbours[edge] < 0) continue;
      pull(positions, i, neighbours[edge], rate);
      for (let sample = 0; sample < 4; sample++) push(positions, i, Math.floor(random() * n), rate);
    }
    if (epoch % 10 === 9) {
      progress(0.6 + (0.4 * epoch) / EPOCHS, "layout by neighbours");
      send(positions, false);
    }
  }
}

const clipped = (value) => (value > 4 ? 4 : value < -4 ? -4 : value);

function pull(positions, i, j, rate) {
  const dx = positions[2 * i] - positions[2 * j];
  const dy = positions[2 * i + 1] - positions[2 * j + 1];
  const force = 1 / (1 + dx * dx + dy * dy);
  const [x, y] = [rate * clipped(force * dx), rate * clipped(force * dy)];
  positions[2 * i] -= x;
  positions[2 * i + 1] -= y;
  positions[2 * j] += x;
  positions[2 * j + 1] += y;
}

function push(positions, i, j, rate) {
  if (i === j) return;
  const dx = positions[2 * i] - positions[2 * j];
  const dy = positions[2 * i + 1] - positions[2 * j + 1];
  const square = dx * dx + dy * dy;
  const force = 1 / ((0.01 + square) * (1 + square));
  positions[2 * i] += rate * clipped(force * dx);
  positions[2 * i + 1] += rate * clipped(force * dy);
}
