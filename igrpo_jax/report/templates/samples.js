"use strict";
// The sample page: which prompts of which step, and what stands under each of them.
//
// data/index.js calls samplesIndex once, with the flags of every prompt of every step; data/RUN/STEP_PART.js calls
// samplesLoaded when a page needs it. What a model wrote is inserted by textContent alone, and never as a link, a style
// or an attribute that a browser acts on.

const PROMPTS = 6; // on a page
const LONGEST = 20000; // characters of a text that are shown before one asks for the rest
const KEPT_PARTS = 24; // data files held in memory
const KEPT = 0.5; // share of the words of a refinement and its draft below which changes are not shown
const MARKED = 500; // places that a search marks on a page
const FARTHEST = 1500; // words to take out and put in, past which two texts are not aligned
const MOST_WORDS = 40000; // of a text that is aligned

let index = null;
let view = { run: 0, step: 0, every: false, flags: [], query: "", page: 0 };
let matches = []; // [step, prompt] by their places in the index
let turn = 0; // of the newest change of the view; older searches end when they see it
const parts = new Map(); // "RUN/STEP_PART" -> promise of its prompts, the last used last
const arrived = new Map(); // the same -> its prompts, until the promise takes them
const at = (id) => document.getElementById(id);

function samplesIndex(data) {
  index = data;
  for (const [place, run] of index.runs.entries()) at("run").append(node("option", { value: place }, run.name));
  at("run").hidden = index.runs.length < 2;
  for (const name of index.flags) at("flags").append(node("button", { type: "button", name }));
  readHash();
  listen();
  change({ page: view.page });
}

function samplesLoaded(key, prompts) {
  arrived.set(key, prompts);
}

// Data

function load(key) {
  const known = parts.get(key) ?? read(key);
  parts.delete(key);
  parts.set(key, known);
  for (const old of [...parts.keys()].slice(0, -KEPT_PARTS)) parts.delete(old);
  return known;
}

function read(key) {
  return new Promise((resolve, reject) => {
    const script = node("script", { src: `data/${key}.js` });
    script.onload = script.onerror = () => {
      script.remove();
      if (arrived.has(key)) return resolve(arrived.get(key)), arrived.delete(key);
      parts.delete(key);
      reject(new Error(`data/${key}.js cannot be read; write the report again`));
    };
    document.head.append(script);
  });
}

async function prompt(step, place) {
  const entry = steps()[step];
  let part = 0;
  while (place >= entry.parts[part]) place -= entry.parts[part++];
  return (await load(`${view.run}/${String(entry.step).padStart(6, "0")}_${part}`))[place];
}

const steps = () => index.runs[view.run].steps;
const mask = () => view.flags.reduce((sum, name) => sum | (1 << index.flags.indexOf(name)), 0);

function* candidates() {
  const wanted = mask();
  const [first, last] = view.every ? [0, steps().length - 1] : [view.step, view.step];
  for (let step = first; step <= last && steps().length; step++)
    for (const [place, flags] of steps()[step].flags.entries()) if ((flags & wanted) === wanted) yield [step, place];
}

async function find() {
  const mine = ++turn;
  const query = view.query.toLowerCase();
  const found = [];
  matches = query ? found : [...candidates()];
  if (!query) return show(mine);
  let last = -1;
  let shown = false;
  for (const [step, place] of candidates()) {
    const one = await prompt(step, place);
    if (mine !== turn) return;
    if (step !== last) {
      say(`${found.length} found, searched ${step} of ${steps().length} steps`);
      last = step;
    }
    if (holds(one, query)) found.push([step, place]);
    if (!shown && found.length > (view.page + 1) * PROMPTS) {
      shown = true;
      await show(mine);
    }
  }
  return show(mine);
}

function holds(one, query) {
  const samples = [...one.drafts, ...one.completions].map((sample) => sample.text);
  return [one.id, one.question, one.answer ?? "", ...samples].some((text) => text.toLowerCase().includes(query));
}

// Controls

function change(what) {
  view = { ...view, page: 0, ...what };
  view.step = Math.min(Math.max(view.step, 0), Math.max(steps().length - 1, 0));
  writeHash();
  drawControls();
  return find().catch((error) => at("prompts").replaceChildren(node("p", { className: "lost" }, error.message)));
}

function listen() {
  at("run").onchange = () => change({ run: Number(at("run").value), step: Infinity });
  at("previous").onclick = () => change({ step: view.step - 1, every: false });
  at("next").onclick = () => change({ step: view.step + 1, every: false });
  at("step").onchange = () => change({ step: placeOf(Number(at("step").value)), every: false });
  at("every").onchange = () => change({ every: at("every").checked });
  at("diff").onchange = () => change({ page: view.page });
  at("query").onchange = () => change({ query: at("query").value.trim() });
  // Of use where the window is narrow; elsewhere the choices are always there.
  at("more").onclick = () => at("more").setAttribute("aria-expanded", at("more").ariaExpanded !== "true");
  for (const button of at("flags").children)
    button.onclick = () => {
      const others = view.flags.filter((name) => name !== button.name);
      change({ flags: others.length < view.flags.length ? others : [...others, button.name] });
    };
  window.onhashchange = () => (readHash(), change({ page: view.page }));
}

const placeOf = (step) => Math.max(0, steps().findLastIndex((entry) => entry.step <= step));

function readHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  view.run = Math.min(Math.max(Number(given.get("run")) || 0, 0), index.runs.length - 1);
  view.step = placeOf(given.has("step") ? Number(given.get("step")) : Infinity);
  view.every = given.has("every");
  view.flags = (given.get("flags") ?? "").split(",").filter((name) => index.flags.includes(name));
  view.query = given.get("query") ?? "";
  view.page = Math.max(Number(given.get("page")) || 1, 1) - 1;
}

function writeHash() {
  const set = new URLSearchParams({ run: view.run, step: steps()[view.step]?.step ?? 0 });
  if (view.every) set.set("every", 1);
  if (view.flags.length) set.set("flags", view.flags.join(","));
  if (view.query) set.set("query", view.query);
  if (view.page) set.set("page", view.page + 1);
  history.replaceState(null, "", `#${set}`);
}

function drawControls() {
  at("run").value = view.run;
  at("step").value = steps()[view.step]?.step ?? "";
  at("every").checked = view.every;
  at("query").value = view.query;
  at("previous").disabled = view.step <= 0;
  at("next").disabled = view.step >= steps().length - 1;
  const active = view.flags.length + (view.query ? 1 : 0) + (view.every ? 1 : 0);
  at("more").textContent = active ? `filters (${active})` : "filters";
  const scope = view.every ? steps() : steps().slice(view.step, view.step + 1);
  for (const [place, button] of [...at("flags").children].entries()) {
    const count = scope.reduce((sum, entry) => sum + entry.flags.filter((flags) => (flags >> place) & 1).length, 0);
    button.textContent = `${button.name} ${count.toLocaleString("en")}`;
    button.setAttribute("aria-pressed", view.flags.includes(button.name));
  }
}

function drawPagers() {
  const pages = Math.max(1, Math.ceil(matches.length / PROMPTS));
  for (const pager of document.querySelectorAll(".pager")) {
    const go = (by) => () => (change({ page: view.page + by }), scrollTo(0, 0));
    const back = node("button", { type: "button", onclick: go(-1), disabled: view.page <= 0 }, "‹ page");
    const on = node("button", { type: "button", onclick: go(1), disabled: view.page >= pages - 1 }, "page ›");
    pager.replaceChildren(back, node("span", {}, `${view.page + 1} / ${pages.toLocaleString("en")}`), on);
  }
}

const say = (text) => (at("count").textContent = text);

// Prompts

async function show(mine) {
  view.page = Math.min(view.page, Math.max(0, Math.ceil(matches.length / PROMPTS) - 1));
  const page = matches.slice(view.page * PROMPTS, (view.page + 1) * PROMPTS);
  const prompts = await Promise.all(page.map(([step, place]) => prompt(step, place)));
  if (mine !== turn) return;
  say(`${matches.length.toLocaleString("en")} ${matches.length === 1 ? "prompt" : "prompts"}`);
  const cards = prompts.map((one, i) => card(one, steps()[page[i][0]].step));
  const empty = steps().length ? "No prompt here has all of these." : "This run has no samples yet.";
  at("prompts").replaceChildren(...(cards.length ? cards : [node("p", { className: "lost" }, empty)]));
  drawPagers();
  mark();
  document.body.dataset.shown = mine;
}

function card(one, step) {
  const kept = one.drafts.find((draft) => draft.sample === one.kept);
  const head = node("header", {}, node("b", {}, `step ${step} · ${short(one.id)}`), node("span", {}, `right answer: ${short(one.answer || "none")}`));
  if (one.drafts.length) head.append(node("span", {}, `drafts: ${rights(one.drafts)}`));
  const what = !kept ? "completions" : one.verified ? "verifications" : "refinements";
  const against = one.verified ? null : kept; // a verification is no new version of what it was shown
  head.append(node("span", {}, `${what}: ${rights(one.completions)}`));
  const result = node("article", { className: "prompt" }, head, node("pre", { className: "question" }, clipped(one.question)));
  if (one.drafts.length) {
    const others = one.drafts.filter((draft) => draft !== kept).map((draft) => sample(draft, one, { open: !kept }));
    result.append(node("h3", {}, kept ? "Drafts" : "Drafts, none of which was shown to the completions"));
    result.append(...(others.length ? [node("div", { className: "grid" }, ...others)] : []));
    if (kept) result.append(sample(kept, one, { open: true, kept: true }));
  }
  const grid = node("div", { className: "grid" }, ...one.completions.map((done) => sample(done, one, { open: true, draft: against })));
  const heading = node("h3", {}, kept ? `${one.verified ? "Verifications" : "Refinements"} of the kept draft, ${title(kept, one)}` : "Completions");
  result.append(node("div", { className: "refinements" }, heading, grid));
  return result;
}

function rights(samples) {
  const known = samples.filter((one) => one.right !== null);
  return known.length ? `${known.filter((one) => one.right).length} of ${known.length} right` : "not graded";
}

// The words of the console: "draft 2 of 4", "refinement 1 of 4", "verification 1 of 4".
function title(one, group) {
  const isDraft = group.drafts.includes(one);
  const stage = isDraft ? "draft" : group.kept === null ? "completion" : group.verified ? "verification" : "refinement";
  return `${stage} ${one.sample + 1} of ${(isDraft ? group.drafts : group.completions).length}`;
}

function sample(one, group, { open, kept = false, draft = null }) {
  const bar = node("summary", {}, node("b", {}, title(one, group)));
  const chip = (text, kind = "") => bar.append(node("span", { className: `chip ${kind}` }, text));
  if (kept) chip("★ kept", "kept");
  const sign = one.right === null ? "" : one.right ? "✓ " : "✗ ";
  const tone = one.right === null ? "" : one.right ? "good" : "bad";
  bar.append(node("span", { className: `says ${tone}` }, sign + (one.extracted === null ? "no answer found" : `answers ${short(one.extracted)}`)));
  const scores = one.rewards.map(([name, value]) => `${short(name)} ${value === null ? "none" : round(value)}`).join(", ");
  bar.append(node("span", { className: "muted" }, (one.reward === null ? "" : `reward ${round(one.reward)}: `) + scores));
  if (one.advantage !== null) bar.append(node("span", {}, `advantage ${one.advantage > 0 ? "+" : ""}${round(one.advantage)}`));
  bar.append(node("span", { className: "muted" }, `${one.tokens ?? "?"} tokens`));
  if (one.status && one.status !== "ok" && one.status !== "unparseable") chip(`verifier: ${short(one.status)}`, "failed");
  for (const [place, name] of index.flags.entries()) if ((one.flags >> place) & 1) chip(name, name);
  const result = node("details", { className: "sample", open }, bar);
  const fill = () => result.childElementCount < 2 && result.append(text(one.text, draft?.text));
  if (open) fill();
  else result.ontoggle = fill;
  return result;
}

function text(words, draft) {
  const box = node("pre", {});
  const compare = draft !== undefined && at("diff").checked;
  const changes = compare ? differences(draft, words) : null;
  if (changes !== null && kept(changes) >= KEPT) return marked(box, changes);
  const why = changes === null ? "too far from the draft to be aligned" : "less than half is as in the draft, so changes are not shown";
  if (compare) box.append(node("span", { className: "muted" }, `(${why})\n`));
  box.append(clipped(words));
  return box;
}

// The share of the words of the longer text that both have.
function kept(changes) {
  const count = (kinds) => changes.filter(([kind]) => kinds.includes(kind)).flatMap(([, piece]) => split(piece)).filter((word) => word.trim()).length;
  const longer = Math.max(count("=-"), count("=+"));
  return longer ? count("=") / longer : 1;
}

function marked(box, changes) {
  let left = LONGEST;
  for (const [kind, piece] of changes) {
    if (left <= 0) break;
    const shown = piece.length > left ? clipped(piece, left) : visible(piece);
    box.append(kind === "=" ? shown : node(kind === "+" ? "ins" : "del", {}, shown));
    left -= piece.length;
  }
  if (left < 0) box.append(node("span", { className: "muted" }, " … the rest without “show changes”"));
  return box;
}

function clipped(words, most = LONGEST) {
  if (words.length <= most) return visible(words);
  const result = node("span", {}, visible(words.slice(0, most)) + " ");
  const count = (words.length - most).toLocaleString("en");
  const rest = node("button", { type: "button" }, `show ${count} more characters`);
  rest.onclick = () => result.replaceChildren(visible(words));
  result.append(rest);
  return result;
}

// Characters that have no look of their own, or would turn the text around, as their names; tabs and line ends stay.
function visible(words) {
  return words.replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu, (one) => {
    const code = one.codePointAt(0);
    if (one === "\t" || one === "\n" || code === 0x200c || code === 0x200d) return one;
    return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}

const short = (words) => visible(words.slice(0, 200));
const round = (value) => String(Number(value.toFixed(3)));

function node(tag, properties, ...children) {
  const result = Object.assign(document.createElement(tag), properties);
  result.append(...children);
  return result;
}

function mark() {
  if (!globalThis.Highlight) return;
  CSS.highlights.clear();
  const query = view.query.toLowerCase();
  if (!query) return;
  const ranges = [];
  const walker = document.createTreeWalker(at("prompts"), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const words = walker.currentNode.data.toLowerCase();
    for (let from = words.indexOf(query); from >= 0 && ranges.length < MARKED; from = words.indexOf(query, from + query.length)) {
      const range = new Range();
      range.setStart(walker.currentNode, Math.min(from, walker.currentNode.length));
      range.setEnd(walker.currentNode, Math.min(from + query.length, walker.currentNode.length));
      ranges.push(range);
    }
  }
  CSS.highlights.set("found", new Highlight(...ranges));
}

// Differences

const split = (text) => text.match(/\s+|[\p{L}\p{M}\p{N}_]+|[^]/gu) ?? [];

// [["=" | "-" | "+", text], …] that makes `b` of `a`, word by word; null where they are too far apart.
function differences(a, b) {
  const [from, to] = [split(a), split(b)];
  if (Math.max(from.length, to.length) > MOST_WORDS) return null;
  let start = 0;
  while (start < from.length && start < to.length && from[start] === to[start]) start++;
  let end = 0;
  while (end < Math.min(from.length, to.length) - start && from.at(-1 - end) === to.at(-1 - end)) end++;
  const head = from.slice(0, start);
  const tail = end ? from.slice(-end) : [];
  const middle = shortest(from.slice(start, from.length - end), to.slice(start, to.length - end));
  if (middle === null) return null;
  return joined([...head.map((word) => ["=", word]), ...middle, ...tail.map((word) => ["=", word])]);
}

// Myers, "An O(ND) difference algorithm and its variations" (1986): the fewest words out and in.
function shortest(a, b) {
  const ends = [new Int32Array([0])]; // by number of changes: how far into `a` each diagonal k = x - y comes
  for (let d = 0; d <= FARTHEST; d++) {
    const last = ends[d - 1];
    const now = new Int32Array(2 * d + 1);
    for (let k = -d; k <= d; k += 2) {
      const down = k === -d || (k !== d && last[k - 1 + d - 1] < last[k + 1 + d - 1]);
      let x = d === 0 ? 0 : down ? last[k + 1 + d - 1] : last[k - 1 + d - 1] + 1;
      while (x < a.length && x - k < b.length && a[x] === b[x - k]) x++;
      now[k + d] = x;
      if (x >= a.length && x - k >= b.length) return trace([...ends.slice(0, d), now], a, b);
    }
    ends[d] = now;
  }
  return null;
}

function trace(ends, a, b) {
  const changes = [];
  let [x, y] = [a.length, b.length];
  for (let d = ends.length - 1; d > 0; d--) {
    const k = x - y;
    const last = ends[d - 1];
    const down = k === -d || (k !== d && last[k - 1 + d - 1] < last[k + 1 + d - 1]);
    const before = down ? last[k + 1 + d - 1] : last[k - 1 + d - 1];
    const beforeY = before - (down ? k + 1 : k - 1);
    while (x > before && y > beforeY) changes.push(["=", a[--x]]), y--;
    if (down) changes.push(["+", b[--y]]);
    else changes.push(["-", a[--x]]);
  }
  while (x > 0) changes.push(["=", a[--x]]);
  return changes.reverse();
}

// Neighbours of one kind as one; a space between two changes belongs to both, so that phrases stay together.
function joined(changes) {
  const result = [];
  let [out, into] = ["", ""];
  const flush = () => {
    if (out) result.push(["-", out]);
    if (into) result.push(["+", into]);
    [out, into] = ["", ""];
  };
  for (const [i, [kind, word]] of changes.entries()) {
    const between = kind === "=" && /^ +$/.test(word) && (out || into) && i + 1 < changes.length && changes[i + 1][0] !== "=";
    if (kind === "-" || between) out += word;
    if (kind === "+" || between) into += word;
    if (kind !== "=" || between) continue;
    flush();
    if (result.at(-1)?.[0] === "=") result.at(-1)[1] += word;
    else result.push(["=", word]);
  }
  flush();
  return result;
}
