// Masks in COCO's compressed run lengths: pixels in column order, runs of 0 and 1 in turns.

/** The pixels [height * width] of a mask, in row order, 0 or 1. */
export function decodeMask({ size: [height, width], counts }) {
  const mask = new Uint8Array(height * width);
  let position = 0;
  let value = 0;
  for (const run of runsOf(counts)) {
    if (value) for (let i = position; i < position + run; i++) mask[(i % height) * width + Math.floor(i / height)] = 1;
    position += run;
    value = 1 - value;
  }
  return mask;
}

/** The mask of pixels [height * width] in row order. Values other than 0 are inside. */
export function encodeMask(pixels, height, width) {
  const runs = [];
  let value = 0;
  let run = 0;
  for (let x = 0; x < width; x++) {
    for (let y = 0; y < height; y++) {
      const inside = pixels[y * width + x] ? 1 : 0;
      if (inside !== value) {
        runs.push(run);
        run = 0;
        value = inside;
      }
      run++;
    }
  }
  runs.push(run);
  return { size: [height, width], counts: textOf(runs) };
}

function runsOf(counts) {
  if (Array.isArray(counts)) return counts;
  const runs = [];
  let at = 0;
  while (at < counts.length) {
    let number = 0;
    let shift = 0;
    let more = true;
    while (more) {
      const code = counts.charCodeAt(at++) - 48;
      number |= (code & 31) << shift;
      more = (code & 32) !== 0;
      shift += 5;
      if (!more && code & 16) number |= -1 << shift;
    }
    if (runs.length > 2) number += runs[runs.length - 2];
    runs.push(number);
  }
  return runs;
}

function textOf(runs) {
  let text = "";
  runs.forEach((run, i) => {
    let number = i > 2 ? run - runs[i - 2] : run;
    let more = true;
    while (more) {
      let code = number & 31;
      number >>= 5;
      more = code & 16 ? number !== -1 : number !== 0;
      if (more) code |= 32;
      text += String.fromCharCode(code + 48);
    }
  });
  return text;
}
