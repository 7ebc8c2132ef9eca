// Counts the values of a metadata key. A value can be used as the filter of the items.

import { collectionPath, json } from "../api.js";
import { announce, busy, el, field, fill } from "../dom.js";

const LIMIT = 100;

/** The part of the page that counts. `onchoose` gets the filter for a value. Call `.stop()` when it is left. */
export function facetsPanel({ collection, keys, onchoose }) {
  let running = new AbortController();
  const key = el("input", { id: "facet-key", list: keys.id, required: true, autocomplete: "off", spellcheck: "false" });
  const found = el("div", { id: "facet-values" });
  const element = el("form", { onsubmit: (event) => { event.preventDefault(); count(); } },
    el("div", { class: "row" }, field("Key", key), el("button", { type: "submit" }, "Count")), found);

  async function count() {
    running.abort();
    running = new AbortController();
    const { signal } = running;
    const wanted = key.value.trim();
    const call = { method: "POST", path: collectionPath(collection, "items", "facets"), json: { key: wanted, limit: LIMIT }, signal };
    const answer = await busy(found, () => json(call));
    if (!answer || signal.aborted) return;
    const most = answer.data[0]?.count ?? 1;
    const row = ({ value, count }) => el("tr", {},
      el("th", { scope: "row" }, typeof value === "string" ? value : JSON.stringify(value)), el("td", {}, String(count)),
      el("td", {}, el("meter", { min: 0, max: most, value: count, "aria-label": `${count} items` })),
      el("td", {}, el("button", { type: "button", onclick: () => onchoose({ key: wanted, eq: value }) }, "show these",
        el("span", { class: "hidden-text" }, ` items: ${value}`))));
    const more = answer.distinct > answer.data.length ? ` The ${answer.data.length} most frequent are shown.` : "";
    const sentence = `${answer.distinct} different ${answer.distinct === 1 ? "value" : "values"}.${more}`;
    fill(found, el("p", {}, sentence), answer.data.length > 0 && el("table", {},
      el("thead", {}, el("tr", {}, ["Value", "Items", "Share", "Filter"].map((title) => el("th", { scope: "col" }, title)))),
      el("tbody", {}, answer.data.map(row))));
    announce(sentence);
  }

  element.stop = () => running.abort();
  return element;
}
