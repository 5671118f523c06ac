/* Figures that a reader can move. Python (kfac_scratch/moving) has drawn everything; this script makes
   the sliders and writes the attributes of marked nodes anew, in the axes that each panel states.

   A figure:  <figure class="moving" data-figure="KIND">, its numbers as JSON in a <script>.
   A panel:   <svg data-panel="NAME" data-x="from to left right [log]" data-y="...">.
   A node:    data-move="NAME". A kind is a function of the figure that returns draw(values).
   All state is in the sliders: what is dragged or pointed at only moves them. */
(() => {
  "use strict";
  const kinds = {};

  // ---------------------------------------------------------------- numbers
  function scale(text) {
    const [a, b, start, end] = text.split(" ").map(Number), log = text.endsWith("log");
    const even = log ? Math.log : (v) => v, back = log ? Math.exp : (v) => v;
    const low = even(a), high = even(b);
    return {
      at: (v) => start + ((even(v) - low) / (high - low)) * (end - start),
      value: (place) => back(low + ((place - start) / (end - start)) * (high - low)),
      low: a, high: b, start, end,
    };
  }
  const minus = (text) => text.replaceAll("-", "−");
  const raised = (n) => [...String(n)].map((c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]).join("");
  function significant(v, digits = 3) {
    const size = Math.abs(v);
    if (v === 0 || (1e-3 <= size && size < 10 ** digits)) return minus(v.toPrecision(digits));
    const [mantissa, exponent] = v.toExponential(digits - 1).split("e");
    return `${minus(mantissa)} · 10${raised(+exponent)}`;
  }
  const sum = (values) => values.reduce((s, v) => s + v, 0);
  const square = (n, entry) => Array.from({ length: n }, (_, r) => Array.from({ length: n }, (_, c) => entry(r, c)));
  const norm = (M) => Math.sqrt(sum(M.flat().map((v) => v * v)));

  // ---------------------------------------------------------------- a figure and its panels
  function opened(figure) {
    const named = new Map();
    for (const node of figure.querySelectorAll("[data-move]")) {
      const name = node.dataset.move;
      named.set(name, [...(named.get(name) || []), node]);
    }
    const set = (name, attributes) => {
      for (const node of named.get(name) || [])
        for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    };
    const write = (name, text) => (named.get(name) || []).forEach((node) => (node.textContent = text));
    const entry = (name, v, limit) => set(name, { class: v < -1e-12 * limit ? "minus" : "plus", "fill-opacity": Math.sqrt(Math.abs(v) / limit) });
    const state = figure.querySelector(".state");
    const panel = (name) => {
      const svg = figure.querySelector(`[data-panel="${name}"]`), x = scale(svg.dataset.x), y = scale(svg.dataset.y);
      const path = (points) => "M" + points.map(([a, b]) => `${x.at(a)} ${y.at(b)}`).join("L");
      const point = (event) => {
        const p = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
        return [x.value(p.x), y.value(p.y)];
      };
      return { svg, x, y, path, point };
    };
    return { figure, named, set, write, entry, panel, say: (html) => (state.innerHTML = html) };
  }

  /* A native slider with its value in words. `move` puts it to the nearest position. */
  function slider(box, control, changed) {
    const label = document.createElement("label"), text = document.createElement("span");
    const input = document.createElement("input"), output = document.createElement("output");
    Object.assign(input, { type: "range", min: control.low, max: control.high, step: control.step, value: control.start, name: control.name });
    text.textContent = control.label;
    const value = () => (control.log ? 10 ** input.value : +input.value);
    const show = () => {
      output.textContent = control.words.length ? control.words[value()] : control.log ? significant(value()) : minus(String(value()));
      input.setAttribute("aria-valuetext", output.textContent);
    };
    input.addEventListener("input", () => { show(); changed(); });
    label.append(text, input, output);
    box.append(label);
    show();
    const move = (v) => { input.value = control.log ? Math.log10(v) : v; show(); };
    return { value, move };
  }

  /* Follow a pointer from its press on `target` to its release. */
  function drag(target, panel, moved) {
    let held = false;
    target.style.touchAction = "none";
    target.addEventListener("pointerdown", (e) => { held = true; target.setPointerCapture(e.pointerId); e.preventDefault(); });
    target.addEventListener("pointermove", (e) => held && moved(...panel.point(e)));
    for (const end of ["pointerup", "pointercancel"]) target.addEventListener(end, () => (held = false));
  }

  function ready(figure) {
    figure.classList.add("ready");
    const data = JSON.parse(figure.querySelector('script[type="application/json"]').textContent);
    const box = figure.querySelector(".controls"), sliders = {};
    const values = () => Object.fromEntries(Object.entries(sliders).map(([name, s]) => [name, s.value()]));
    const redraw = () => draw(values());
    for (const control of data.controls) sliders[control.name] = slider(box, control, redraw);
    const move = (wanted) => { Object.entries(wanted).forEach(([name, v]) => sliders[name].move(v)); redraw(); };
    const draw = kinds[figure.dataset.figure]({ ...opened(figure), data, move });
    redraw();
  }

  // ---------------------------------------------------------------- damping is a filter
  kinds.damping_filter = ({ panel, set, named, say, move, data }) => {
    const { eigenvalues, directions, stride } = data, curve = panel("filter"), shares = panel("shares");
    const keeps = (v, damping) => v / (v + damping), last = eigenvalues.length;
    const grid = Array.from({ length: 161 }, (_, k) => curve.x.low * (curve.x.high / curve.x.low) ** (k / 160));
    drag(named.get("hit")[0], curve, (x) => move({ damping: x }));
    return ({ damping }) => {
      set("curve", { d: curve.path(grid.map((v) => [v, keeps(v, damping)])) });
      set("guide", { d: curve.path([[damping, 0], [damping, 1]]) });
      for (const knob of ["hit", "knob"]) set(knob, { cx: curve.x.at(damping), cy: curve.y.at(0.5) });
      const corners = [[0, 0]];
      for (let i = 0; i < last; i += stride) {
        const share = keeps(eigenvalues[i], damping);
        corners.push([i, share], [Math.min(i + stride, last), share]);
      }
      set("area", { d: shares.path([...corners, [last, 0]]) });
      const kept = sum(eigenvalues.map((v) => keeps(v, damping))), above = eigenvalues.filter((v) => v > damping).length;
      say(`<i>δ</i> = ${significant(damping)}: the step is a Newton step in <b>${kept.toFixed(2)}</b> of ${directions} ` +
        `directions, the sum of all shares. ${above} eigenvalues exceed <i>δ</i>.`);
    };
  };

  // ---------------------------------------------------------------- four methods in a valley
  kinds.valley_steps = ({ panel, set, write, say, named, move, data }) => {
    const { x, y, rate, steps } = data, land = panel("land"), N = x.length, FAR = 99;
    /* The loss, its gradient, and [uu, uw, ww] of the matrix that each method inverts. */
    function model(u, w) {
      let L = 0, gu = 0, gw = 0, uu = 0, uw = 0, ww = 0, hu = 0, hw = 0, a = 0, b = 0;
      x.forEach((xn, n) => {
        const t = Math.tanh(u * xn), s = 1 - t * t, r = w * t - y[n], ju = w * s * xn;
        L += (r * r) / N; gu += (2 * r * ju) / N; gw += (2 * r * t) / N;
        uu += (2 * ju * ju) / N; uw += (2 * ju * t) / N; ww += (2 * t * t) / N;
        hu += (2 * r * w * -2 * t * s * xn * xn) / N; hw += (2 * r * s * xn) / N;
        a += (xn * xn) / N; b += (2 * w * w * s * s) / N;
      });
      return { L, gradient: [gu, gw], newton: [uu + hu, uw + hw, ww], ggn: [uu, uw, ww], kfac: [a * b, 0, ww] };
    }
    function step(method, [u, w], damping) {
      const here = model(u, w), [gu, gw] = here.gradient;
      if (method === "gradient") return [u - rate * gu, w - rate * gw];
      const [uu, uw, ww] = here[method], p = uu + damping, r = ww + damping, det = p * r - uw * uw;
      return [u - (r * gu - uw * gw) / det, w - (p * gw - uw * gu) / det];
    }
    const near = (v) => Math.max(-FAR, Math.min(FAR, v));
    drag(named.get("hit")[0], land, (u, w) => move({ u, w }));
    return ({ u, w, damping }) => {
      const last = {};
      for (const method of ["gradient", "newton", "ggn", "kfac"]) {
        const points = [[u, w]];
        for (let k = 0; k < steps; k++) points.push(step(method, points[k], damping));
        set(`path ${method}`, { d: land.path(points.map((point) => point.map(near))) });
        const loss = model(...points[steps]).L;
        write(`loss ${method}`, (last[method] = loss <= FAR ? loss.toFixed(5) : `above ${FAR}`));
      }
      say(`From <i>u</i> = ${minus(u.toFixed(2))}, <i>w</i> = ${minus(w.toFixed(2))} KFAC ends at a loss of ` +
        `<b>${last.kfac}</b>, Newton’s method at <b>${last.newton}</b>.`);
      for (const knob of ["hit", "knob"]) set(knob, { cx: land.x.at(u), cy: land.y.at(w) });
    };
  };

  // ---------------------------------------------------------------- a cell of B ⊗ A
  kinds.kronecker_cells = ({ panel, set, say, move, data }) => {
    const { B, A } = data, d = A.length, D = B.length * d, views = Object.fromEntries(["product", "B", "A", "W"].map((n) => [n, panel(n)]));
    const map = views.product, whole = (v) => Math.max(0, Math.min(D - 1, Math.floor(v)));
    for (const event of ["pointerdown", "pointermove"])
      map.svg.addEventListener(event, (e) => { const [c, r] = map.point(e); move({ row: whole(r), column: whole(c) }); });
    const frame = (view, name, r, c) => set(name, { x: views[view].x.at(c), y: views[view].y.at(r) });
    const centre = (view, name, r, c) => set(name, { cx: views[view].x.at(c + 0.5), cy: views[view].y.at(r + 0.5) });
    return ({ row, column }) => {
      const [i, j, k, m] = [Math.floor(row / d), row % d, Math.floor(column / d), column % d], b = B[i][k], a = A[j][m];
      frame("product", "cell", row, column);
      frame("B", "cell B", i, k);
      frame("A", "cell A", j, m);
      set("of row", { cy: map.y.at(row + 0.5) });
      set("of column", { cx: map.x.at(column + 0.5) });
      centre("W", "weight row", i, j);
      centre("W", "weight column", k, m);
      say(`Row ${row} belongs to the weight ● <i>W</i><sub>${i}${j}</sub>, column ${column} to ○ <i>W</i><sub>${k}${m}</sub>. ` +
        `The cell is <i>B</i><sub>${i}${k}</sub> · <i>A</i><sub>${j}${m}</sub> = ${significant(b)} × ${significant(a)} = <b>${significant(b * a)}</b>.`);
    };
  };

  // ---------------------------------------------------------------- the error is a covariance
  kinds.matched_pairs = ({ panel, set, entry, say, data }) => {
    const { a, g, limit } = data, k = a.length, dA = a[0].length, dB = g[0].length, error = panel("error");
    const outer = (v) => v.flatMap((p) => v.map((q) => p * q)), AA = a.map(outer), BB = g.map(outer);
    const mean = (rows) => rows[0].map((_, c) => sum(rows.map((row) => row[c])) / k), meanA = mean(AA), meanB = mean(BB);
    return ({ share }) => {
      const weight = (j, i) => ((1 - share) + (i === j ? share * k : 0)) / (k * k);
      for (let j = 0; j < k; j++) for (let i = 0; i < k; i++) set(`pair ${j} ${i}`, { r: 5 * Math.sqrt(weight(j, i) * k * k) });
      /* Sum over all pairs of the weight, an entry of g g^T and one of a a^T. */
      const over = (b, c, p, q) => { let s = 0; for (let j = 0; j < k; j++) for (let i = 0; i < k; i++) s += weight(j, i) * (BB[j][b] - p) * (AA[i][c] - q); return s; };
      const places = (r, c) => [Math.floor(r / dA) * dB + Math.floor(c / dA), (r % dA) * dA + (c % dA)];
      const F = square(dA * dB, (r, c) => over(...places(r, c), 0, 0));
      const K = square(dA * dB, (r, c) => { const [b, q] = places(r, c); return meanB[b] * meanA[q]; });
      const E = square(dA * dB, (r, c) => F[r][c] - K[r][c]);
      for (const [name, M] of [["exact", F], ["product", K], ["lost", E]])
        M.forEach((row, r) => row.forEach((v, c) => entry(`${name} ${r} ${c}`, v, limit)));
      const covariance = norm(meanB.map((p, b) => meanA.map((q, c) => over(b, c, p, q)))), lost = norm(E);
      set("error", { cx: error.x.at(share), cy: error.y.at(lost) });
      set("covariance", { cx: error.x.at(share), cy: error.y.at(covariance) });
      say(`‖<i>F</i> − <i>B</i> ⊗ <i>A</i>‖ = <b>${lost.toFixed(6)}</b>, <i>N</i> ‖Cov‖ = <b>${covariance.toFixed(6)}</b>`);
    };
  };

  // ---------------------------------------------------------------- where is the average?
  kinds.pool_position = ({ panel, figure, set, write, say, data }) => {
    const { errors, exact } = data, chain = panel("chain"), depth = errors[0].length, names = data.controls[0].words, TOP = 60;
    const which = ([e, r]) => (e < exact ? (r < exact ? "both" : "expand") : r < exact ? "reduce" : "neither");
    return ({ pool }) => {
      for (let half = 0; half < 2 * depth + 2; half++) {
        set(`many ${half}`, { opacity: +(half <= 2 * pool) });
        set(`one ${half}`, { opacity: +(half > 2 * pool) });
      }
      const middle = chain.x.at(Math.min(pool, depth) + 0.5);
      set("pool", { d: `M${middle - 9} ${TOP - 16}L${middle + 9} ${TOP}L${middle - 9} ${TOP + 16}Z`, opacity: +(pool <= depth) });
      errors[pool].forEach((pair, i) => {
        ["expand", "reduce"].forEach((name, f) => set(`${name} ${i + 1}`, { y: chain.y.at(pair[f]), height: chain.y.at(0) - chain.y.at(pair[f]) }));
        write(`words ${i + 1}`, which(pair));
      });
      names.forEach((_, k) => set(`place ${k}`, { class: k === pool ? "now" : "other" }));
      say(`Average ${names[pool]}: ${errors[pool].map((pair, i) => `layer ${i + 1} <b>${which(pair)}</b>`).join(", ")}.`);
    };
  };

  // ---------------------------------------------------------------- the triangle of probabilities
  kinds.probability_triangle = ({ panel, set, named, say, move, data }) => {
    const view = panel("triangle"), s = Math.SQRT1_2, t = 1 / Math.sqrt(6), corners = [[s, -t], [-s, -t], [0, 2 * t]];
    const flat = (v) => [0, 1].map((axis) => sum(v.map((w, c) => w * corners[c][axis])));
    const angles = Array.from({ length: data.angles }, (_, k) => (2 * Math.PI * k) / data.angles);
    drag(named.get("hit")[0], view, (x, y) => {
      const p = corners.map(([a, b]) => Math.max(1e-3, 1 / 3 + a * x + b * y));
      move({ first: Math.log(p[0] / p[2]), second: Math.log(p[1] / p[2]) });
    });
    return ({ first, second }) => {
      const weights = [first, second, 0].map((f) => Math.exp(f)), p = weights.map((v) => v / sum(weights)), [x, y] = flat(p);
      const vectors = p.map((q, c) => flat(p.map((r, e) => Math.sqrt(q) * ((e === c) - r))));
      const H = [0, 1, 2].map((n) => sum(vectors.map(([a, b]) => [a * a, a * b, b * b][n])));
      const det = Math.sqrt(Math.max(0, H[0] * H[2] - H[1] * H[1])), size = Math.sqrt(H[0] + H[2] + 2 * det);
      const [xx, xy, yy] = [(H[0] + det) / size, H[1] / size, (H[2] + det) / size];
      set("ellipse", { d: view.path(angles.map((o) => [x + xx * Math.cos(o) + xy * Math.sin(o), y + xy * Math.cos(o) + yy * Math.sin(o)])) + "Z" });
      vectors.forEach(([a, b], c) => set(`vector ${c}`, { d: view.path([[x, y], [x + a, y + b]]) }));
      for (const knob of ["hit", "knob"]) set(knob, { cx: view.x.at(x), cy: view.y.at(y) });
      const trace = 1 - sum(p.map((v) => v * v));
      say(`<i>p</i> = (${p.map((v) => v.toFixed(3)).join(", ")}); the trace of the Fisher, 1 − ‖<i>p</i>‖², is <b>${trace.toFixed(3)}</b>.`);
    };
  };

  // ---------------------------------------------------------------- eigenpairs that follow batches
  kinds.online_eigenpairs = ({ panel, set, say, data }) => {
    const { exact, pairs, tails, shares, errors, ranks } = data, view = panel("spectrum"), bars = panel("captured"), d = exact[0].length;
    const stairs = (values) => view.path(values.flatMap((v, i) => [i, i + 1].map((k) => [k, Math.max(v, view.y.low)])));
    return ({ seen, rank }) => {
      const t = seen - 1, own = pairs[rank][t], tail = tails[rank][t], last = own.length;
      set("exact", { d: stairs(exact[t]) });
      set("kept", { d: stairs([...own, ...Array(d - last).fill(tail)]) });
      set("last", { d: view.path([[last, view.y.low], [last, view.y.high]]) });
      shares[rank][t].forEach((v, i) => set(`share ${i}`, { y: bars.y.at(v), height: bars.y.at(0) - bars.y.at(v) }));
      say(`${seen} batches, <i>r</i> = ${ranks[rank]}: B-KFAC has ${last} eigenpairs and the tail <b>${tail.toFixed(4)}</b>. ` +
        `The error of its damped inverse is <b>${errors[rank][t].toFixed(4)}</b>.`);
    };
  };

  function start() {
    for (const figure of document.querySelectorAll("figure.moving[data-figure]:not(.ready)")) ready(figure);
  }
  if (typeof document$ !== "undefined") document$.subscribe(start); // Material
  else if (document.readyState === "loading") addEventListener("DOMContentLoaded", start);
  else start();
})();
