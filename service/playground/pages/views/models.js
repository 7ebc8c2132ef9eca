// Models: the live one, candidates, former and available ones, and the comparison of two models on the same query.

import { json } from "../api.js";
import { announce, busy, confirmed, el, errorBox, facts, field, fill, select, stateBadge, timeText } from "../dom.js";
import { pause } from "../events.js";
import { latest } from "./image-common.js";
import { comparison } from "./models-compare.js";

const ASK_MS = 200;
const MOST_ASKED = 25;

const STATES = {
  live: "Answers requests",
  candidate: "Is loaded beside the live model, on trial or because it is about to become live",
  former: "Was live before; a rollback makes it live again",
  available: "Is in the data folder and was never live",
  retired: "Was live before, and is no longer loaded",
};

export function mount(place) {
  const abort = new AbortController();
  const { signal } = abort;
  const list = el("div", { id: "models" });
  const note = el("div", { id: "models-note" });
  const compare = comparison({ signal, onchange: () => show() });
  place.append(el("h2", {}, "Models"), note, list, el("h2", { id: "compare-title" }, "Live and other model side by side"), compare.element);

  const next = latest(signal);
  async function show() {
    const own = next();
    const answer = await busy(list, () => json({ path: "/v1/models", signal: own }));
    if (!answer || own.aborted) return;
    fill(list, answer.data.map((model) => card(model, answer.data)));
    compare.setModels(answer.data);
    window.dispatchEvent(new Event("live-model"));
  }

  function card(model, all) {
    const title = `model-${model.generation ?? "x"}-${model.fingerprint.slice(0, 12)}`;
    return el("article", { class: "card model", "data-model": model.id, "aria-labelledby": title },
      el("h3", { id: title }, model.id, " ", stateBadge(model.state)),
      el("p", { class: "quiet" }, model.state === "candidate" && !model.loaded
        ? `Is not loaded yet${model.load_error ? `, because it cannot be: ${model.load_error}` : "."}` : `${STATES[model.state]}.`),
      el("div", { class: "columns" },
        facts([
          ["Fingerprint", [el("code", {}, model.fingerprint)]],
          ["Engine", model.engine],
          ["Precision", model.precision],
          ["Generation", model.generation],
          ["Live since", timeText(model.live_since)],
          ["Rollback until", model.keep_until ? [timeText(model.keep_until), ` (${timeLeft(model.keep_until)})`] : null],
          ["Exported", timeText(model.created_at)],
          ["Dimensions", model.dimensions],
          ["Input", `${model.input_size.join(" × ")}, patches of ${model.patch_size}`],
          ["Licence", model.licence],
        ]),
        el("div", {}, el("h4", {}, "Lineage"), facts(lineage(model, all)),
          el("details", {}, el("summary", {}, "All of its provenance"), el("pre", {}, JSON.stringify(model.provenance, null, 1))))),
      el("details", { open: Object.keys(model.metrics).length > 0 }, el("summary", {}, "Metrics"), metrics(model)),
      el("div", { class: "row" }, buttons(model)));
  }

  function buttons(model) {
    const button = (label, work, attributes = {}) => el("button", { type: "button", onclick: work, ...attributes }, label);
    const link = (label, query) => el("a", { href: `#jobs?${new URLSearchParams(query)}` }, label);
    return [
      model.state === "former" ? button("Roll back to it", () => rollBack(model)) : null,
      ["candidate", "available", "retired", "former"].includes(model.state) ? [
        button("Compare with the live model", () => compare.choose(model), { class: "primary" }),
        button("Promote", () => promote(model)),
      ] : null,
      model.state === "candidate" ? button("Unload", () => change("unload", model)) : null,
      ["available", "retired"].includes(model.state) ? button("Delete", () => remove(model)) : null,
      link("Evaluate", { start: "evaluate", model: model.id }),
      model.state === "live" ? link("Retrain from here", { start: "retrain" })
        : link("Train from here", { start: "train", recipe: "continue", overrides: `init=${model.id}` }),
    ];
  }

  const change = (action, model) => busy(note, async () => {
    fill(note);
    await json({ method: "POST", path: `/v1/models/${action}`, json: { model: model.id } });
    await show();
  });

  async function promote(model) {
    const lost = select([["refuse", "do not start"], ["keep", "keep their collections on the old model"], ["drop", "drop these items"]], { id: "promote-lost" });
    const hours = el("input", { type: "number", id: "promote-hours", value: "24", min: "0", step: "any", required: true });
    const job = await confirmed(`Promote ${model.id}?`, {
      text: "A job embeds all collections again, and then makes this model live. The service goes on answering meanwhile.",
      fields: [field("If items have no stored image", lost), field("Hours for which a rollback is possible", hours)],
      action: "Promote",
      work: () => json({
        method: "POST", path: "/v1/jobs",
        json: { kind: "reindex", model: model.generation ? String(model.generation) : model.id, promote: true, lost: lost.value, keep_hours: Number(hours.value) },
      }),
    });
    if (job) location.hash = `#jobs?job=${encodeURIComponent(job.id)}`;
  }

  async function rollBack(model) {
    const force = el("input", { type: "checkbox", id: "rollback-force" });
    const answer = await confirmed(`Roll back to ${model.id}?`, {
      text: "It is live again at once, with all collections as they are now. Another rollback is not possible afterwards.",
      fields: [el("p", {}, force, " ", el("label", { for: "rollback-force" }, "Leave out items that were written without an image since the switch"))],
      action: "Roll back",
      work: () => json({ method: "POST", path: "/v1/models/rollback", json: force.checked ? { force: true } : {} }),
    });
    if (!answer) return;
    const missing = Object.entries(answer.lacking).map(([name, count]) => ` ${name} lacks ${count} items.`);
    await busy(list, () => becomesLive(answer.generation, signal));
    fill(note, el("p", { role: "status" }, `${answer.model} is live again.`, missing));
    await show();
  }

  async function remove(model) {
    const force = el("input", { type: "checkbox", id: "delete-force" });
    const answer = await confirmed(`Delete ${model.id}?`, {
      text: "Its files in the data folder are deleted.",
      fields: [el("p", {}, force, " ", el("label", { for: "delete-force" }, "Also if collections have its vectors, which can then be searched by vectors only"))],
      action: "Delete",
      work: () => json({ method: "DELETE", path: `/v1/models/${encodeURIComponent(model.id)}`, ...(force.checked ? { json: { force: true } } : {}) }),
    });
    if (!answer) return;
    announce(`${model.id} is deleted`);
    fill(note, el("p", {}, `${model.id} is deleted.`));
    await show();
  }

  show();
  return () => {
    abort.abort();
    compare.stop();
  };
}

/** Wait until the service answers with a generation. It takes over a change of the models a fraction of a second later. */
async function becomesLive(generation, signal) {
  for (let asked = 0; asked < MOST_ASKED; asked++) {
    const { data } = await json({ path: "/v1/models", shown: false, signal });
    if (data[0].generation === generation && data[0].state === "live") return;
    await pause(ASK_MS, signal);
  }
}

/** Where the weights come from. */
function lineage(model, all) {
  const { recipe, data_sha256: data, revision, init, teacher, photos, steps, hardware } = model.provenance;
  const from = typeof init === "object" ? init?.name : init;
  const parent = all.find((one) => one.id === from);
  const pairs = [
    ["Recipe", recipe],
    ["Continued from", from ? `${from} ${parent ? `(${parent.state} here)` : "(not in this data folder)"}` : null],
    ["Teacher", teacher],
    ["Data digest", data ? [el("code", {}, data)] : null],
    ["Images", photos],
    ["Steps", steps],
    ["Git revision", revision ? [el("code", {}, revision)] : null],
    ["Hardware", hardware],
  ].filter(([, value]) => value !== null && value !== undefined);
  return pairs.length ? pairs : [["Origin", model.provenance.source ?? model.provenance.url ?? "not recorded"]];
}

/** The figures of the comparison with the model that was live before, those of the training, and those of the heads. */
function metrics(model) {
  const parts = [];
  if (Object.keys(model.metrics).length) parts.push(["Compared with the live model", model.metrics]);
  for (const name of ["knn", "evaluation"]) {
    if (model.provenance[name]) parts.push([`After the training: ${name}`, model.provenance[name]]);
  }
  for (const head of model.heads) {
    if (Object.keys(head.metrics).length) parts.push([`Head ${head.name}`, head.metrics]);
  }
  for (const one of model.parity) parts.push([`Engine ${one.engine}, ${one.precision}, against the reference`, one]);
  return parts.length ? parts.map(([title, values]) => [el("h4", {}, title), facts(Object.entries(values))])
    : el("p", { class: "quiet" }, "Nothing was measured. An evaluation or a comparison does.");
}

function timeLeft(time) {
  const minutes = Math.round((new Date(time) - Date.now()) / 60_000);
  if (minutes <= 0) return "over";
  return minutes < 120 ? `${minutes} minutes left` : `${Math.round(minutes / 60)} hours left`;
}
