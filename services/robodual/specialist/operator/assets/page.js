// The operator's page: one stream of reports, shown. Texts come from clients and services, and only ever become text.

import { actionPlot, element, sparkline } from "./charts.js";
import { Refused, follow, headers } from "./stream.js";

const TOKEN = "robodual.token";
const DIMENSIONS = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"];
const STAGES = ["total", "model", "queue", "wait", "decode"];
const BEHIND = 48; // steps that a plot shows before the current one, and after it
const AHEAD = 8;
const STEPS = 120; // in the lines of ages and latencies
const SILENCE = 5000; // milliseconds without a report after which the connection counts as lost
const LONGEST_PAUSE = 5000;
const PROBLEMS = 50;

const at = (id) => document.getElementById(id);
const say = (id, text) => {
  if (at(id).textContent !== text) at(id).textContent = text;
};

const view = { session: null, page: 1, pages: 1 };
let stream = null; // the AbortController of the stream that is open
let steps = [];
let references = [];
let shown = null; // the session of those
let problems = [];
let counts = []; // [time, answers] of the last seconds
let latencies = new Map(); // by session: what the list's lines show

// --- the connection

async function look() {
  stream?.abort();
  const own = (stream = new AbortController());
  let pause = 1000;
  while (!own.signal.aborted) {
    const attempt = new AbortController();
    const stop = () => attempt.abort();
    own.signal.addEventListener("abort", stop);
    let silence = setTimeout(stop, SILENCE);
    let reason = "the service ended it";
    begin();
    try {
      const query = new URLSearchParams({ page: view.page });
      if (view.session) query.set("session", view.session);
      await follow(`events?${query}`, sessionStorage.getItem(TOKEN), attempt.signal, (report) => {
        clearTimeout(silence);
        silence = setTimeout(stop, SILENCE);
        pause = 1000;
        show(report);
      });
    } catch (error) {
      if (own.signal.aborted) return;
      if (error instanceof Refused) return ask();
      reason = error.name === "AbortError" ? "no report for 5 seconds" : error.message;
    } finally {
      clearTimeout(silence);
      own.signal.removeEventListener("abort", stop);
    }
    if (own.signal.aborted) return;
    lost(reason);
    await new Promise((resolve) => setTimeout(resolve, pause));
    pause = Math.min(2 * pause, LONGEST_PAUSE);
  }
}

function begin() {
  steps = [];
  references = [];
  problems = [];
  counts = [];
}

function ask() {
  const refused = sessionStorage.getItem(TOKEN) !== null;
  sessionStorage.removeItem(TOKEN);
  at("board").hidden = true;
  at("forget").hidden = true;
  at("door").hidden = false;
  say("refusal", refused ? "The service does not know this token." : "");
  state("waiting", "waiting for a token");
  at("token").focus();
}

function lost(reason) {
  at("board").dataset.stale = "";
  state("lost", `connection lost, trying again (${reason})`);
}

function state(name, text) {
  at("status").dataset.state = name;
  say("status-text", text);
}

async function describe() {
  try {
    const answer = await fetch("../info", { headers: headers(sessionStorage.getItem(TOKEN)), cache: "no-store" });
    if (!answer.ok) return;
    const info = await answer.json();
    const facts = [info.profile, info.device, info.dtype, `version ${info.version}`];
    at("model").replaceChildren(...facts.filter(Boolean).map((fact) => element("li", {}, fact)));
  } catch {
    // The stream says what is wrong.
  }
}

// --- a report

function show(report) {
  if (at("board").hidden || "stale" in at("board").dataset) {
    at("door").hidden = true;
    at("board").hidden = false;
    at("forget").hidden = sessionStorage.getItem(TOKEN) === null;
    delete at("board").dataset.stale;
    describe();
  }
  const missing = Object.entries(report.missing).map(([name, reason]) => `${name}: ${reason}`);
  state(report.ready ? "live" : "warned", report.ready ? "live" : `not ready (${missing.join("; ")})`);
  showTotals(report);
  showList(report);
  showProblems(report.problems);
  showSession(report.session);
}

function showTotals({ totals, open }) {
  const now = performance.now();
  counts.push([now, totals.answers]);
  while (counts.length > 2 && now - counts[0][0] > 4000) counts.shift();
  const [before, answers] = counts[0];
  const seconds = (now - before) / 1000;
  say("total-open", String(open));
  say("total-rate", seconds > 0.5 ? ((totals.answers - answers) / seconds).toFixed(1) : "–");
  for (const name of ["waiting", "degraded", "missed", "errors"]) {
    say(`total-${name}`, totals[name].toLocaleString("en"));
    at(`total-${name}`).parentElement.classList.toggle("alarmed", totals[name] > 0);
  }
}

function showList({ sessions, session, page, pages, open }) {
  Object.assign(view, { page, pages });
  at("no-sessions").hidden = open > 0;
  at("pager").hidden = pages < 2;
  say("place", `${page} of ${pages}`);
  at("newer").disabled = page <= 1;
  at("older").disabled = page >= pages;
  const list = at("sessions");
  const known = new Map([...list.children].map((item) => [item.dataset.session, item]));
  const samples = new Map();
  const items = sessions.map((row) => {
    const item = known.get(row.id) ?? listItem(row.id);
    const [name, instruction, facts] = item.querySelectorAll("b, .instruction, .facts");
    const before = latencies.get(row.id) ?? [];
    const sample = row.milliseconds !== null && row.idle < 1 ? [...before, row.milliseconds].slice(-40) : before;
    samples.set(row.id, sample);
    name.textContent = row.id;
    instruction.textContent = row.instruction || "no instruction yet";
    facts.textContent = rowFacts(row);
    item.classList.toggle("degraded", row.degraded);
    item.classList.toggle("idle", row.idle >= 2);
    item.firstChild.setAttribute("aria-current", String(row.id === session?.id));
    const label = `latency of ${row.id}: ${row.milliseconds ?? "no"} ms`;
    item.querySelector(".spark").replaceChildren(sparkline(sample, { label, most: 40, top: Math.max(...sample, 1) }));
    return item;
  });
  latencies = samples;
  if (items.length !== list.children.length || items.some((item, index) => item !== list.children[index])) {
    list.replaceChildren(...items);
  }
}

function listItem(id) {
  const item = element("li", { "data-session": id });
  const button = element("button", { type: "button", class: "pick" });
  button.append(
    element("b"), element("span", { class: "instruction" }), element("span", { class: "facts" }),
    element("span", { class: "spark" }),
  );
  button.addEventListener("click", () => choose(id));
  item.append(button);
  return item;
}

function rowFacts(row) {
  const facts = [`ep ${row.episode}`, row.step < 0 ? "no step yet" : `step ${row.step}`];
  if (row.age !== null) facts.push(`age ${row.age}`, `${brief(row.milliseconds)} ms`);
  if (row.degraded) facts.push("degraded");
  if (row.idle >= 2) facts.push(`idle ${Math.round(row.idle)} s`);
  return facts.join(" · ");
}

function showSession(session) {
  if (session === null) {
    say("instruction", view.session ? "This session is not open." : "–");
    at("facts").replaceChildren();
    turnTo(null);
    return draw(null);
  }
  if (session.id !== shown) turnTo(session.id);
  steps = [...steps, ...session.steps].slice(-STEPS);
  references = [...references, ...session.references].slice(-24);
  say("instruction", session.instruction || "waiting for the generalist");
  const facts = [session.id, `episode ${session.episode}`];
  if (session.step >= 0) facts.push(`step ${session.step}`);
  if (session.conditioning) facts.push(`conditioning of step ${session.conditioning[1]}`);
  at("facts").replaceChildren(...facts.map((fact) => element("li", {}, fact)));
  if (session.degraded) at("facts").append(element("li", { class: "alarmed" }, "degraded"));
  for (const [camera, jpeg] of Object.entries(session.pictures)) picture(camera, jpeg);
  draw(session);
}

function turnTo(session) {
  shown = session;
  steps = [];
  references = [];
  for (const camera of ["static", "gripper"]) picture(camera, null);
}

function picture(camera, jpeg) {
  const image = at(camera);
  image.hidden = jpeg === null;
  at(`${camera}-none`).hidden = jpeg !== null;
  if (jpeg === null) image.removeAttribute("src");
  else image.src = `data:image/jpeg;base64,${jpeg}`;
}

function draw(session) {
  const last = steps[steps.length - 1];
  const ages = steps.map((step) => step.age);
  say("age", session?.age == null ? "–" : String(session.age));
  say("age-range", ages.length ? `${Math.min(...ages)} to ${Math.max(...ages)} in the last ${ages.length} steps` : "");
  const label = `conditioning age over the last ${ages.length} steps`;
  at("age-spark").replaceChildren(sparkline(ages, { label, most: STEPS, top: Math.max(8, ...ages) }));
  drawLatencies();
  const now = last?.step ?? 0;
  const from = now - BEHIND;
  const current = (thing) => thing.episode === last?.episode;
  const acted = steps.filter((step) => current(step) && step.step >= from);
  const told = references.filter((reference) => current(reference) && reference.step + AHEAD > from);
  DIMENSIONS.forEach((name, index) => {
    const executed = acted.map(({ step, action }) => [step, action[index]]);
    const pieces = told.map(({ step, actions }) => ({ step, values: actions.map((row) => row[index]) }));
    const value = executed.length ? executed[executed.length - 1][1] : null;
    say(`value-${name}`, value === null ? "–" : value.toFixed(2).replace("-", "−"));
    const words = `${name}: executed ${value ?? "nothing yet"}, with the reference chunks, up to step ${now}`;
    const plot = { label: words, executed, references: pieces, now, behind: BEHIND, ahead: AHEAD };
    at(`plot-${name}`).replaceChildren(actionPlot(plot));
  });
}

function drawLatencies() {
  for (const stage of STAGES) {
    const values = steps.filter(({ stages }) => stage in stages).map(({ stages }) => stages[stage]);
    const row = at(`stage-${stage}`);
    row.hidden = stage !== "total" && !values.length;
    const ordered = [...values].sort((a, b) => a - b);
    const rank = (share) => ordered[Math.min(ordered.length - 1, Math.floor(share * ordered.length))];
    const words = ordered.length ? [`p50 ${brief(rank(0.5))}`, `p99 ${brief(rank(0.99))}`] : [];
    row.querySelector(".figures").replaceChildren(...words.map((word) => element("span", {}, word)));
    const chart = { label: `${stage}: ${words.join(", ")}`, most: STEPS, top: Math.max(1, ...values) };
    row.querySelector(".spark").replaceChildren(sparkline(values, chart));
  }
}

function brief(value) {
  return value.toFixed(value < 100 ? 1 : 0);
}

function showProblems(added) {
  problems = [...added.reverse(), ...problems].slice(0, PROBLEMS);
  at("no-problems").hidden = problems.length > 0;
  at("problems-box").hidden = problems.length === 0;
  if (!added.length) return;
  at("problems").replaceChildren(
    ...problems.map(({ at: time, method, code, session, message }) => {
      const row = element("tr");
      const cells = [new Date(time * 1000).toLocaleTimeString("en-GB"), method, code, session || "–", message];
      row.append(...cells.map((cell) => element("td", {}, cell)));
      return row;
    }),
  );
}

// --- what a person does

function choose(session) {
  view.session = session;
  at("follow").checked = session === null;
  look();
}

function turn(pages) {
  view.page = Math.max(1, Math.min(view.pages, view.page + pages));
  look();
}

function build() {
  for (const stage of STAGES) {
    const row = element("div", { class: `stage ${stage}`, id: `stage-${stage}` });
    row.append(
      element("span", { class: "name" }, stage), element("span", { class: "spark" }),
      element("span", { class: "figures" }),
    );
    at("latencies").append(row);
  }
  for (const name of DIMENSIONS) {
    const plot = element("figure", { class: "plot" });
    const caption = element("figcaption", {}, name);
    caption.append(element("span", { id: `value-${name}` }, "–"));
    plot.append(caption, element("div", { id: `plot-${name}` }));
    at("plots").append(plot);
  }
  at("door").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(TOKEN, at("token").value.trim());
    at("token").value = "";
    look();
  });
  at("forget").addEventListener("click", () => {
    stream.abort();
    sessionStorage.removeItem(TOKEN);
    ask();
  });
  at("follow").addEventListener("change", (event) => {
    const current = document.querySelector("[aria-current=true]")?.closest("li").dataset.session;
    choose(event.target.checked ? null : (current ?? null));
  });
  at("newer").addEventListener("click", () => turn(-1));
  at("older").addEventListener("click", () => turn(1));
  // Nobody looks at a page in the background: it costs the service nothing then.
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) stream?.abort();
    else if (at("door").hidden) look();
  });
}

build();
if (!document.hidden) look();
