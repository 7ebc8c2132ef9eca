// One job: its state, figures, steps and log, which follow the job, and the buttons that change it.

import { json, request } from "../api.js";
import { announce, busy, confirmed, el, errorBox, facts, fill, stateBadge, timeText, valueText } from "../dom.js";
import { follow, oneAtATime, persistently } from "../events.js";

const MOST_LOG = 500_000;
const TORCH = "Install torch into the environment of a worker, and start it again: .venv-run/bin/python -m pip install -e '.[train]' -c constraints.txt";

export async function mountJob(place, id, signal) {
  const path = `/v1/jobs/${encodeURIComponent(id)}`;
  const head = el("div", { id: "job" });
  const note = el("div");
  const connection = el("small", { role: "status", id: "jobs-connection" }, "connecting");
  const log = jobLog(path, signal);
  let state = null;
  place.append(
    el("p", {}, el("a", { href: "#jobs" }, "All jobs")),
    el("h2", {}, id), connection, note, head, el("h3", { id: "log-title" }, "Log"), log.element,
  );

  const live = el("div", { class: "live" });
  const bar = el("progress", { max: "1", "aria-label": "Progress" });
  const text = el("p", { id: "job-progress" });
  const figures = el("div", { id: "job-figures" });
  live.append(bar, text);

  function progress(data) {
    bar.value = data.progress ?? 0;
    fill(text, `${Math.round((data.progress ?? 0) * 100)} %${data.text ? ` · ${data.text}` : ""}`);
    const pairs = Object.entries(data.metrics ?? {});
    fill(figures, pairs.length ? [el("h3", {}, "Figures"), facts(pairs)] : null);
  }

  const show = (job) => {
    if (state !== null && state !== job.state) announce(`the job is ${job.state}`);
    if (state !== null && state !== job.state && job.state === "succeeded") window.dispatchEvent(new Event("live-model")); // it may have changed it
    state = job.state;
    progress(job);
    const focused = head.contains(document.activeElement) ? document.activeElement.dataset.action : null;
    fill(head, live, facts([
      ["State", [stateBadge(job.state), job.cancel_requested && job.state === "running" ? " is being cancelled" : ""]],
      ["Kind", job.kind],
      ...(job.waiting_for ? [["Waits for approval of", job.waiting_for]] : []),
      ["Created", timeText(job.created_at)],
      ["Started", timeText(job.started_at)],
      ["Ended", timeText(job.ended_at)],
      ["Attempts", job.attempt],
      ...[["Worker", job.worker], ["Requested by", job.requested_by], ["Schedule", job.schedule]].filter(([, value]) => value),
      ...(job.parent ? [["Created by", [el("a", { href: `#jobs?job=${encodeURIComponent(job.parent)}` }, job.parent)]]] : []),
    ]),
    job.blocked ? el("div", { class: "error", id: "job-blocked" }, el("strong", {}, "No worker can start this job"), el("p", {}, job.blocked),
      job.blocked.includes("torch") ? el("p", {}, TORCH) : null) : null,
    job.error ? el("div", { class: "error", id: "job-error" }, el("strong", {}, "Error"), el("p", {}, job.error)) : null,
    el("div", { class: "row", id: "job-actions" }, actions(job)),
    figures,
    el("h3", {}, "Steps"),
    job.steps.length ? el("ol", { id: "job-steps" }, job.steps.map((step) => el("li", {}, el("strong", {}, step.name), " ", timeText(step.ended_at),
      el("div", {}, valueText(step.result))))) : el("p", { class: "quiet" }, "No step has ended yet."),
    el("details", {}, el("summary", {}, "Parameters"), el("pre", {}, JSON.stringify(job.params, null, 1))));
    if (focused) head.querySelector(`[data-action="${focused}"]`)?.focus();
  };

  const post = (action) => () => json({ method: "POST", path: `${path}/${action}` });
  function actions(job) {
    const button = (action, label, work, attributes = {}) => el("button", { type: "button", "data-action": action, onclick: work, ...attributes }, label);
    const ask = (title, given) => async () => {
      if (await confirmed(title, given)) refresh();
    };
    const isOver = ["succeeded", "failed", "cancelled"].includes(job.state);
    return [
      job.state === "waiting" ? button("approve", "Approve", ask(`Approve ${job.waiting_for}?`, {
        text: `The job goes on with what it waits for: ${job.text || job.waiting_for}.`, action: "Approve", work: post("approve") }), { class: "primary" }) : null,
      !isOver ? button("cancel", "Cancel", ask("Cancel the job?", {
        text: "A running training saves its state first, so that it can be retried.", action: "Cancel the job", work: post("cancel") }),
      { disabled: job.cancel_requested }) : null,
      ["failed", "cancelled"].includes(job.state)
        ? button("retry", "Retry", () => busy(note, async () => { fill(note); await post("retry")(); await refresh(); })) : null,
      isOver ? button("remove", "Remove", async () => {
        const text = "Its log and its folder are deleted, also a trained model in it that was not exported.";
        if (await confirmed("Remove the job?", { text, action: "Remove the job", work: () => json({ method: "DELETE", path }) })) location.hash = "#jobs";
      }) : null,
    ];
  }

  const refresh = oneAtATime(async () => {
    try {
      const job = await json({ path, shown: false, signal });
      show(job);
      await log.read();
    } catch (error) {
      if (error.name !== "AbortError") fill(note, errorBox(error));
    }
  });

  const begin = async () => {
    const { last_event: last } = await json({ path: "/v1/jobs", query: { limit: 1 }, shown: false, signal });
    show(await json({ path, signal }));
    fill(note);
    return { last };
  };
  const onfailure = (error) => {
    fill(connection, "not connected");
    fill(note, errorBox(error));
  };
  const first = await persistently(begin, { signal, onfailure });
  if (!first) return;
  log.read();
  follow({
    path: `${path}/events`, query: { follow: "all" }, last: first.last, signal,
    onevent: (event) => {
      if (event.kind === "progress") progress(event.data);
      else if (event.kind === "log") log.read();
      else if (event.kind === "removed") fill(note, el("p", {}, "The job was removed."));
      else refresh();
    },
    onstate: (what) => {
      fill(connection, what === "connected" ? "updated live" : `connecting again: ${what.message}`);
      if (what === "connected") refresh();
    },
  });
}

/** The log, to which new text is added. It scrolls along unless the user has scrolled up. */
function jobLog(path, signal) {
  const element = el("pre", { class: "log", id: "log", tabindex: "0", "aria-labelledby": "log-title" });
  let position = null;
  const read = oneAtATime(async () => {
    for (;;) {
      let answer;
      let text;
      try {
        answer = await request({ path: `${path}/log`, query: { after: position }, accept: "text/plain", shown: position === null ? undefined : false, signal });
        text = await answer.text();
      } catch (error) {
        if (error.name !== "AbortError") element.append(`\n(the log cannot be read: ${error.message})\n`);
        return;
      }
      position = Number(answer.headers.get("X-Log-Position"));
      const isAtEnd = element.scrollTop + element.clientHeight >= element.scrollHeight - 8;
      if (text) element.textContent = (element.textContent + text).slice(-MOST_LOG);
      if (isAtEnd) element.scrollTop = element.scrollHeight;
      if (!text || position >= Number(answer.headers.get("X-Log-Bytes"))) return;
    }
  });
  return { element, read };
}
