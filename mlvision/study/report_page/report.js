// The page of a report: what is shown is decided by `state`, drawn by `build` (which tiles) and `paint` (their colours).
window.mlvisionReport = (() => {
  "use strict";

  const WORDS = { TP: "true positive", FP: "false positive", FN: "missed (false negative)", TN: "true negative", unknown: "truth unknown" };
  const MINUS = "\u2212";
  const LONGEST = 144; // pixels of a canvas; the browser smooths the rest
  const KEPT = 200; // images whose maps stay in memory
  const LONG = 80; // letters of a name that are shown

  const $ = (id) => document.getElementById(id);
  const DEFAULTS = { method: 0, label: "", outcomes: null, sort: "loss", find: "", opacity: 80, alone: false, against: null, areas: false, size: 168, many: 12, page: 0 };
  let state = { ...DEFAULTS };
  let report, tables, shown = [], cards = [], turn = 0, closer = null;

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

  const brief = (text) => (text.length > LONG ? `${text.slice(0, LONG - 1)}\u2026` : text);
  const briefPath = (text) => (text.length > LONG ? `\u2026${text.slice(1 - LONG)}` : text);
  const className = (c) => brief(report.classes[c]);
  const nameOf = (label) => className(label.label) + (label.against === undefined ? "" : ` ${MINUS} ${className(label.against)}`);
  const outcomeOf = (label) => report.outcomes[label.outcome];

  // ---- which images and labels

  const labelKey = (label) => label.label + (label.against === undefined ? "" : `-${label.against}`);
  const isFound = (image) => image.key.toLowerCase().includes(state.find.toLowerCase());
  const hasLabel = (label) => !state.label || labelKey(label) === state.label;
  const hasOutcome = (label) => !state.outcomes || state.outcomes.includes(outcomeOf(label));

  function select() {
    const found = [];
    report.images.forEach((image, number) => {
      if (!isFound(image)) return;
      const tiles = image.labels.flatMap((label, n) => (hasLabel(label) && hasOutcome(label) ? [n] : []));
      if (!tiles.length && (state.label || state.outcomes)) return; // an image without labels is shown where nothing is filtered
      const score = (n) => image.labels[n].score, down = state.sort !== "-score";
      if (state.sort.endsWith("score")) tiles.sort((a, b) => (down ? score(b) - score(a) : score(a) - score(b)));
      else tiles.sort((a, b) => image.labels[a].outcome - image.labels[b].outcome || score(b) - score(a));
      found.push({ number, image, tiles });
    });
    const sign = state.sort.startsWith("-") ? 1 : -1;
    const by = state.sort.replace("-", "");
    const value = ({ image, tiles }) => (by === "loss" ? image.loss : tiles.length ? image.labels[tiles[0]].score : null);
    found.sort((a, b) => {
      if (by === "key") return (a.image.key < b.image.key ? sign : -sign) || 0;
      const first = value(a), second = value(b);
      if (first === null || second === null) return (first === null) - (second === null) || a.number - b.number;
      return sign * (first - second) || a.number - b.number;
    });
    return found;
  }

  /** How many labels there are of each outcome, and of each label: what the other filters leave. */
  function count() {
    const outcomes = new Map(report.outcomes.map((outcome) => [outcome, 0])), labels = new Map();
    for (const image of report.images.filter(isFound))
      for (const label of image.labels) {
        if (hasLabel(label)) outcomes.set(outcomeOf(label), outcomes.get(outcomeOf(label)) + 1);
        if (hasOutcome(label)) labels.set(labelKey(label), (labels.get(labelKey(label)) ?? 0) + 1);
      }
    for (const small of document.querySelectorAll("#outcomes small")) small.textContent = outcomes.get(small.dataset.outcome).toLocaleString("en");
    for (const option of document.querySelectorAll("#label option[data-name]"))
      option.textContent = `${option.dataset.name} (${(labels.get(option.value) ?? 0).toLocaleString("en")})`;
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

  function receive(number, data) {
    for (const part of data.methods) if (part) part.values = new Int8Array(bytes(part.cells).buffer);
    arrived.set(number, data);
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
    const [h, w] = part.size, first = n * h * w, [up, down] = part.steps[n];
    const rows = axis(canvas.height, h), columns = axis(canvas.width, w);
    const at = (y, x) => {
      const value = part.values[first + y * w + x];
      return value > 0 ? up * value : signed ? down * value : 0;
    };
    colour(canvas, (x, y) => {
      const l = columns.low[x], r = columns.high[x], fx = columns.part[x];
      const top = at(rows.low[y], l) * (1 - fx) + at(rows.low[y], r) * fx;
      const bottom = at(rows.high[y], l) * (1 - fx) + at(rows.high[y], r) * fx;
      return top + rows.part[y] * (bottom - top);
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

  const SVG = "http://www.w3.org/2000/svg";

  /** A photo in its border, in the shape that it has outside; a button where it can be enlarged. */
  function frame(image, number, tag) {
    const box = make(tag, tag === "button" ? { className: "frame", type: "button" } : { className: "frame" });
    box.style.setProperty("--aspect", image.width / image.height);
    const photo = make("img", { src: `photos/${String(number).padStart(5, "0")}.jpg`, alt: "", decoding: "async", draggable: false });
    const areas = document.createElementNS(SVG, "svg");
    for (const [name, value] of Object.entries({ viewBox: "0 0 1 1", preserveAspectRatio: "none", class: "areas", "aria-hidden": "true" })) areas.setAttribute(name, value);
    box.append(photo, areas);
    return { box, photo, areas };
  }

  /** The outlines of what is annotated with some classes. */
  function drawAreas(areas, data, classes) {
    areas.replaceChildren();
    if (!state.areas || !data) return;
    for (const c of classes)
      for (const points of data.areas[c] ?? [])
        for (const look of ["halo", "line"]) {
          const outline = document.createElementNS(SVG, "polygon");
          outline.setAttribute("points", points.join(" "));
          outline.setAttribute("class", look);
          areas.append(outline);
        }
  }

  function newCanvas(image, longest) {
    const big = longest / Math.max(image.width, image.height);
    return make("canvas", { width: Math.max(1, Math.round(image.width * big)), height: Math.max(1, Math.round(image.height * big)) });
  }

  /** Whether a label's map is drawn with both signs: what speaks against a \u2212 b speaks for b; magnitudes do not say which way. */
  const bothSigns = (method, label) => !method.magnitudes && (state.against ?? (method.signed || label.against !== undefined));
  const cardSigns = (method) => !method.magnitudes && (state.against ?? method.signed);

  /** Draws a label's map by one method, and returns what is to be said of it; `reason`: why nothing could be drawn. */
  function paintMap(canvas, key, method, part, label, n, error) {
    key.replaceChildren();
    let reason = error ? "no data" : part ? "" : `no ${method.name} map of this image`;
    const both = bothSigns(method, label);
    if (part && part.flat[n]) reason = "flat: the same everywhere";
    else if (part && !both && !(part.peaks[n][2] > 0)) reason = "no positive evidence";
    canvas.hidden = !!reason;
    if (reason) return { reason, words: `${reason}.` };
    const limit = state.alone ? part.own[n][+both] : part.limits[state.against === null ? "method" : both ? "both" : "for"], [h, w] = part.size;
    const big = Math.max(1, h / canvas.height, w / canvas.width);
    if (big > 1) { canvas.height = Math.ceil(canvas.height * big); canvas.width = Math.ceil(canvas.width * big); }
    drawMap(canvas, part, n, limit, both);
    if (state.alone || both !== cardSigns(method) || closer) fillKey(key, limit, both, "");
    const peak = part.peaks[n], low = part.lows[n];
    let words = `strongest evidence ${where(peak)}, value ${number(peak[2])}`;
    if (both && low[2] < 0) words += `; strongest against ${where(low)}, value ${number(low[2])}`;
    return { reason: "", words: `${words}.${method.labelSpecific ? "" : " The same map for every label."}` };
  }

  function names(indices) {
    return indices.map(className).join(", ");
  }

  function factsOf(label) {
    const outcome = outcomeOf(label), truth = { TP: "1", FN: "1", FP: "0", TN: "0", unknown: "?" }[outcome];
    const badge = make("span", { className: "badge", textContent: outcome === "unknown" ? "?" : outcome, title: WORDS[outcome] });
    return make("div", { className: "facts" }, `p=${share(label.score)} GT=${truth} `, badge);
  }

  const measuresOf = (part, n) => (part ? part.measures.filter(([, values]) => values[n] !== null).map(([what, values]) => make("div", { textContent: `${what} ${number(values[n])}` })) : []);

  function buildCard({ number: place, image, tiles }) {
    const truth = names(image.truth) || (image.unknown ? "none known" : "none");
    const predicted = names(image.predicted) || "none";
    const unknown = image.unknown ? `${plural(image.unknown, "label")} unknown` : "";

    const photo = frame(image, place, "button");
    photo.photo.alt = `Photo ${image.key}. Ground truth: ${truth}. Predicted: ${predicted}.`;
    photo.box.title = "enlarge";
    const figure = make("figure", { className: "photo" }, photo.box, make("figcaption", {},
      make("div", {}, make("span", { className: "more", textContent: "Truth " }), make("span", { className: "name truth", textContent: truth })),
      unknown ? make("div", { className: "more", textContent: unknown }) : null,
      make("div", {}, make("span", { className: "more", textContent: "Predicted " }), predicted)));

    const key = make("div", { className: "key scale" });
    const card = { place, image, tiles: [], key, photo, data: null };
    photo.box.addEventListener("click", () => enlarge(card, null));
    const strip = make("div", { className: "labels" });
    for (const n of tiles) {
      const label = image.labels[n], { box, areas } = frame(image, place, "button");
      const canvas = newCanvas(image, LONGEST), silent = make("p", { className: "silent", hidden: true });
      box.append(canvas, areas, silent);
      const more = make("div", { className: "more" }), ownKey = make("div", { className: "key" });
      const element = make("figure", { className: `tile ${outcomeOf(label)}` }, box, make("figcaption", {},
        make("div", { className: "name", textContent: nameOf(label) }),
        factsOf(label),
        label.against === undefined ? null : make("div", { className: "facts", textContent: `contrast with ${className(label.against)}, p=${share(label.rivalScore)}` }),
        ownKey, more));
      strip.append(element);
      const tile = { label, n, box, canvas, areas, silent, key: ownKey, more };
      box.addEventListener("click", () => enlarge(card, tile));
      card.tiles.push(tile);
    }
    if (!tiles.length) strip.append(make("p", { className: "more", textContent: "no explained label" }));
    const loss = image.loss === null ? null : make("span", { className: "loss", textContent: `loss ${number(image.loss)}` });
    card.element = make("article", { className: "card" }, make("header", {}, make("h2", { textContent: briefPath(image.key), title: image.key }), loss, key), make("div", { className: "tiles" }, figure, strip));
    return card;
  }

  function paintCard(card) {
    const method = report.methods[state.method], { image } = card;
    const part = card.data && card.data.methods[state.method];
    card.key.hidden = state.alone || !card.tiles.length;
    if (card.error) card.key.replaceChildren(make("small", { className: "note", textContent: card.error }));
    else if (part) {
      const both = cardSigns(method);
      fillKey(card.key, part.limits[state.against === null ? "method" : both ? "both" : "for"], both, `${plural(image.labels.length, "label")}, one scale`);
    } else card.key.replaceChildren();
    drawAreas(card.photo.areas, card.data, image.truth);
    for (const { label, n, box, canvas, areas, silent, key, more } of card.tiles) {
      const { reason, words } = paintMap(canvas, key, method, part, label, n, card.error);
      silent.hidden = !reason;
      silent.textContent = reason;
      drawAreas(areas, card.data, [label.label]);
      const said = `${nameOf(label)}: score ${share(label.score)}, ${WORDS[outcomeOf(label)]}. ${method.name}: ${words}`;
      box.setAttribute("aria-label", said);
      box.title = `${said} Click to enlarge.`;
      more.replaceChildren();
      if (card.data) {
        const facts = card.data.logits ? [`logit ${number(card.data.logits[n])}`] : [];
        facts.push(`threshold ${number(report.thresholds[label.label])}`);
        more.append(make("div", {}, ...facts.flatMap((text, i) => [i ? " \u00b7 " : "", make("span", { textContent: text })])), ...measuresOf(part, n));
      }
    }
  }

  // ---- one label enlarged, by all methods side by side

  function enlarge(card, tile) {
    closer = { card, tile };
    const { image, place, data } = card, label = tile && tile.label;
    $("closer-title").textContent = label ? nameOf(label) : "The photo";
    $("closer-facts").className = label ? outcomeOf(label) : "";
    $("closer-facts").replaceChildren(...(label ? [factsOf(label)] : []), make("span", { className: "more", textContent: briefPath(image.key) }));
    const photo = frame(image, place, "div");
    photo.photo.alt = card.photo.photo.alt;
    drawAreas(photo.areas, data, label ? [label.label] : image.truth);
    const figures = [make("figure", {}, photo.box, make("figcaption", {}, make("div", { className: "name", textContent: "photo" })))];
    if (tile)
      report.methods.forEach((method, m) => {
        const { box, areas } = frame(image, place, "div"), canvas = newCanvas(image, 3 * LONGEST);
        const key = make("div", { className: "key" }), part = data && data.methods[m];
        const { reason, words } = paintMap(canvas, key, method, part, label, tile.n, card.error);
        box.append(canvas, areas);
        if (reason) box.append(make("p", { className: "silent", textContent: reason }));
        drawAreas(areas, data, [label.label]);
        canvas.setAttribute("role", "img");
        canvas.setAttribute("aria-label", `${method.name}: ${words}`);
        figures.push(make("figure", { className: `tile ${outcomeOf(label)}` }, box, make("figcaption", {},
          make("div", { className: "name", textContent: method.name }), key,
          make("div", { className: "more" }, ...(reason ? [] : [make("div", { textContent: words })]), ...measuresOf(part, tile.n)))));
      });
    $("closer-maps").replaceChildren(...figures);
    $("closer-maps").style.setProperty("--columns", Math.min(Math.max(figures.length, 2), 4));
    const tiles = everyTile(), at = tiles.findIndex((other) => other.tile === tile);
    $("closer-previous").disabled = at <= 0;
    $("closer-next").disabled = at < 0 || at >= tiles.length - 1;
    if (!$("closer").open) $("closer").showModal();
  }

  const everyTile = () => cards.flatMap((card) => card.tiles.map((tile) => ({ card, tile })));

  function step(by) {
    const tiles = everyTile(), at = tiles.findIndex(({ tile }) => tile === closer.tile), next = tiles[at + by];
    if (at >= 0 && next) enlarge(next.card, next.tile);
  }

  // ---- the page

  function numPages() {
    return Math.max(1, Math.ceil(shown.length / state.many));
  }

  async function build() {
    const mine = ++turn, box = $("cards");
    shown = select();
    count();
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
      try { card.data = await load(card.place); } catch (error) { card.error = error.message; }
      if (mine === turn) paintCard(card);
    }));
    if (mine !== turn) return;
    box.setAttribute("aria-busy", "false");
    for (const { number: place } of shown.slice(first + state.many, first + 2 * state.many)) load(place).catch(() => {});
  }

  function why() {
    const parts = [];
    if (state.label) parts.push(`label ${$("label").selectedOptions[0]?.dataset.name ?? state.label}`);
    if (state.outcomes) parts.push(state.outcomes.length ? `outcome ${state.outcomes.join(" or ")}` : "no outcome is chosen");
    if (state.find) parts.push(`file names with “${state.find}”`);
    return parts.length ? `Filters: ${parts.join(", ")}.` : "";
  }

  /** Redraws what is on screen in other colours; the same cards stay. */
  function paint() {
    controls();
    cards.filter((card) => card.data || card.error).forEach(paintCard);
  }

  function controls() {
    const { name, signed, labelSpecific, description, averaged, magnitudes } = report.methods[state.method];
    const both = state.against ?? signed;
    $("method").value = state.method;
    $("label").value = state.label;
    $("sort").value = state.sort;
    if ($("find").value !== state.find) $("find").value = state.find;
    $("opacity").value = state.opacity;
    $("opacity-now").textContent = `${state.opacity} %`;
    document.documentElement.style.setProperty("--opacity", state.opacity / 100);
    document.documentElement.style.setProperty("--tile", `${state.size}px`);
    $("alone").checked = state.alone;
    $("against").checked = both && !magnitudes;
    $("against").disabled = magnitudes;
    $("areas").checked = state.areas;
    $("alone-warning").hidden = !state.alone;
    $("size").value = state.size;
    $("many").value = state.many;
    for (const box of document.querySelectorAll("#outcomes input")) box.checked = !state.outcomes || state.outcomes.includes(box.value);
    const note = [make("strong", { textContent: name }), description ? ` ${description} ` : " "];
    if (!labelSpecific) note.push(make("span", { className: "note", textContent: "not label-specific: one map for all labels of an image" }), " ");
    note.push(magnitudes ? "Violet to yellow: how much a pixel could change the score, not which way. "
      : both ? "Blue: evidence against the label, red: for it. "
        : "Violet to yellow: evidence for the label; what speaks against it is not drawn. ");
    if (report.hasContrasts && !magnitudes && state.against !== false) note.push("A contrast a \u2212 b: red for a, blue for b. ");
    note.push(state.alone ? "" : "Colours end at the 99th percentile over all labels of an image. ");
    if (averaged) note.push(`Averaged for display from ${averaged} cells. `);
    $("method-note").replaceChildren(...note);
    address();
  }

  // ---- the address: a view can be linked, and Back goes back

  let written = "";

  function address(push = false) {
    const query = new URLSearchParams();
    if (state.method !== DEFAULTS.method) query.set("method", report.methods[state.method].name);
    for (const key of ["label", "sort", "find", "opacity", "size", "many"]) if (state[key] !== DEFAULTS[key]) query.set(key, state[key]);
    if (state.outcomes) query.set("outcomes", state.outcomes.join(","));
    if (state.alone) query.set("alone", "1");
    if (state.against !== null) query.set("against", state.against ? "1" : "0");
    if (state.areas) query.set("areas", "1");
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
    next.method = Math.max(0, report.methods.findIndex(({ name }) => name === query.get("method")));
    for (const id of ["label", "sort"]) if (has(id, query.get(id) ?? "")) next[id] = query.get(id) ?? "";
    if (!next.sort) next.sort = DEFAULTS.sort;
    for (const id of ["size", "many"]) if (has(id, query.get(id))) next[id] = Number(query.get(id));
    next.find = query.get("find") ?? "";
    if (query.has("opacity")) next.opacity = Math.min(Math.max(parseInt(query.get("opacity"), 10) || 0, 0), 100);
    if (query.has("outcomes")) next.outcomes = report.outcomes.filter((outcome) => query.get("outcomes").split(",").includes(outcome));
    next.alone = query.get("alone") === "1";
    if (query.has("against")) next.against = query.get("against") === "1";
    next.areas = query.get("areas") === "1" && report.hasAreas;
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
    $("against").addEventListener("change", (event) => repaint({ against: event.target.checked }));
    $("areas").addEventListener("change", (event) => repaint({ areas: event.target.checked }));
    $("closer-close").addEventListener("click", () => $("closer").close());
    $("closer-previous").addEventListener("click", () => step(-1));
    $("closer-next").addEventListener("click", () => step(1));
    $("closer").addEventListener("click", (event) => { if (event.target === $("closer")) $("closer").close(); }); // beside it
    $("closer").addEventListener("close", () => { closer = null; });
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
    if (closer) {
      if (event.key === "ArrowRight") step(1);
      else if (event.key === "ArrowLeft") step(-1);
      return;
    }
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
    else if (event.key === "n" && !inside && !$("against").disabled) repaint({ against: !$("against").checked });
    else if (event.key === "a" && !inside && report.hasAreas) repaint({ areas: !state.areas });
    else done = false;
    if (done) event.preventDefault();
  }

  // ---- the table of classes

  const whole = (count) => count.toLocaleString("en");
  const ratio = (part, rest) => (part + rest ? part / (part + rest) : null);
  const OF_ALL = ["class", "explained"]; // columns that need no ground truth
  const COLUMNS = [
    ["class", (row) => className(row.class), "name"],
    ["images with it", (row) => row.TP + row.FN, "whose ground truth has the class"],
    ["found", (row) => row.TP, WORDS.TP],
    ["missed", (row) => row.FN, WORDS.FN],
    ["wrongly seen", (row) => row.FP, WORDS.FP],
    ["mistakes", (row) => row.FN + row.FP, "missed and wrongly seen"],
    ["unknown", (row) => row.unknown, WORDS.unknown],
    ["precision", (row) => ratio(row.TP, row.FP), "of those that are predicted, the share that is right", share],
    ["recall", (row) => ratio(row.TP, row.FN), "of those that are there, the share that is found", share],
    ["explained", (row) => row.explained, "labels with a map in this report, contrasts left out"],
  ];

  function fillTable(by, down) {
    const columns = report.isJudged ? COLUMNS : COLUMNS.filter(([title]) => OF_ALL.includes(title));
    const value = columns[by][1], sign = down ? -1 : 1;
    const compare = (a, b) => {
      const first = value(a), second = value(b);
      if (first === null || second === null) return (first === null) - (second === null);
      return sign * (first < second ? -1 : first > second ? 1 : 0);
    };
    const rows = [...report.table].sort((a, b) => compare(a, b) || a.class - b.class);
    $("classes-head").replaceChildren(...columns.map(([title, , meaning], column) => {
      const button = make("button", { type: "button", textContent: title, title: meaning });
      button.addEventListener("click", () => fillTable(column, column === by ? !down : column > 0));
      const cell = make("th", { scope: "col" }, button);
      if (column === by) cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      return cell;
    }));
    $("classes-body").replaceChildren(...rows.map((row) => {
      const button = make("button", { type: "button", textContent: className(row.class), disabled: !row.explained, title: "show this label only" });
      button.addEventListener("click", () => refilter({ label: String(row.class) }));
      const cells = columns.slice(1).map(([, of, , format = whole]) => make("td", { textContent: of(row) === null ? "\u2013" : format(of(row)) }));
      return make("tr", {}, make("th", { scope: "row" }, button), ...cells);
    }));
  }

  // ---- start

  function index(data) {
    report = data;
    const every = data.images.flatMap((image) => image.labels);
    report.numLabels = every.length;
    report.isJudged = data.images.some((image) => image.unknown < data.classes.length);
    if (!report.isJudged) { // images without ground truth have no loss and no outcome
      DEFAULTS.sort = "score";
      for (const option of [...$("sort").options]) if (option.value.endsWith("loss")) option.remove();
      $("outcomes").closest("fieldset").hidden = true;
    }
    report.hasContrasts = every.some((label) => label.against !== undefined);
    tables = data.colours.map((text) => new Uint32Array(bytes(text).buffer));
    $("summary").append(...data.summary.flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })]));
    $("about").hidden = !data.summary.length;
    $("areas").closest("label").hidden = $("help-areas").hidden = !data.hasAreas;
    data.methods.forEach(({ name }, m) => $("method").append(make("option", { value: m, textContent: data.methods.length > 1 ? `${m + 1}  ${name}` : name })));

    const labels = new Map(every.map((label) => [labelKey(label), label])), outcomes = new Set(every.map(outcomeOf));
    $("label").append(make("option", { value: "", textContent: "all labels" }));
    const option = ([id, label]) => {
      const element = make("option", { value: id });
      element.dataset.name = nameOf(label);
      return element;
    };
    const sorted = [...labels].sort((a, b) => (nameOf(a[1]) < nameOf(b[1]) ? -1 : 1));
    $("label").append(...sorted.filter(([, label]) => label.against === undefined).map(option));
    const contrasts = sorted.filter(([, label]) => label.against !== undefined).map(option);
    if (contrasts.length) $("label").append(make("optgroup", { label: "contrasts" }, ...contrasts));
    for (const outcome of data.outcomes)
      if (outcomes.has(outcome) || outcome !== "unknown") {
        const small = make("small");
        small.dataset.outcome = outcome;
        $("outcomes").append(make("label", { className: "pill", title: WORDS[outcome] }, make("input", { type: "checkbox", value: outcome, checked: true }), outcome, small));
      }
    fillTable(report.isJudged ? COLUMNS.findIndex(([title]) => title === "mistakes") : 1, true);
    listen();
    fromAddress();
    build();
  }

  return { index, image: receive };
})();
