// Compares two rankings of the same images.

export function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

/** Take the first k of two rankings [{ id, score }], and say for each entry where the other model ranks it. Return both
 * lists and the number of images that are in both. */
export function compared(rankings, k) {
  const places = rankings.map((ranking) => new Map(ranking.map((one, i) => [one.id, i + 1])));
  const lists = rankings.map((ranking, side) => ranking.slice(0, k).map(({ id, score }, i) => {
    const there = places[1 - side].get(id);
    return { id, score, rank: i + 1, there, mark: markOf(i + 1, there, k) };
  }));
  return { lists, kept: lists[0].filter((one) => one.there <= k).length };
}

function markOf(here, there, k) {
  if (here === there) return "same rank";
  return there > k ? `only here; rank ${there} with the other model` : `rank ${there} with the other model`;
}

/** The share of the k nearest images that both models agree on, averaged over all images as queries. `sides` has the
 * vectors of each model, in the same order. With fewer images, all but one are used as k. */
export function keptShare(sides, k) {
  const total = sides[0].length;
  const most = Math.min(k, total - 1);
  let same = 0;
  for (let query = 0; query < total; query++) {
    const [first, second] = sides.map((rows) => nearest(rows, query, most));
    for (const one of first) same += second.has(one) ? 1 : 0;
  }
  return same / (total * most);
}

function nearest(rows, query, k) {
  const scores = rows.map((row, i) => [i === query ? -Infinity : dot(rows[query], row), i]);
  return new Set(scores.sort((a, b) => b[0] - a[0]).slice(0, k).map(([, i]) => i));
}
