// Groups of items by the value of a metadata key, each with a colour.

import { CATEGORIES, OTHER, css, rampColour } from "../colours.js";
import { el } from "../dom.js";

const BINS = 5;

/** The keys of the metadata whose values are text, numbers or true and false. */
export function metadataKeys(items) {
  const keys = new Set();
  for (const { metadata } of items) {
    for (const [key, value] of Object.entries(metadata)) if (isScalar(value)) keys.add(key);
  }
  return [...keys].sort();
}

/** The first key that divides the items into few groups, or "". */
export function dividingKey(items, keys) {
  const isDividing = (key) => {
    const { size } = new Set(items.map(({ metadata }) => metadata[key]));
    return size > 1 && size <= CATEGORIES.length && size * 2 <= items.length;
  };
  return keys.find(isDividing) ?? "";
}

const isScalar = (value) => ["string", "number", "bigint", "boolean"].includes(typeof value);

/** The groups of items by a key: [{ label, colour, indexes }]. Numbers with many values are divided into ranges. */
export function groupsOf(items, key) {
  if (!key) return [{ label: "all items", colour: CATEGORIES[0], indexes: items.map((_, i) => i) }];
  const byValue = new Map();
  items.forEach(({ metadata }, i) => {
    const value = isScalar(metadata[key]) ? metadata[key] : undefined;
    if (!byValue.has(value)) byValue.set(value, []);
    byValue.get(value).push(i);
  });
  const missing = byValue.get(undefined) ?? [];
  byValue.delete(undefined);
  const values = [...byValue.keys()];
  const isNumeric = values.length > CATEGORIES.length && values.every((value) => ["number", "bigint"].includes(typeof value));
  const groups = isNumeric ? ranges(byValue) : categories(byValue);
  if (missing.length) groups.push({ label: "no value", colour: OTHER, indexes: missing });
  return groups;
}

function categories(byValue) {
  const sorted = [...byValue].sort((a, b) => b[1].length - a[1].length || (String(a[0]) < String(b[0]) ? -1 : 1));
  const groups = sorted.slice(0, CATEGORIES.length).map(([value, indexes], i) => ({ label: String(value), colour: CATEGORIES[i], indexes }));
  const rest = sorted.slice(CATEGORIES.length);
  if (rest.length) groups.push({ label: `${rest.length} other values`, colour: OTHER, indexes: rest.flatMap(([, indexes]) => indexes) });
  return groups;
}

function ranges(byValue) {
  const values = [...byValue.keys()].map(Number);
  const low = values.reduce((a, b) => Math.min(a, b));
  const width = (values.reduce((a, b) => Math.max(a, b)) - low) / BINS;
  const text = (value) => Number(value.toPrecision(4));
  const groups = Array.from({ length: BINS }, (_, bin) => ({
    label: `${text(low + bin * width)} to ${text(low + (bin + 1) * width)}`, colour: rampColour(bin / (BINS - 1)), indexes: [],
  }));
  for (const [value, indexes] of byValue) groups[Math.min(Math.floor((Number(value) - low) / width), BINS - 1)].indexes.push(...indexes);
  return groups;
}

/** The legend: a button for each group, which selects its items. */
export function legend(groups, onselect) {
  return groups.map((group) => {
    const swatch = el("span", { class: "swatch", "aria-hidden": "true" });
    swatch.style.background = css(group.colour);
    const label = el("span", { class: "legend-label" }, group.label);
    return el("li", {}, el("button", { type: "button", onclick: (event) => onselect(group.indexes, event.shiftKey) }, swatch, " ", label, ` (${group.indexes.length})`));
  });
}
