// Filters of items (docs/search.md): a form with conditions, or the JSON of the API.

import { parsed } from "./api.js";
import { append, el, field, fill, select } from "./dom.js";

const OPERATORS = [
  ["eq", "is"],
  ["ne", "is not"],
  ["in", "is one of"],
  ["lt", "less than"],
  ["lte", "at most"],
  ["gt", "more than"],
  ["gte", "at least"],
  ["contains", "contains"],
  ["prefix", "begins with"],
  ["exists", "exists"],
  ["missing", "is missing"],
];
const NUMBER = /^-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?$/; // as in JSON, so 05 is a text

/** A value as the user types it: 5 is a number, true is a boolean, "5" and all other texts are texts. */
export function typedValue(text) {
  const trimmed = text.trim();
  if (trimmed === "true" || trimmed === "false") return trimmed === "true";
  if (/^".*"$/.test(trimmed)) {
    try {
      return JSON.parse(trimmed);
    } catch {
      return trimmed;
    }
  }
  if (!NUMBER.test(trimmed)) return trimmed;
  const number = parsed(trimmed);
  if (typeof number === "bigint") return number;
  if (Number.isInteger(number) ? !Number.isSafeInteger(number) : !Number.isFinite(number)) {
    throw new Error(`${trimmed} is too large to be exact in a browser`);
  }
  return number;
}

/** The condition of a row of the form, or null if the row is not complete. */
export function conditionOf({ of, key, operator, value }) {
  if (of !== "id" && !key.trim()) return null;
  const subject = of === "id" ? { field: "id" } : { key: key.trim() };
  if (operator === "exists" || operator === "missing") return { ...subject, exists: operator === "exists" };
  if (value.trim() === "") return null;
  if (operator === "contains" || operator === "prefix") return { ...subject, [operator]: value };
  const typed = (text) => (of === "id" ? text.trim() : typedValue(text));
  if (operator !== "in") return { ...subject, [operator]: typed(value) };
  const values = value.split(",").filter((one) => one.trim() !== "");
  return { ...subject, in: values.map(typed) };
}

/** The rows of the form for a filter, as { join, rows }, or null if the form cannot express it. */
export function rowsOf(filter) {
  if (!filter) return { join: "and", rows: [] };
  const join = filter.or ? "or" : "and";
  const parts = filter.and ?? filter.or ?? [filter];
  if (Object.keys(filter).length > 1 && parts[0] !== filter) return null;
  const rows = Array.isArray(parts) ? parts.map(rowOf) : [null];
  return rows.includes(null) ? null : { join, rows };
}

function rowOf(condition) {
  const { key, field: name, ...rest } = condition ?? {};
  const of = name === "id" ? "id" : "key";
  const [operator, ...others] = Object.keys(rest);
  if (others.length || (of === "key" && typeof key !== "string")) return null;
  const value = rest[operator];
  if (operator === "exists") return { of, key: key ?? "", operator: value ? "exists" : "missing", value: "" };
  if (!OPERATORS.some(([one]) => one === operator)) return null;
  const values = operator === "in" ? value : [value];
  if (!Array.isArray(values) || values.some((one) => typeof one === "object" || String(one).includes(","))) return null;
  const literal = operator === "contains" || operator === "prefix" || of === "id";
  const text = (one) => (typeof one === "string" && !literal && typedValue(one) !== one ? JSON.stringify(one) : String(one));
  return { of, key: key ?? "", operator, value: values.map(text).join(", ") };
}

/** All given filters at once. Null if there are none. */
export function allOf(...filters) {
  const given = filters.filter(Boolean);
  return given.length > 1 ? { and: given } : (given[0] ?? null);
}

/** What a filter says, in one line. */
export function inWords(filter) {
  if (filter.and) return filter.and.map(inWords).join(" and ");
  if (filter.or) return `(${filter.or.map(inWords).join(" or ")})`;
  if (filter.not) return `not (${inWords(filter.not)})`;
  const { key, field: name, ...rest } = filter;
  return Object.entries(rest)
    .map(([operator, value]) => {
      const word = OPERATORS.find(([one]) => one === operator)?.[1] ?? operator;
      if (operator === "exists") return `${key} ${value ? "exists" : "is missing"}`;
      if (Array.isArray(value) && value.length > 3) return `${name ?? key} is one of ${value.length} values`;
      return `${name ?? key} ${word} ${JSON.stringify(value)}`;
    })
    .join(" and ");
}

/** The keys of metadata, as filters name them: the key `row` of the object `shelf` is `shelf.row`. */
export function keysOf(metadata, prefix = "") {
  return Object.entries(metadata ?? {}).flatMap(([name, value]) => {
    if (/["\\]/.test(name)) return [];
    const key = prefix + name.replaceAll(".", "\\.");
    return value && typeof value === "object" && !Array.isArray(value) ? keysOf(value, `${key}.`) : [key];
  });
}

/** A <datalist> of metadata keys. Call `.see(metadata, ...)` with the metadata that the user has seen. */
export function keyList(id) {
  const list = el("datalist", { id });
  const known = new Set();
  list.add = (...keys) => {
    for (const key of keys.flat()) {
      if (known.has(key) || known.size >= 200) continue;
      known.add(key);
      list.append(el("option", { value: key }));
    }
  };
  list.see = (...metadata) => list.add(metadata.flatMap((one) => keysOf(one)));
  list.clear = () => {
    known.clear();
    fill(list);
  };
  return list;
}

/** A form for a filter. `keys` is a `keyList`. `onchange` is called with the filter (null: none) when it changes.
 * `.value` is the filter, and `.set(filter)` shows another one. */
export function filterForm({ keys, onchange, initial = null }) {
  let rows = [];
  let value = initial;
  const join = select([["and", "all conditions match"], ["or", "any condition matches"]], { class: "filter-join", "aria-label": "How the conditions are joined", onchange: () => changed() });
  const list = el("div", { class: "filter-rows" });
  const text = el("textarea", { class: "code", rows: 5, spellcheck: "false", oninput: () => changed() });
  const raw = el("div", { hidden: true }, field("Filter as JSON", text, '{"key": "brand", "eq": "Arla"}'));
  const mode = el("button", { type: "button", class: "filter-mode", "aria-pressed": "false", onclick: () => toggle() }, "as JSON");
  const note = el("p", { class: "invalid", role: "status" });
  const add = el("button", { type: "button", class: "filter-add", onclick: () => addRow().focus() }, "add a condition");
  const conditions = el("div", {}, list, el("div", { class: "row" }, add, join, mode));
  const element = el("div", { class: "filter", role: "group", "aria-label": "Filter" }, conditions, raw, note);

  function addRow(given = { of: "key", key: "", operator: "eq", value: "" }) {
    const number = rows.length + 1;
    const of = select([["key", "metadata key"], ["id", "item id"]], { class: "filter-of", "aria-label": `Condition ${number}: of`, ".value": given.of });
    const key = el("input", { class: "filter-key", list: keys.id, "aria-label": `Condition ${number}: key`, placeholder: "key", ".value": given.key, spellcheck: "false", autocomplete: "off" });
    const operator = select(OPERATORS, { class: "filter-operator", "aria-label": `Condition ${number}: operator` });
    const input = el("input", { class: "filter-value", "aria-label": `Condition ${number}: value`, placeholder: "value", ".value": given.value, spellcheck: "false" });
    of.value = given.of;
    operator.value = given.operator;
    const row = { read: () => ({ of: of.value, key: key.value, operator: operator.value, value: input.value }) };
    const show = () => {
      key.hidden = of.value === "id";
      input.hidden = operator.value === "exists" || operator.value === "missing";
    };
    const remove = el("button", { type: "button", "aria-label": `Remove condition ${number}`, onclick: () => {
      rows = rows.filter((one) => one !== row);
      line.remove();
      add.focus();
      changed();
    } }, "remove");
    const line = el("div", { class: "row filter-row", oninput: () => { show(); changed(); } }, of, key, operator, input, remove);
    show();
    rows.push(row);
    append(list, line);
    join.hidden = rows.length < 2;
    return key;
  }

  function fromRows() {
    const found = rows.map((row) => conditionOf(row.read())).filter(Boolean);
    return found.length > 1 ? { [join.value]: found } : (found[0] ?? null);
  }

  function changed() {
    join.hidden = rows.length < 2;
    let next;
    try {
      next = raw.hidden ? fromRows() : text.value.trim() ? parsed(text.value) : null;
      if (next !== null && (typeof next !== "object" || Array.isArray(next))) throw new Error("a filter is a JSON object");
      fill(note);
    } catch (error) {
      fill(note, `The filter is not used: ${error.message}`);
      return;
    }
    if (JSON.stringify(next) === JSON.stringify(value)) return;
    value = next;
    onchange(value);
  }

  function show(asJson, given) {
    conditions.hidden = false;
    raw.hidden = !asJson;
    list.hidden = add.hidden = asJson;
    mode.setAttribute("aria-pressed", String(asJson));
    rows = [];
    fill(list);
    if (asJson) text.value = value ? JSON.stringify(value, null, 1) : "";
    else {
      given.rows.forEach(addRow);
      join.value = given.join;
    }
    join.hidden = asJson || rows.length < 2;
  }

  function toggle() {
    if (raw.hidden) return show(true);
    const given = rowsOf(value);
    if (given) show(false, given);
    else fill(note, "This filter cannot be shown as conditions.");
  }

  element.set = (filter) => {
    value = filter;
    fill(note);
    const given = rowsOf(filter);
    show(!given, given);
  };
  Object.defineProperty(element, "value", { get: () => value });
  element.set(initial);
  return element;
}
