// Jobs: the list with live progress, one job in detail, a form to start a job, and the schedules.

import { json } from "../api.js";
import { busy, confirmed, el, errorBox, field, fill, select, stateBadge, timeText } from "../dom.js";
import { follow, persistently } from "../events.js";
import { mountJob } from "./jobs-detail.js";
import { jobForm } from "./jobs-form.js";

const STATES = ["queued", "running", "waiting", "succeeded", "failed", "cancelled"];
const PAGE = 50;

export async function mount(place, parameters) {
  const abort = new AbortController();
  const job = parameters.get("job");
  if (job) mountJob(place, job, abort.signal);
  else mountList(place, parameters, abort.signal);
  return () => abort.abort();
}

function mountList(place, parameters, signal) {
  const schedules = el("div", { id: "schedules" });
  const form = el("div", { id: "start" });
  const list = jobList(signal);
  const showSchedules = () => busy(schedules, () => listSchedules(schedules, signal));
  const created = el("p", { id: "schedule-created", role: "status" });
  const started = (answer) => {
    fill(created);
    if (answer.object === "job") {
      location.hash = `#jobs?job=${encodeURIComponent(answer.id)}`;
      return;
    }
    fill(created, `The schedule ${answer.name} creates its next job at `, timeText(answer.next_at), ".");
    showSchedules();
  };
  const starting = el("details", { open: parameters.has("start") }, el("summary", {}, "Start a job or retrain from here"), form);
  place.append(
    el("h2", {}, "Jobs"),
    starting,
    list.element,
    el("h3", {}, "Schedules"),
    created,
    schedules,
  );
  busy(form, async () => fill(form, await jobForm({ parameters, onstarted: started, signal })));
  list.start();
  showSchedules();
}

/** The list of jobs, which follows the events of all jobs. */
function jobList(signal) {
  const rows = new Map();
  const body = el("tbody");
  const note = el("div");
  const state = select([["", "all states"], ...STATES], { id: "jobs-state", onchange: () => load() });
  const kind = el("select", { id: "jobs-kind", onchange: () => load() }, el("option", { value: "" }, "all kinds"));
  const connection = el("small", { id: "jobs-connection", role: "status" }, "connecting");
  const more = el("button", { type: "button", hidden: true, onclick: () => load(more.value) }, "Older jobs");
  const waiting = new Set();
  let requested = new AbortController();

  const load = (before) => busy(note, () => read(before));

  async function read(before) {
    requested.abort();
    requested = new AbortController();
    const query = { state: state.value, kind: kind.value, before, limit: PAGE };
    const call = { path: "/v1/jobs", query, signal: AbortSignal.any([signal, requested.signal]) };
    const page = await json(call);
    if (!before) {
      rows.clear();
      fill(body);
    }
    for (const job of page.data) body.append(show(job));
    more.hidden = !page.next;
    more.value = page.next ?? "";
    fill(note, rows.size ? null : el("p", { class: "quiet" }, "There are no jobs here."));
    return page;
  }

  /** Show a job in its row, which is made if there is none. */
  function show(job) {
    if (![...kind.options].some((one) => one.value === job.kind)) kind.append(el("option", { value: job.kind }, job.kind));
    const row = rows.get(job.id) ?? jobRow();
    rows.set(job.id, row);
    row.show(job);
    return row.element;
  }

  /** Read a job again, because an event has changed more than its progress. */
  async function refresh(id) {
    if (waiting.has(id)) return;
    waiting.add(id);
    await Promise.resolve();
    waiting.delete(id);
    try {
      const job = await json({ path: `/v1/jobs/${encodeURIComponent(id)}`, shown: false, signal });
      const isNew = !rows.has(id);
      if (isNew && ((state.value && job.state !== state.value) || (kind.value && job.kind !== kind.value))) return;
      const element = show(job);
      if (isNew) body.prepend(element);
      fill(note);
    } catch (error) {
      if (error.status === 404) remove(id);
    }
  }

  function remove(id) {
    rows.get(id)?.element.remove();
    rows.delete(id);
  }

  function onevent(event) {
    if (event.kind === "removed") remove(event.job);
    else if (event.kind === "progress" && rows.has(event.job)) rows.get(event.job).progress(event.data);
    else if (event.kind !== "log") refresh(event.job);
  }

  async function start() {
    const onfailure = (error) => {
      fill(connection, "not connected");
      fill(note, errorBox(error));
    };
    const page = await persistently(read, { signal, onfailure });
    if (!page) return;
    const onstate = (what) => fill(connection, what === "connected" ? "updated live" : `connecting again: ${what.message}`);
    follow({ path: "/v1/jobs/events", last: page.last_event, signal, onevent, onstate });
  }

  const element = el("div", {},
    el("div", { class: "row" }, field("State", state), field("Kind", kind), connection),
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Jobs" },
      el("table", { id: "jobs" }, el("thead", {}, el("tr", {}, ["Job", "Kind", "State", "Progress", "Created"].map((one) => el("th", { scope: "col" }, one)))), body)),
    note, more);
  return { element, start };
}

function jobRow() {
  const [kind, state, created] = [el("td"), el("td"), el("td")];
  const link = el("a");
  const bar = el("progress", { max: "1", "aria-label": "Progress" });
  const text = el("small");
  const element = el("tr", {}, el("td", {}, link), kind, state, el("td", { class: "progress" }, bar, text), created);
  const progress = (data) => {
    bar.value = data.progress ?? 0;
    fill(text, `${Math.round((data.progress ?? 0) * 100)} %${data.text ? ` · ${data.text}` : ""}`);
  };
  const show = (job) => {
    element.dataset.job = job.id;
    link.href = `#jobs?job=${encodeURIComponent(job.id)}`;
    fill(link, job.id);
    fill(kind, job.kind);
    fill(state, stateBadge(job.state), job.cancel_requested && job.state === "running" ? el("small", {}, " is being cancelled") : null,
      job.blocked ? el("p", { class: "bad" }, job.blocked) : null,
      job.error ? el("p", { class: "bad" }, job.error.split("\n")[0].slice(0, 300)) : null);
    fill(created, timeText(job.created_at));
    progress(job);
  };
  return { element, show, progress };
}

async function listSchedules(place, signal) {
  const { data } = await json({ path: "/v1/schedules", signal, shown: false });
  const remove = async (name) => {
    const call = { method: "DELETE", path: `/v1/schedules/${encodeURIComponent(name)}` };
    const text = `The schedule ${name} creates no further jobs. Those that it has created stay.`;
    if (await confirmed(`Remove ${name}?`, { text, action: "Remove", work: () => json(call) })) {
      await listSchedules(place, signal).catch((error) => fill(place, errorBox(error)));
    }
  };
  const row = (one) => el("tr", { "data-schedule": one.name },
    el("td", {}, one.name), el("td", {}, one.kind), el("td", {}, `${one.every} (${one.zone})`), el("td", {}, timeText(one.next_at)),
    el("td", {}, one.last_job ? el("a", { href: `#jobs?job=${encodeURIComponent(one.last_job)}` }, one.last_job) : "-"),
    el("td", {}, el("code", {}, JSON.stringify(one.params))),
    el("td", {}, el("button", { type: "button", "aria-label": `Remove the schedule ${one.name}`, onclick: () => remove(one.name) }, "Remove")));
  const titles = ["Name", "Kind", "When", "Next job", "Last job", "Parameters", ""];
  fill(place, data.length
    ? el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Schedules" },
      el("table", {}, el("thead", {}, el("tr", {}, titles.map((one) => (one ? el("th", { scope: "col" }, one) : el("td"))))), el("tbody", {}, data.map(row))))
    : el("p", { class: "quiet" }, "There are no schedules. To create one, fill in “every” under “Later, or again and again” when you start a job."));
}
