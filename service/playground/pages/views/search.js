// Similar images: the query, the options and the filter, and the results page by page.

import { collectionPath, json } from "../api.js";
import { announce, busy, el, field, fill, select } from "../dom.js";
import { allOf, filterForm, inWords, keyList } from "../filters.js";
import { currentCollection, currentFilter, setCollection, setFilter } from "../state.js";
import { queryPanel, searchCall } from "./search-query.js";
import { results } from "./search-results.js";

const MAX_DEPTH = 10_000; // the highest k + offset of the API
const kept = { k: "12", threshold: "", groupBy: "", groupSize: "3", rerank: false, filter: null }; // until the page is reloaded

export function mount(place, parameters) {
  const collections = new Map(); // the API's description of each collection by its name
  const leaving = new AbortController();
  let running = new AbortController();
  let timer = 0;
  let offset = 0;
  let shown = 0; // the number of results or groups on the page
  let isRunning = false;

  const keys = keyList("search-keys");
  const collection = select([], { id: "search-collection", onchange: () => useCollection(collection.value) });
  const panel = queryPanel({ collection: () => collection.value, onchange: () => changed(0), onitems: (items) => see(items) });
  const number = (id, name, attributes) =>
    el("input", { id, type: "number", ".value": kept[name], ...attributes, oninput: (event) => keep(name, event.target.value) });
  const k = number("search-k", "k", { min: 1, max: 1000, required: true });
  const threshold = number("search-threshold", "threshold", { min: -1, max: 1, step: "any" });
  const groupSize = number("search-group-size", "groupSize", { min: 1, max: 100, required: true });
  const groupBy = el("input", { id: "search-group-by", list: keys.id, autocomplete: "off", spellcheck: "false", ".value": kept.groupBy, oninput: () => keep("groupBy", groupBy.value) });
  const rerank = el("input", { id: "search-rerank", type: "checkbox", ".checked": kept.rerank, onchange: () => keep("rerank", rerank.checked) });
  const rerankNote = el("small", { id: "rerank-note" });
  const filter = filterForm({ keys, initial: kept.filter, onchange: (value) => keep("filter", value) });
  const chip = el("p", { id: "search-chip", hidden: true });
  const optionsTitle = el("summary", {}, "Options and filter");
  const summary = el("p", { id: "search-summary", tabindex: "-1" });
  const found = el("div", { id: "search-results" });
  const previous = el("button", { id: "search-previous", type: "button", disabled: true, onclick: () => turn(-1) }, "Previous");
  const next = el("button", { id: "search-next", type: "button", disabled: true, onclick: () => turn(1) }, "Next");
  const pages = el("nav", { class: "row", "aria-label": "Pages of results", hidden: true }, previous, next);
  const list = results({ panel, collection: () => collection.value });

  fill(place, el("h2", {}, "Search"), keys,
    el("div", { class: "side-by-side" },
      el("div", { class: "side" },
        field("Collection", collection),
        panel,
        el("details", { id: "search-options", open: !matchMedia("(max-width: 55rem)").matches }, optionsTitle,
          field("Results per page", k), field("Lowest score", threshold, "from -1 to 1; empty: no limit"),
          field("Group by", groupBy, "a metadata key"), field("Results per group", groupSize),
          el("div", { class: "check" }, rerank, el("label", { for: rerank.id }, "Re-rank by patches"), rerankNote),
          el("h3", {}, "Filter"), chip, filter)),
      el("div", { class: "wide" }, summary, found, pages)));
  showChip();
  start();

  function keep(name, value) {
    kept[name] = value;
    changed(typeof value === "boolean" ? 0 : 250);
  }

  /** The query or an option is different: search again from the first result, when the user has stopped typing. */
  function changed(wait) {
    offset = 0;
    clearTimeout(timer);
    running.abort();
    timer = setTimeout(search, wait);
  }

  function showChip() {
    const given = currentFilter();
    chip.hidden = !given;
    fill(chip, given && el("span", { class: "chip" }, `Chosen on another page: ${inWords(given)} `,
      el("button", { type: "button", onclick: () => { setFilter(null); showChip(); changed(0); } }, "remove this filter")));
  }

  async function start() {
    const answer = await busy(found, () => json({ path: "/v1/collections", shown: false, signal: leaving.signal }));
    if (!answer || !place.isConnected) return;
    for (const one of answer.data) collections.set(one.name, one);
    if (!collections.size) {
      return fill(found, el("p", {}, "There is no collection yet. "), el("p", {}, el("a", { href: "#collections" }, "Create one and add images.")));
    }
    collection.append(...[...collections.keys()].map((name) => el("option", { value: name }, name)));
    const wanted = [parameters.get("collection"), currentCollection()].find((name) => collections.has(name));
    collection.value = wanted ?? collection.options[0].value;
    if (parameters.get("id") !== null) panel.useItem(parameters.get("id"), collection.value);
    useCollection(collection.value);
  }

  async function useCollection(name) {
    setCollection(name);
    panel.reset();
    keys.clear();
    keys.add(collections.get(name).indexed);
    changed(0);
    try {
      const body = { limit: 50 };
      const call = { method: "POST", path: collectionPath(name, "items", "scroll"), json: body, shown: false, signal: leaving.signal };
      const { data } = await json(call);
      if (collection.value === name) see(data);
    } catch (error) {
      console.debug(error); // only the suggestions are missing, and the search itself shows what is wrong
    }
  }

  function showRerank() {
    const { originals } = collections.get(collection.value);
    const { examples } = panel.query();
    rerank.disabled = !originals || examples.length > 0;
    const reason = originals ? "not with further examples" : "only for collections that store their images";
    fill(rerankNote, rerank.disabled ? reason : null);
  }

  function see(items) {
    keys.see(...items.map((item) => item.metadata));
  }

  function usedFilter() {
    return allOf(currentFilter(), filter.value);
  }

  function options() {
    return {
      k: Number(k.value),
      offset: offset || undefined,
      score_threshold: threshold.value === "" ? undefined : Number(threshold.value),
      filter: usedFilter() ?? undefined,
      group_by: groupBy.value.trim() || undefined,
      group_size: groupBy.value.trim() ? Number(groupSize.value) : undefined,
      rerank: rerank.checked && !rerank.disabled ? "patches" : undefined,
    };
  }

  async function search() {
    running.abort();
    running = new AbortController();
    const { signal } = running;
    const wrong = [k, threshold, groupSize].find((input) => !input.checkValidity());
    if (wrong) return showNothing(`${wrong.labels[0].textContent}: ${wrong.validationMessage}`);
    if (!collection.value) return;
    fill(optionsTitle, `Options and filter${usedFilter() ? " (a filter is set)" : ""}`);
    showAddress();
    showRerank();
    if (panel.isEmpty()) {
      fill(found);
      return showNothing("Choose an image, and the most similar images of the collection appear here.");
    }
    isRunning = true;
    const answer = await busy(found, async () => {
      const name = collection.value;
      if (panel.query().item && panel.query().item.collection !== name) await panel.arrived(); // only its image can be searched for
      signal.throwIfAborted();
      return json({ ...(await searchCall(name, panel.query(), options())), signal });
    });
    if (signal.aborted || !place.isConnected) return;
    isRunning = false;
    if (!answer) return showNothing("The search has failed.");
    const rows = answer.groups ?? answer.data;
    see(answer.groups ? rows.flatMap((group) => group.data) : rows);
    shown = rows.length;
    fill(found, list(answer, offset));
    const ends = { previous: offset === 0, next: shown < Number(k.value) || offset + 2 * Number(k.value) > MAX_DEPTH };
    if ([previous, next].includes(document.activeElement) && ends[document.activeElement === next ? "next" : "previous"]) summary.focus();
    pages.hidden = ends.previous && ends.next;
    previous.disabled = ends.previous;
    next.disabled = ends.next;
    fill(summary, inNumbers(answer));
    announce(summary.textContent);
  }

  function showNothing(reason) {
    isRunning = false;
    previous.disabled = next.disabled = true;
    pages.hidden = true;
    fill(summary, reason);
    announce(reason);
  }

  function inNumbers(answer) {
    const kind = answer.groups ? "groups" : "results";
    const took = `in ${answer.timings.total.toFixed(0)} ms`;
    const only = usedFilter() ? ` Filter: ${inWords(usedFilter())}.` : "";
    if (!shown) return `${offset ? `No more ${kind}.` : `No ${kind}, ${took}.`}${only}`;
    const more = answer.truncated ? " There may be more groups: use a filter." : "";
    return `${answer.groups ? "Groups" : "Results"} ${offset + 1} to ${offset + shown} of collection ${answer.collection}, ${took}.${only}${more}`;
  }

  function turn(direction) {
    if (isRunning) return; // a second click before the page is there
    offset = Math.max(0, offset + direction * Number(k.value));
    search();
  }

  function showAddress() {
    const { item } = panel.query();
    const given = new URLSearchParams({ collection: collection.value });
    if (item && item.collection === collection.value) given.set("id", item.id);
    history.replaceState(null, "", `#search?${given}`);
  }

  return () => {
    clearTimeout(timer);
    leaving.abort();
    running.abort();
    panel.stop();
  };
}
