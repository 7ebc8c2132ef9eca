// Reads server-sent events with fetch, because EventSource cannot send an API key.

import { request } from "./api.js";

const RETRY_MS = 3000;

/** Read the events of `path`, while the page is visible, until `signal` is aborted, beginning after the event with the number `last`. Each event is
 * passed to `onevent` as an object. After an interruption, the stream continues after the last event. `onstate` gets
 * "connected", or the error that interrupted the stream. A hidden page has no stream, because a browser opens only six
 * connections to a service, for all tabs together. */
export async function follow({ path, query = {}, last = 0, signal, onevent, onstate = () => {} }) {
  let number = last;
  while (!signal.aborted) {
    if (document.hidden) await change(signal);
    const hiding = new AbortController();
    const hide = () => document.hidden && hiding.abort();
    document.addEventListener("visibilitychange", hide);
    const either = AbortSignal.any([signal, hiding.signal]);
    try {
      const headers = { "Last-Event-ID": String(number) };
      const response = await request({ path, query, headers, accept: "text/event-stream", shown: false, signal: either });
      if (response.status === 204) return;
      onstate("connected");
      for await (const event of events(response.body)) {
        number = event.number;
        onevent(event);
      }
    } catch (error) {
      if (signal.aborted) return;
      if (hiding.signal.aborted) continue;
      onstate(error);
      if (error.status === 401 || error.status === 403 || error.status === 404) return;
    } finally {
      document.removeEventListener("visibilitychange", hide);
    }
    await pause(RETRY_MS, signal);
  }
}

/** Wait until the page is shown or hidden. Ends early when the signal is aborted. */
function change(signal) {
  return new Promise((resolve) => {
    const done = () => {
      document.removeEventListener("visibilitychange", done);
      signal.removeEventListener("abort", done);
      resolve();
    };
    document.addEventListener("visibilitychange", done);
    signal.addEventListener("abort", done);
  });
}

/** The result of `load`, which is called again after each failure that may pass. `onfailure` gets the errors. Return
 * undefined if the signal is aborted, or if the API key or the address is wrong. */
export async function persistently(load, { signal, onfailure }) {
  while (!signal.aborted) {
    try {
      return await load();
    } catch (error) {
      if (signal.aborted) return undefined;
      if (error.name !== "AbortError") onfailure(error); // otherwise, a newer request has taken its place
      if ([401, 403, 404, 422].includes(error.status)) return undefined;
    }
    await pause(RETRY_MS, signal);
  }
  return undefined;
}

/** Wait. Ends early when the signal is aborted. */
export function pause(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(done, ms);
    function done() {
      clearTimeout(timer);
      signal?.removeEventListener("abort", done);
      resolve();
    }
    if (signal?.aborted) done();
    else signal?.addEventListener("abort", done);
  });
}

/** Return a function that runs `work`, one run at a time. Calls during a run lead to one more run after it. */
export function oneAtATime(work) {
  let running = false;
  let again = false;
  return async function run() {
    if (running) {
      again = true;
      return;
    }
    running = true;
    try {
      do {
        again = false;
        await work();
      } while (again);
    } finally {
      running = false;
    }
  };
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data) yield JSON.parse(data);
    }
  }
}
