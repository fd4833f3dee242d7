"use strict";
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const W = 440, H = 250, L = 54, R = 12, T = 10, B = 28, NS = "http://www.w3.org/2000/svg";
  const settings = { smooth: 0.0063, time: false };
  document.documentElement.classList.add("js");

  const add = (parent, name, attributes, text) => {
    const node = parent.appendChild(document.createElementNS(NS, name));
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const sums = (differences) => { let at = 0; return differences.map((d) => (at += d)); };
  const clocks = page.clocks.map((c) => ({ x: sums(c.x), y: c.y }));

  // The seconds of work at a step, between the two nearest that are known.
  const seconds = (run, step) => {
    const { x, y } = clocks[run];
    let i = x.findIndex((s) => s >= step);
    if (i < 0) i = x.length - 1;
    if (i === 0 || x[i] === x[i - 1]) return y[i];
    return y[i - 1] + ((y[i] - y[i - 1]) * (step - x[i - 1])) / (x[i] - x[i - 1]);
  };
  const short = (v) => {
    for (const [unit, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(v) >= unit) return +(v / unit).toPrecision(6) + letter;
    return String(+v.toPrecision(3));
  };
  const duration = (s) => s >= 7200 ? short(s / 3600) + " h" : s >= 120 ? short(s / 60) + " min" : short(s) + " s";

  const linear = (low, high) => {
    const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= rough * 0.999), ticks = [];
    for (let i = Math.ceil(low / step - 1e-9); i <= high / step + 1e-9; i++) ticks.push(+(i * step).toPrecision(12));
    return ticks;
  };
  const logarithmic = (low, high) => {
    const from = Math.floor(Math.log10(low)), to = Math.ceil(Math.log10(high)), ticks = [];
    for (let p = from; p <= to; p++)
      for (const f of to - from < 4 ? [1, 2, 5] : [1]) ticks.push(f * 10 ** p);
    return ticks.filter((t) => t >= low * 0.999 && t <= high * 1.001);
  };
  // Moving average over about this share of the curve: see thin.py.
  const smoothed = (ys, share) => {
    const factor = Math.exp(-1 / (share * ys.length));
    let mean = 0, weight = 0;
    return ys.map((y) => { mean = factor * mean + (1 - factor) * y; weight = factor * weight + 1 - factor; return mean / weight; });
  };

  class Chart {
    constructor(figure, data) {
      this.svg = figure.querySelector("svg");
      this.figure = figure;
      this.log = data.log;
      this.lines = data.lines.map((line) => ({ ...line, steps: sums(line.x), on: true }));
      for (const line of this.lines) line.seconds = line.steps.map((s) => seconds(line.run, s));
      const button = figure.querySelector("button");
      button.onclick = () => { this.log = !this.log; button.setAttribute("aria-pressed", this.log); this.draw(); };
      figure.querySelectorAll(".legend li").forEach((item, i) => {
        item.onclick = () => { this.lines[i].on = !this.lines[i].on; item.classList.toggle("off"); this.draw(); };
      });
      this.svg.onpointermove = this.svg.onpointerdown = (event) => this.point(event);
      this.svg.onpointerleave = () => this.leave();
    }
    // What is drawn now: x and y in the units chosen; on a log axis only what is above zero.
    shown(line) {
      const average = this.smooths(line) ? smoothed(line.mean || line.y, settings.smooth) : line.y;
      const xs = settings.time ? line.seconds : line.steps;
      return xs.map((x, i) => ({ x, y: average[i], raw: line.y[i], step: line.steps[i] })).filter((p) => !this.log || p.raw > 0);
    }
    smooths(line) {
      return settings.smooth && line.stroke === "noisy" && line.y.length > 100;
    }
    scale() {
      const points = this.curves.flatMap(({ points }) => points), ys = points.map((p) => p.raw);
      const low = Math.min(...ys), high = Math.max(...ys), right = Math.max(...points.map((p) => p.x));
      let left = Math.min(...points.map((p) => p.x));
      if (left < 0.1 * right) left = 0;
      const air = 0.04 * (high - low) || 0.05 * Math.abs(high) || 1;
      const [a, b] = this.log ? [Math.log(low / 1.1), Math.log(high * 1.1)] : [low < 0 ? low - air : Math.max(low - air, 0), high + air];
      this.px = (x) => L + ((W - L - R) * (x - left)) / (right - left || 1);
      this.py = (y) => H - B - ((H - B - T) * ((this.log ? Math.log(y) : y) - a)) / (b - a);
      return { left, right: right > left ? right : left + 1, low: this.log ? low / 1.1 : a, high: this.log ? high * 1.1 : b };
    }
    draw() {
      this.curves = this.lines.filter((line) => line.on).map((line) => ({ line, points: this.shown(line) })).filter((c) => c.points.length);
      this.svg.replaceChildren();
      this.leave();
      if (!this.curves.length) return;
      const { left, right, low, high } = this.scale(), grid = add(this.svg, "g", { class: "grid" });
      for (const tick of (this.log ? logarithmic : linear)(low, high)) {
        add(grid, "path", { d: `M${L} ${this.py(tick).toFixed(1)}H${W - R}` });
        add(grid, "text", { x: L - 6, y: this.py(tick) + 4, class: "r" }, short(tick));
      }
      for (const tick of linear(left, right))
        add(grid, "text", { x: this.px(tick), y: H - 8, class: "m" }, settings.time ? duration(tick) : short(tick));
      for (const { line, points } of this.curves) this.trace(line, points);
    }
    trace(line, points) {
      const path = (key, extra) => add(this.svg, "path", {
        class: `line ${line.stroke} c${line.colour} ${extra}`,
        d: "M" + points.map((p) => `${this.px(p.x).toFixed(1)} ${this.py(p[key]).toFixed(1)}`).join("L"),
      });
      if (this.smooths(line)) path("raw", "faint");
      path("y", "");
      if (points.length <= 40 && (["bold", "dotted"].includes(line.stroke) || points.length === 1))
        for (const p of points) add(this.svg, "circle", { class: `dot c${line.colour}`, cx: this.px(p.x), cy: this.py(p.y), r: 2.5 });
    }
    point(event) {
      if (!this.px) this.draw();
      const box = this.svg.getBoundingClientRect(), at = ((event.clientX - box.left) * W) / box.width;
      const near = this.curves.map(({ line, points }) => ({
        line, p: points.reduce((best, p) => (Math.abs(this.px(p.x) - at) < Math.abs(this.px(best.x) - at) ? p : best)),
      }));
      if (!near.length) return;
      const first = near.reduce((best, n) => (Math.abs(this.px(n.p.x) - at) < Math.abs(this.px(best.p.x) - at) ? n : best));
      this.leave();
      const x = this.px(first.p.x);
      this.cursor = [add(this.svg, "path", { class: "cursor", d: `M${x} ${T}V${H - B}` })];
      for (const { line, p } of near) this.cursor.push(add(this.svg, "circle", { class: `dot c${line.colour}`, cx: this.px(p.x), cy: this.py(p.y), r: 3.5 }));
      this.tell(near, first, (x / W) * box.width, box.width);
    }
    tell(near, first, x, width) {
      this.tip = this.figure.appendChild(document.createElement("div"));
      this.tip.className = "tip";
      this.tip.textContent = settings.time ? `after ${duration(first.p.x)}` : `step ${first.p.step.toLocaleString("en")}`;
      for (const { line, p } of near) {
        const row = this.tip.appendChild(document.createElement("div")), dot = row.appendChild(document.createElement("i"));
        dot.style.borderColor = `var(--c${line.colour})`;
        const own = p.step === first.p.step ? "" : ` (step ${p.step.toLocaleString("en")})`;
        const mean = p.y === p.raw ? "" : `, smoothed ${+p.y.toPrecision(4)}`;
        row.append(`${line.label} ${+p.raw.toPrecision(5)}${mean}${own}`);
      }
      const top = this.svg.getBoundingClientRect().top - this.figure.getBoundingClientRect().top;
      this.tip.style.top = `${top + 6}px`;
      this.tip.style[x > width / 2 ? "right" : "left"] = (x > width / 2 ? width - x : x) + 24 + "px";
    }
    leave() {
      for (const node of this.cursor || []) node.remove();
      this.tip?.remove();
      this.cursor = this.tip = null;
    }
  }

  const figures = [...document.querySelectorAll(".chart")];
  const charts = page.charts.map((data, i) => new Chart(figures[i], data));
  const control = (id, change) => {
    const node = document.getElementById(id);
    if (node) node.oninput = () => { change(node.value); charts.forEach((chart) => chart.draw()); };
  };
  control("smooth", (value) => { settings.smooth = +value && 10 ** (value / 50 - 3); });
  control("against", (value) => { settings.time = value === "time"; });
})();
