// The page of a report: what is shown is decided by `state`, drawn by `build` (which tiles) and `paint` (their colours).
window.mlvisionReport = (() => {
  "use strict";

  const WORDS = { TP: "true positive", FP: "false positive", FN: "missed (false negative)", TN: "true negative", unknown: "truth unknown" };
  const MINUS = "\u2212";
  const LONGEST = 144; // pixels of a canvas; the browser smooths the rest
  const KEPT = 200; // images whose maps stay in memory
  const DRAWN = 0, FLAT = 1;
  // The columns of an image in data/index.js.
  const KEY = 0, HEIGHT = 1, WIDTH = 2, LOSS = 3, TRUTH = 4, UNKNOWN = 5, PREDICTED = 6, LABELS = 7, OUTCOME = 8, SCORE = 9, RIVALS = 10;

  const $ = (id) => document.getElementById(id);
  const DEFAULTS = { method: 0, label: "", outcomes: null, sort: "loss", find: "", opacity: 80, alone: false, size: 168, many: 12, page: 0 };
  let state = { ...DEFAULTS };
  let report, tables, shown = [], cards = [], turn = 0;

  // ---- words and small elements

  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children.filter((child) => child !== null));
    return element; // names become text nodes, never markup
  }

  function number(value, digits = 3) {
    if (value === null || value === undefined) return "n/a";
    const size = Math.abs(value);
    const text = value && (size < 1e-3 || size >= 1e4) ? value.toExponential(digits - 1) : String(Number(value.toPrecision(digits)));
    return text.replaceAll("-", MINUS);
  }

  const share = (value) => value.toFixed(2);
  const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

  function where([x, y]) {
    const across = x < 1 / 3 ? "left" : x > 2 / 3 ? "right" : "centre";
    const down = y < 1 / 3 ? "upper" : y > 2 / 3 ? "lower" : "middle";
    const percent = (part) => `${Math.round(100 * part)} %`;
    return `${down} ${across} (${percent(x)} from the left, ${percent(y)} from the top)`;
  }

  function nameOf(row, n) {
    const rival = row[RIVALS][n];
    return report.classes[row[LABELS][n]] + (rival ? ` ${MINUS} ${report.classes[rival[0]]}` : "");
  }

  // ---- which images and labels

  const labelKey = (row, n) => row[LABELS][n] + (row[RIVALS][n] ? `-${row[RIVALS][n][0]}` : "");

  function select() {
    const wanted = state.outcomes, find = state.find.toLowerCase();
    const found = [];
    report.images.forEach((row, image) => {
      if (find && !row[KEY].toLowerCase().includes(find)) return;
      const tiles = [];
      row[LABELS].forEach((_, n) => {
        if (state.label && labelKey(row, n) !== state.label) return;
        if (wanted && !wanted.includes(report.outcomes[row[OUTCOME][n]])) return;
        tiles.push(n);
      });
      if (!tiles.length && (state.label || wanted)) return; // an image without labels is shown where nothing is filtered
      const down = state.sort !== "-score";
      if (state.sort.endsWith("score")) tiles.sort((a, b) => (down ? row[SCORE][b] - row[SCORE][a] : row[SCORE][a] - row[SCORE][b]));
      else tiles.sort((a, b) => row[OUTCOME][a] - row[OUTCOME][b] || row[SCORE][b] - row[SCORE][a]);
      found.push({ image, tiles });
    });
    const sign = state.sort.startsWith("-") ? 1 : -1;
    const by = state.sort.replace("-", "");
    const value = ({ image, tiles }) => (by === "loss" ? report.images[image][LOSS] : tiles.length ? report.images[image][SCORE][tiles[0]] : null);
    found.sort((a, b) => {
      if (by === "key") return (report.images[a.image][KEY] < report.images[b.image][KEY] ? sign : -sign) || 0;
      const first = value(a), second = value(b);
      if (first === null || second === null) return (first === null) - (second === null) || a.image - b.image;
      return sign * (first - second) || a.image - b.image;
    });
    return found;
  }

  // ---- data of single images

  const arrived = new Map(), waiting = new Map();

  function load(image) {
    if (arrived.has(image)) return Promise.resolve(arrived.get(image));
    if (!waiting.has(image)) {
      const file = `data/${String(image).padStart(5, "0")}.js`;
      waiting.set(image, new Promise((resolve, reject) => {
        const script = make("script", { src: file });
        script.onload = () => { script.remove(); waiting.delete(image); resolve(arrived.get(image)); };
        script.onerror = () => { script.remove(); waiting.delete(image); reject(new Error(`${file} is missing or damaged`)); };
        document.head.append(script);
      }));
    }
    return waiting.get(image);
  }

  function bytes(text) {
    const raw = atob(text), result = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) result[i] = raw.charCodeAt(i);
    return result;
  }

  function receive(image, [logits, maps]) {
    const methods = maps.map((part) => {
      if (!part) return null;
      const positive = bytes(part.cells);
      return { ...part, positive, signed: new Int8Array(positive.buffer) };
    });
    arrived.set(image, { logits, methods });
    if (arrived.size > KEPT) arrived.delete(arrived.keys().next().value);
  }

  // ---- colours

  function axis(pixels, cells) {
    // The two cells whose centres a pixel's centre lies between, and how far it is towards the second.
    const low = new Int32Array(pixels), high = new Int32Array(pixels), part = new Float64Array(pixels);
    for (let p = 0; p < pixels; p++) {
      const at = Math.min(Math.max(((p + 0.5) * cells) / pixels - 0.5, 0), cells - 1);
      low[p] = Math.floor(at);
      high[p] = Math.min(low[p] + 1, cells - 1);
      part[p] = at - low[p];
    }
    return { low, high, part };
  }

  function colour(canvas, valueAt, limit, signed) {
    const { width, height } = canvas, context = canvas.getContext("2d");
    const picture = context.createImageData(width, height);
    const pixels = new Uint32Array(picture.data.buffer), table = tables[+signed];
    const lowest = signed ? -1 : 0, zero = signed ? 255.5 : 0.5;
    for (let y = 0, i = 0; y < height; y++)
      for (let x = 0; x < width; x++, i++) {
        const strength = Math.min(Math.max(valueAt(x, y) / limit, lowest), 1);
        pixels[i] = table[Math.floor(255 * strength + zero)];
      }
    context.putImageData(picture, 0, 0);
  }

  function drawMap(canvas, part, n, limit, signed) {
    const [h, w] = part.size, first = n * h * w, step = part.steps[n], values = signed ? part.signed : part.positive;
    const rows = axis(canvas.height, h), columns = axis(canvas.width, w);
    const at = (y, x) => values[first + y * w + x];
    colour(canvas, (x, y) => {
      const l = columns.low[x], r = columns.high[x], fx = columns.part[x];
      const top = at(rows.low[y], l) * (1 - fx) + at(rows.low[y], r) * fx;
      const bottom = at(rows.high[y], l) * (1 - fx) + at(rows.high[y], r) * fx;
      return step * (top + rows.part[y] * (bottom - top));
    }, limit, signed);
  }

  function fillKey(box, limit, signed, words) {
    box.replaceChildren();
    if (!limit) {
      box.append(make("small", { textContent: "nothing to draw" }));
      return;
    }
    const bar = make("canvas", { width: 160, height: 1 });
    bar.setAttribute("aria-hidden", "true");
    colour(bar, (x) => (signed ? ((2 * x) / 159 - 1) * limit : (x / 159) * limit), limit, signed);
    const ends = signed ? [number(-limit), "0", `+${number(limit)}`] : ["0", number(limit)];
    box.append(bar, make("span", {}, ...ends.map((end) => make("b", { textContent: end }))));
    if (words) box.append(make("small", { textContent: words }));
  }

  // ---- cards

  function frame(row, image) {
    const box = make("div", { className: "frame" });
    box.style.setProperty("--aspect", row[WIDTH] / row[HEIGHT]);
    const photo = make("img", { src: `photos/${String(image).padStart(5, "0")}.jpg`, alt: "", decoding: "async", draggable: false });
    box.append(photo);
    return { box, photo };
  }

  function names(indices) {
    return indices.map((c) => report.classes[c]).join(", ");
  }

  function buildCard({ image, tiles }) {
    const row = report.images[image];
    const truth = names(row[TRUTH]) || (row[UNKNOWN] ? "none known" : "none");
    const predicted = names(row[PREDICTED]) || "none";
    const unknown = row[UNKNOWN] ? `${plural(row[UNKNOWN], "label")} unknown` : "";

    const photo = frame(row, image);
    photo.photo.alt = `Photo ${row[KEY]}. Ground truth: ${truth}. Predicted: ${predicted}.`;
    const figure = make("figure", { className: "photo" }, photo.box, make("figcaption", {},
      make("div", {}, make("span", { className: "more", textContent: "Truth " }), make("span", { className: "name truth", textContent: truth })),
      unknown ? make("div", { className: "more", textContent: unknown }) : null,
      make("div", {}, make("span", { className: "more", textContent: "Predicted " }), predicted)));

    const key = make("div", { className: "key scale" });
    const card = { image, row, tiles: [], key, data: null };
    const strip = make("div", { className: "labels" });
    for (const n of tiles) {
      const outcome = report.outcomes[row[OUTCOME][n]], rival = row[RIVALS][n], c = row[LABELS][n];
      const { box } = frame(row, image);
      const big = LONGEST / Math.max(row[WIDTH], row[HEIGHT]);
      const canvas = make("canvas", { width: Math.max(1, Math.round(row[WIDTH] * big)), height: Math.max(1, Math.round(row[HEIGHT] * big)) });
      canvas.setAttribute("role", "img");
      const silent = make("p", { className: "silent", hidden: true });
      box.append(canvas, silent);
      const gt = { TP: "1", FN: "1", FP: "0", TN: "0", unknown: "?" }[outcome];
      const facts = `p=${share(row[SCORE][n])} GT=${gt} `;
      const more = make("div", { className: "more" }), ownKey = make("div", { className: "key" });
      const badge = make("span", { className: "badge", textContent: outcome === "unknown" ? "?" : outcome, title: WORDS[outcome] });
      const element = make("figure", { className: `tile ${outcome}` }, box, make("figcaption", {},
        make("div", { className: "name", textContent: nameOf(row, n) }),
        make("div", { className: "facts" }, facts, badge),
        rival ? make("div", { className: "facts", textContent: `contrast with ${report.classes[rival[0]]}, p=${share(rival[1])}` }) : null,
        ownKey, more));
      strip.append(element);
      card.tiles.push({ n, c, outcome, box, canvas, silent, more, key: ownKey });
    }
    const loss = row[LOSS] === null ? null : make("span", { className: "loss", textContent: `loss ${number(row[LOSS])}` });
    card.element = make("article", { className: "card" }, make("header", {}, make("h2", { textContent: row[KEY] }), loss, key), make("div", { className: "tiles" }, figure, strip));
    return card;
  }

  function paintCard(card) {
    const [method, signed, specific, , , magnitudes] = report.methods[state.method];
    const part = card.data && card.data.methods[state.method], { row } = card;
    card.key.hidden = state.alone || !card.tiles.length;
    if (card.error) card.key.replaceChildren(make("small", { className: "note", textContent: card.error }));
    else if (part) fillKey(card.key, part.limit, signed, `${plural(row[LABELS].length, "label")}, one scale`);
    else card.key.replaceChildren();
    for (const tile of card.tiles) {
      const { canvas, silent, n } = tile;
      const name = nameOf(row, n), outcome = WORDS[tile.outcome];
      let words = `${name}: score ${share(row[SCORE][n])}, ${outcome}. ${method}: `;
      let reason = card.error ? "no data" : !part ? `no ${method} map of this image` : "";
      if (part && part.silent[n] !== DRAWN)
        reason = part.silent[n] === FLAT ? "flat: the same everywhere" : "no positive evidence";
      silent.hidden = !reason;
      silent.textContent = reason;
      canvas.hidden = !!reason;
      tile.key.replaceChildren();
      tile.more.replaceChildren();
      if (reason) {
        words += `${reason}.`;
        tile.box.setAttribute("aria-label", words);
        tile.box.setAttribute("role", "img");
      } else {
        const limit = state.alone ? part.own[n] : part.limit, [h, w] = part.size;
        const big = Math.max(1, h / canvas.height, w / canvas.width);
        if (big > 1) { canvas.height = Math.ceil(canvas.height * big); canvas.width = Math.ceil(canvas.width * big); }
        // What speaks against a − b speaks for b; magnitudes do not say which way.
        const both = signed || (!magnitudes && !!row[RIVALS][n]);
        drawMap(canvas, part, n, limit, both);
        if (state.alone || both !== signed) fillKey(tile.key, limit, both, "");
        const peak = part.peaks[n], low = both && part.lows[n];
        words += `strongest evidence ${where(peak)}, value ${number(peak[2])}`;
        if (low && low[2] < 0) words += `; strongest against ${where(low)}, value ${number(low[2])}`;
        words += `.${specific ? "" : " The same map for every label."}`;
        tile.box.removeAttribute("aria-label");
        tile.box.removeAttribute("role");
      }
      canvas.setAttribute("aria-label", words);
      canvas.title = words;
      if (card.data) {
        const facts = card.data.logits ? [`logit ${number(card.data.logits[n])}`] : [];
        facts.push(`threshold ${number(report.thresholds[tile.c])}`);
        const measures = part ? part.measures.filter(([, values]) => values[n] !== null).map(([what, values]) => `${what} ${number(values[n])}`) : [];
        tile.more.append(make("div", {}, ...facts.flatMap((text, i) => [i ? " · " : "", make("span", { textContent: text })])), ...measures.map((text) => make("div", { textContent: text })));
      }
    }
  }

  // ---- the page

  function numPages() {
    return Math.max(1, Math.ceil(shown.length / state.many));
  }

  async function build() {
    const mine = ++turn, box = $("cards");
    shown = select();
    state.page = Math.min(Math.max(state.page, 0), numPages() - 1);
    controls();
    const first = state.page * state.many, chosen = shown.slice(first, first + state.many);
    box.setAttribute("aria-busy", "true");
    cards = chosen.map(buildCard);
    box.replaceChildren(...cards.map((card) => card.element));
    const labels = shown.reduce((sum, entry) => sum + entry.tiles.length, 0);
    $("counts").textContent = shown.length === report.images.length && labels === report.numLabels
      ? `${plural(report.images.length, "image")}, ${plural(labels, "explained label")}`
      : `${plural(shown.length, "image")} of ${report.images.length.toLocaleString("en")}, ${plural(labels, "explained label")} of ${report.numLabels.toLocaleString("en")}`;
    const page = `Page ${state.page + 1} of ${numPages()}`;
    $("page").textContent = page;
    $("previous").disabled = state.page === 0;
    $("next").disabled = state.page >= numPages() - 1;
    $("empty").hidden = shown.length > 0;
    $("empty-why").textContent = why();
    $("status").textContent = shown.length ? `${page}: images ${first + 1} to ${first + chosen.length} of ${shown.length}` : `Nothing matches. ${why()}`;
    // Each card as soon as its maps are here: the first must not wait for the last.
    await Promise.all(cards.map(async (card) => {
      try { card.data = await load(card.image); } catch (error) { card.error = error.message; }
      if (mine === turn) paintCard(card);
    }));
    if (mine !== turn) return;
    box.setAttribute("aria-busy", "false");
    for (const { image } of shown.slice(first + state.many, first + 2 * state.many)) load(image).catch(() => {});
  }

  function why() {
    const parts = [];
    if (state.label) parts.push(`label ${$("label").selectedOptions[0]?.dataset.name ?? state.label}`);
    if (state.outcomes) parts.push(state.outcomes.length ? `outcome ${state.outcomes.join(" or ")}` : "no outcome is chosen");
    if (state.find) parts.push(`keys with “${state.find}”`);
    return parts.length ? `Filters: ${parts.join(", ")}.` : "";
  }

  /** Redraws what is on screen in other colours; the same cards stay. */
  function paint() {
    controls();
    cards.filter((card) => card.data || card.error).forEach(paintCard);
  }

  function controls() {
    const [name, signed, specific, description, averaged, magnitudes] = report.methods[state.method];
    $("method").value = state.method;
    $("label").value = state.label;
    $("sort").value = state.sort;
    if ($("find").value !== state.find) $("find").value = state.find;
    $("opacity").value = state.opacity;
    $("opacity-now").textContent = `${state.opacity} %`;
    document.documentElement.style.setProperty("--opacity", state.opacity / 100);
    document.documentElement.style.setProperty("--tile", `${state.size}px`);
    $("alone").checked = state.alone;
    $("alone-warning").hidden = !state.alone;
    $("size").value = state.size;
    $("many").value = state.many;
    for (const box of document.querySelectorAll("#outcomes input")) box.checked = !state.outcomes || state.outcomes.includes(box.value);
    const note = [make("strong", { textContent: name }), description ? ` ${description} ` : " "];
    if (!specific) note.push(make("span", { className: "note", textContent: "not label-specific: one map for all labels of an image" }), " ");
    note.push(signed ? "Blue: evidence against the label, red: for it. "
      : magnitudes ? "Violet to yellow: how much a pixel could change the score, not which way. "
        : "Violet to yellow: evidence for the label; what speaks against it is not drawn. ");
    if (report.hasContrasts && !magnitudes) note.push("A contrast a \u2212 b: red for a, blue for b. ");
    note.push(state.alone ? "" : "Colours end at the 99th percentile over all labels of an image. ");
    if (averaged) note.push(`Averaged for display from ${averaged} cells. `);
    $("method-note").replaceChildren(...note);
    address();
  }

  // ---- the address: a view can be linked, and Back goes back

  let written = "";

  function address(push = false) {
    const query = new URLSearchParams();
    if (state.method !== DEFAULTS.method) query.set("method", report.methods[state.method][0]);
    for (const key of ["label", "sort", "find", "opacity", "size", "many"]) if (state[key] !== DEFAULTS[key]) query.set(key, state[key]);
    if (state.outcomes) query.set("outcomes", state.outcomes.join(","));
    if (state.alone) query.set("alone", "1");
    if (state.page) query.set("page", state.page + 1);
    const text = `#${query}`;
    if (text === (location.hash || "#")) return;
    written = text;
    if (push) history.pushState(null, "", text);
    else history.replaceState(null, "", text);
  }

  function fromAddress() {
    const query = new URLSearchParams(location.hash.slice(1));
    const has = (id, value) => [...$(id).options].some((option) => option.value === String(value));
    const next = { ...DEFAULTS };
    next.method = Math.max(0, report.methods.findIndex(([name]) => name === query.get("method")));
    for (const id of ["label", "sort"]) if (has(id, query.get(id) ?? "")) next[id] = query.get(id) ?? "";
    if (!next.sort) next.sort = DEFAULTS.sort;
    for (const id of ["size", "many"]) if (has(id, query.get(id))) next[id] = Number(query.get(id));
    next.find = query.get("find") ?? "";
    if (query.has("opacity")) next.opacity = Math.min(Math.max(parseInt(query.get("opacity"), 10) || 0, 0), 100);
    if (query.has("outcomes")) next.outcomes = report.outcomes.filter((outcome) => query.get("outcomes").split(",").includes(outcome));
    next.alone = query.get("alone") === "1";
    next.page = (parseInt(query.get("page"), 10) || 1) - 1;
    state = next;
  }

  // ---- what the reader does

  function refilter(change) {
    state = { ...state, page: 0, ...change };
    build();
  }

  function goTo(page) {
    if (page < 0 || page >= numPages()) return false;
    state.page = page;
    address(true);
    build();
    const top = $("cards").getBoundingClientRect().top;
    if (top < 0) $("cards").scrollIntoView({ block: "start" });
    return true;
  }

  function repaint(change) {
    state = { ...state, ...change };
    paint();
  }

  function listen() {
    $("controls").addEventListener("submit", (event) => event.preventDefault());
    $("method").addEventListener("change", (event) => repaint({ method: Number(event.target.value) }));
    $("label").addEventListener("change", (event) => refilter({ label: event.target.value }));
    $("sort").addEventListener("change", (event) => refilter({ sort: event.target.value }));
    $("find").addEventListener("input", (event) => refilter({ find: event.target.value }));
    $("outcomes").addEventListener("change", () => {
      const boxes = [...document.querySelectorAll("#outcomes input")];
      const chosen = boxes.filter((box) => box.checked).map((box) => box.value);
      refilter({ outcomes: chosen.length === boxes.length ? null : chosen });
    });
    $("opacity").addEventListener("input", (event) => repaintOpacity(Number(event.target.value)));
    $("alone").addEventListener("change", (event) => repaint({ alone: event.target.checked }));
    $("size").addEventListener("change", (event) => repaint({ size: Number(event.target.value) }));
    $("many").addEventListener("change", (event) => refilter({ many: Number(event.target.value) }));
    $("previous").addEventListener("click", () => goTo(state.page - 1));
    $("next").addEventListener("click", () => goTo(state.page + 1));
    $("reset").addEventListener("click", () => refilter({ label: "", outcomes: null, find: "" }));

    // Chosen with the mouse, a list gives the keys back: arrows then turn pages instead of changing the list.
    let pointed = false;
    addEventListener("pointerdown", () => { pointed = true; }, true);
    addEventListener("keydown", () => { pointed = false; }, true);
    $("controls").addEventListener("change", (event) => { if (pointed && event.target.matches("select, [type=range]")) event.target.blur(); });

    addEventListener("keydown", key);
    addEventListener("popstate", () => { if (location.hash !== written) { written = location.hash; fromAddress(); build(); } });
  }

  function repaintOpacity(opacity) {
    state.opacity = Math.min(Math.max(opacity, 0), 100);
    controls(); // the colours stay as they are: the canvas as a whole lets more or less of the photo through
  }

  function key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const inside = event.target.matches("select, input:not([type=checkbox])");
    if (event.target.matches("input[type=search]") || (inside && (event.key.startsWith("Arrow") || event.key.startsWith("Page")))) return;
    const page = document.documentElement, atTop = page.scrollTop <= 1;
    const atEnd = page.scrollTop + page.clientHeight >= page.scrollHeight - 2;
    let done = true;
    if (event.key === "ArrowRight") goTo(state.page + 1);
    else if (event.key === "ArrowLeft") goTo(state.page - 1);
    else if (event.key === "PageDown" && atEnd) { if (goTo(state.page + 1)) scrollTo(0, 0); }
    else if (event.key === "PageUp" && atTop) goTo(state.page - 1);
    else if (event.key >= "1" && event.key <= "9" && event.key.length === 1 && !inside) {
      if (Number(event.key) <= report.methods.length) repaint({ method: Number(event.key) - 1 });
    } else if (event.key === "[") repaintOpacity(state.opacity - 10);
    else if (event.key === "]") repaintOpacity(state.opacity + 10);
    else if (event.key === "s" && !inside) repaint({ alone: !state.alone });
    else done = false;
    if (done) event.preventDefault();
  }

  // ---- start

  function index(data) {
    report = data;
    report.numLabels = data.images.reduce((sum, row) => sum + row[LABELS].length, 0);
    report.hasContrasts = data.images.some((row) => Object.keys(row[RIVALS]).length);
    tables = data.colours.map((text) => new Uint32Array(bytes(text).buffer));
    $("summary").append(...data.summary.flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })]));
    $("about").hidden = !data.summary.length;
    data.methods.forEach(([name], m) => $("method").append(make("option", { value: m, textContent: data.methods.length > 1 ? `${m + 1}  ${name}` : name })));

    const labels = new Map(), outcomes = new Map(data.outcomes.map((outcome) => [outcome, 0]));
    for (const row of data.images)
      row[LABELS].forEach((c, n) => {
        const id = labelKey(row, n), entry = labels.get(id) ?? { name: nameOf(row, n), count: 0, rival: !!row[RIVALS][n] };
        entry.count++;
        labels.set(id, entry);
        const outcome = data.outcomes[row[OUTCOME][n]];
        outcomes.set(outcome, outcomes.get(outcome) + 1);
      });
    $("label").append(make("option", { value: "", textContent: "all labels" }));
    const option = ([id, { name, count }]) => {
      const element = make("option", { value: id, textContent: `${name} (${count})` });
      element.dataset.name = name;
      return element;
    };
    const sorted = [...labels].sort((a, b) => (a[1].name < b[1].name ? -1 : 1));
    $("label").append(...sorted.filter(([, entry]) => !entry.rival).map(option));
    const contrasts = sorted.filter(([, entry]) => entry.rival).map(option);
    if (contrasts.length) $("label").append(make("optgroup", { label: "contrasts" }, ...contrasts));
    for (const [outcome, count] of outcomes)
      if (count || outcome !== "unknown")
        $("outcomes").append(make("label", { className: "pill", title: WORDS[outcome] }, make("input", { type: "checkbox", value: outcome, checked: true }), outcome, make("small", { textContent: count.toLocaleString("en") })));
    listen();
    fromAddress();
    build();
  }

  return { index, image: receive };
})();
