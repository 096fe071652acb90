// Small charts as SVG, drawn anew with each report.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 300;
const HEIGHT = 100;

/** An element with attributes and a text; nothing is ever parsed as HTML. */
export function element(name, attributes = {}, text = "") {
  const made = name.includes(":") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}

function canvas(label) {
  return element("svg:svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": label,
  });
}

function line(points, name) {
  const path = points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");
  return element("svg:polyline", { points: path, class: name, "vector-effect": "non-scaling-stroke" });
}

function rule(x1, y1, x2, y2, name) {
  return element("svg:line", { x1, y1, x2, y2, class: name, "vector-effect": "non-scaling-stroke" });
}

/** Values, newest last, as a line from 0 to `top`; room for `most` of them. */
export function sparkline(values, { label, most, top }) {
  const svg = canvas(label);
  const y = (value) => HEIGHT - 3 - (HEIGHT - 6) * Math.min(1, value / (top || 1));
  const x = (index) => WIDTH - (values.length - 1 - index) * (WIDTH / (most - 1));
  const points = values.map((value, index) => [x(index), y(value)]);
  if (points.length > 1) {
    const [first, last] = [points[0][0], points[points.length - 1][0]];
    const area = [[first, HEIGHT], ...points, [last, HEIGHT]].map((point) => point.map((n) => n.toFixed(1)).join(","));
    svg.append(element("svg:polygon", { points: area.join(" "), class: "area" }), line(points, "line"));
  }
  return svg;
}

/** One action dimension: executed [step, value] as a line, each reference chunk as a piece, `now` as a rule. */
export function actionPlot({ label, executed, references, now, behind, ahead }) {
  const svg = canvas(label);
  const x = (step) => (WIDTH * (step - now + behind)) / (behind + ahead);
  const y = (value) => HEIGHT / 2 - (HEIGHT / 2 - 5) * Math.max(-1, Math.min(1, value));
  svg.append(rule(0, y(0), WIDTH, y(0), "zero"), rule(x(now), 0, x(now), HEIGHT, "now"));
  references.forEach(({ step, values }, index) => {
    const name = index === references.length - 1 ? "reference" : "reference past";
    svg.append(line(values.map((value, row) => [x(step + row), y(value)]), name));
  });
  svg.append(line(executed.map(([step, value]) => [x(step), y(value)]), "executed"));
  const last = executed[executed.length - 1];
  if (last) {
    // A dot of no length with a round end: the chart is stretched, and a circle would be too.
    svg.append(line([[x(last[0]), y(last[1])], [x(last[0]) + 0.01, y(last[1])]], "dot"));
  }
  return svg;
}
