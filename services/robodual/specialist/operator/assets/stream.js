// Server-sent events through fetch: EventSource can send no Authorization header.

/** The service wants a token, or another one. */
export class Refused extends Error {}

export function headers(token) {
  return token ? { Authorization: `Bearer ${token}` } : {};
}

/** Calls `tell` with each event's data until the stream ends. Throws Refused, AbortError, or Error with a reason. */
export async function follow(address, token, signal, tell) {
  const answer = await fetch(address, {
    headers: headers(token), signal, cache: "no-store", credentials: "omit", redirect: "error",
  });
  if (answer.status === 401) throw new Refused("unauthorized");
  if (!answer.ok) throw new Error(await reason(answer));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (text + value).split("\n\n");
    text = events.pop();
    for (const event of events) {
      if (event.startsWith("data: ")) tell(JSON.parse(event.slice("data: ".length)));
    }
  }
}

async function reason(answer) {
  try {
    const { detail } = await answer.json();
    if (typeof detail === "string") return detail;
  } catch {
    // Not JSON: the status says it.
  }
  return `status ${answer.status}`;
}
