// Reads server-sent events with fetch, because EventSource cannot send an API key.

import { request } from "./api.js";

const RETRY_MS = 3000;

/** Read the events of `path` until `signal` is aborted, beginning after the event with the number `last`. Each event is
 * passed to `onevent` as an object. After an interruption, the stream continues after the last event. `onstate` gets
 * "connected", or the error that interrupted the stream. */
export async function follow({ path, query = {}, last = 0, signal, onevent, onstate = () => {} }) {
  let number = last;
  while (!signal.aborted) {
    try {
      const headers = { "Last-Event-ID": String(number) };
      const response = await request({ path, query, headers, accept: "text/event-stream", shown: false, signal });
      if (response.status === 204) return;
      onstate("connected");
      for await (const event of events(response.body)) {
        number = event.number;
        onevent(event);
      }
    } catch (error) {
      if (signal.aborted) return;
      onstate(error);
      if (error.status === 401 || error.status === 403 || error.status === 404) return;
    }
    await pause(RETRY_MS, signal);
  }
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
