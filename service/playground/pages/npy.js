// Reads arrays in numpy's file format.

const TYPES = { "<f4": Float32Array, "<f8": Float64Array, "<i4": Int32Array, "|u1": Uint8Array };

/** Read an array from an ArrayBuffer. Return its shape and its data, in C order. */
export function parseNpy(buffer) {
  const bytes = new Uint8Array(buffer);
  if (bytes[0] !== 0x93 || String.fromCharCode(...bytes.subarray(1, 6)) !== "NUMPY") throw new Error("not a NPY file");
  const view = new DataView(buffer);
  const isFirst = bytes[6] === 1;
  const length = isFirst ? view.getUint16(8, true) : view.getUint32(8, true);
  const begin = isFirst ? 10 : 12;
  const header = new TextDecoder("latin1").decode(bytes.subarray(begin, begin + length));
  const type = /'descr': '([^']+)'/.exec(header)?.[1];
  if (!(type in TYPES) || /'fortran_order': True/.test(header)) throw new Error(`arrays of ${type} cannot be read`);
  const shape = /'shape': \(([^)]*)\)/.exec(header)[1].split(",").filter((part) => part.trim()).map(Number);
  return { shape, data: new TYPES[type](buffer.slice(begin + length)) };
}
