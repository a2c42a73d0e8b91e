"use strict";
// Unpack the conversation, write its tokens once, and redraw the panel whenever something is chosen.
// Words are only ever set as text. A step p reads token p and expects token p + 1.

const $ = (id) => document.getElementById(id);
const VIEWS = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array };
const chosen = { token: 0, layer: 0, head: -1, side: "wrote", shade: "surprise", channel: "" };
const LABELS = new Set(["system", "developer", "user", "tool", "analysis", "commentary", "final"]); // with colours
let D; // the conversation: the header's fields, and its arrays by name

function h(tag, more = {}, ...inside) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(more)) {
    if (name.startsWith("--")) node.style.setProperty(name, value);
    else if (value !== null) node.setAttribute(name, value);
  }
  node.append(...inside);
  return node;
}

async function unpack() {
  const packed = atob($("data").textContent);
  const bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const whole = await new Response(inflated).arrayBuffer();
  const start = 4 + new DataView(whole).getUint32(0, true);
  const data = JSON.parse(new TextDecoder().decode(new Uint8Array(whole, 4, start - 4)));
  for (const [name, [kind, offset, size]] of Object.entries(data.arrays)) {
    data[name] = new VIEWS[kind](whole, start + offset, size);
  }
  data.first = new Uint32Array(data.sources.length + 1); // where each head's sources begin
  data.sources.forEach((count, i) => { data.first[i + 1] = data.first[i] + count; });
  data.label = [];
  for (const [label, from, , to] of data.spans) data.label.fill(label, data.label.length = from, data.label.length = to);
  return data;
}

// --- what is said of numbers and words

const percent = (p) => (p >= 0.9995 ? "100 %" : p >= 0.1 ? `${(100 * p).toFixed(1)} %` : p >= 0.0001 ? `${(100 * p).toFixed(2)} %` : "< 0.01 %");
const part = (p) => (p < 0.002 ? "< 0.4 %" : `${(100 * p).toFixed(1)} %`); // of what is kept in a byte
const chance = (millinats) => Math.exp(-millinats / 1000);
const bits = (millinats) => millinats / 1000 / Math.LN2;
const surprise = (token) => (token ? D.expected_came[token - 1] : 0);

function plain(word) { // for labels and sentences
  const [kind, text] = D.words[word];
  if (kind === "bytes") return `bytes ${text}`;
  return kind === "special" ? text : `“${text.replaceAll("\n", "↵").replaceAll("\t", "⇥")}”`;
}
const named = (word) => h("span", { class: D.words[word][0] === "text" ? "word" : "word odd" }, plain(word));
const bar = (part, more = "") => h("span", { class: `bar ${more}`, "--part": part, "aria-hidden": "true" });
const cell = (...inside) => h("td", {}, ...inside);
const number = (text) => h("td", { class: "number" }, text);

function table(caption, heads, rows) {
  const top = h("tr", {}, ...heads.map((head) => h("th", { scope: "col" }, head)));
  return h("table", {}, h("caption", {}, caption), h("thead", {}, top), h("tbody", {}, ...rows));
}
function choice(what, value, text, label) {
  const on = chosen[what] === value;
  return h("th", { scope: "row" }, h("button", { type: "button", "data-set": what, "data-value": value, "aria-pressed": on, "aria-label": label }, text));
}

// --- the conversation

function writeTokens() {
  for (const [label, from, body, to] of D.spans) {
    const options = [];
    for (let i = from; i < to; i++) {
      const [kind, text] = D.words[D.tokens[i]];
      const said = i ? `, surprise ${bits(surprise(i)).toFixed(1)} bits` : "";
      options.push(h("span", {
        class: `token ${kind} ${i < body ? "header" : ""}`, role: "option", id: `t${i}`, "data-token": i,
        "aria-selected": "false", "aria-label": `${plain(D.tokens[i])}, token ${i}, ${label}${said}`,
      }, kind === "text" ? text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t") : text));
    }
    const who = h("span", { class: "who", "aria-hidden": "true" }, label);
    const message = h("div", { class: "message", role: "group", "aria-label": label }, who, ...options);
    message.style.setProperty("--channel", `var(--${LABELS.has(label) ? label : "text"})`);
    $("tokens").append(message);
  }
}

function writeTable() {
  const rows = [...D.tokens].map((word, i) => h("tr", {}, number(i), cell(named(word)), cell(D.label[i]),
    number(i ? percent(chance(surprise(i))) : ""), number(i ? bits(surprise(i)).toFixed(2) : ""), number(i ? D.expected_rank[i - 1] : "")));
  $("all").lastElementChild.replaceChildren(
    table("How likely each token was, and its rank among all of the vocabulary", ["Place", "Token", "Channel", "Probability", "Surprise (bits)", "Rank"], rows));
}

function fluency() { // of what the model may have written itself
  const own = D.spans.filter(([label]) => ["assistant", "analysis", "commentary", "final"].includes(label));
  const said = own.flatMap(([, , body, to]) => [...Array(to - body).keys()].map((i) => bits(surprise(body + i))));
  const mean = said.reduce((sum, x) => sum + x, 0) / said.length;
  return said.length ? `The assistant's ${said.length} tokens had ${mean.toFixed(2)} bits of surprise each.` : "";
}

const step = () => (chosen.side === "wrote" ? chosen.token - 1 : chosen.token);

function sourcesOf(p, layer, head) {
  const at = (p * D.layers + layer) * D.heads + head;
  const found = [];
  for (let j = D.first[at]; j < D.first[at + 1]; j++) found.push([D.where[j], D.weight[j] / 255]);
  return { sink: D.sink[at] / 255, found };
}

function shade() {
  const p = step(), window = D.windows[chosen.layer], looked = new Float32Array(D.tokens.length);
  const attention = chosen.shade === "attention" && p >= 0;
  if (attention) {
    const heads = chosen.head < 0 ? [...Array(D.heads).keys()] : [chosen.head];
    for (const head of heads) for (const [i, share] of sourcesOf(p, chosen.layer, head).found) looked[i] += share / heads.length;
  }
  const strongest = Math.max(0.02, ...looked), edge = attention && window ? p - window + 1 : 0;
  document.querySelectorAll(".token").forEach((node, i) => {
    const heat = attention ? Math.sqrt(looked[i] / strongest) : chosen.shade === "surprise" ? Math.min(1, bits(surprise(i)) / 8) : 0;
    node.style.setProperty("--heat", heat.toFixed(3));
    node.style.setProperty("--shade", attention ? "var(--cool)" : "var(--hot)");
    node.classList.toggle("beyond", attention && (i < edge || i > p));
    node.classList.toggle("edge", edge > 0 && i === edge);
    node.classList.toggle("reading", attention && i === p && i !== chosen.token);
    node.setAttribute("aria-selected", i === chosen.token);
  });
  $("tokens").setAttribute("aria-activedescendant", `t${chosen.token}`);
}

// --- the panel

function drawStep() {
  const i = chosen.token, p = step(), word = D.tokens[i];
  $("step-name").replaceChildren(`Token ${i}: `, named(word));
  const how = i ? `It had probability ${percent(chance(surprise(i)))} (${bits(surprise(i)).toFixed(2)} bits of surprise), rank ${D.expected_rank[i - 1]}.` : "It is the first; nothing was before it.";
  $("said").textContent = `Id ${D.ids[word]}, ${D.label[i]}. ${how}`;
  $("which").textContent = p < 0 ? "No step wrote the first token; it was given."
    : `Step ${p} reads ${plain(D.tokens[p])} and expects what comes behind it.`;
  $("layers").hidden = p < 0;
  for (const [id, draw] of [["alternatives", alternatives], ["lens", lens], ["attention", attention], ["experts", experts]]) {
    $(id).replaceChildren(...(p < 0 ? [] : [draw(p)]));
  }
  $("layer").value = chosen.layer;
  const window = D.windows[chosen.layer];
  $("layer-said").textContent = `${chosen.layer} of 0 to ${D.layers - 1}, ${window ? `slides over ${window} tokens` : "sees everything"}`;
  const edge = window ? Math.max(0, p - window + 1) : 0;
  $("reach").textContent = p < 0 ? "" : edge ? `This layer sees tokens ${edge} ${plain(D.tokens[edge])} to ${p}; the window's edge leaves ${edge} before it out of reach.`
    : `This layer sees all ${p + 1} tokens so far${window ? `; its window holds ${window}` : ""}.`;
}

function alternatives(p) {
  const came = p + 1 < D.tokens.length ? D.tokens[p + 1] : -1, rows = [];
  for (let j = p * D.alternatives; j < (p + 1) * D.alternatives; j++) {
    const word = D.expected_token[j], share = chance(D.expected_logprob[j]);
    rows.push(alternative(word, share, word === came ? "it came" : ""));
  }
  if (came >= 0 && !rows.some((row) => row.className)) rows.push(alternative(came, chance(D.expected_came[p]), `it came, rank ${D.expected_rank[p]}`));
  return table("The likeliest, and which of them came", ["Token", "Probability", "Came"], rows);
}

function alternative(word, share, said) {
  return h("tr", { class: said ? "came" : null }, cell(named(word)), cell(bar(share), ` ${percent(share)}`), cell(said));
}

function lens(p) {
  const rows = [], last = p + 1 >= D.tokens.length;
  for (let layer = 0; layer < D.layers; layer++) {
    const at = p * D.layers + layer, on = layer === chosen.layer, words = [];
    for (let j = at * D.lens; j < at * D.lens + (on ? D.lens : 1); j++) {
      words.push(h("div", {}, named(D.lens_token[j]), ` ${percent(chance(D.lens_logprob[j]))}`));
    }
    rows.push(h("tr", { "aria-current": on ? "true" : null }, choice("layer", layer, layer, `Layer ${layer}`), cell(...words),
      number(last ? "" : percent(chance(D.lens_came[at]))), number(last ? "" : D.lens_rank[at])));
  }
  return table("What each layer's residual would say, were it the last", ["Layer", "Expects", "What came", "Rank"], rows);
}

function attention(p) {
  const rows = [];
  let sinks = 0;
  for (let head = 0; head < D.heads; head++) {
    const { sink, found } = sourcesOf(p, chosen.layer, head);
    sinks += sink / D.heads;
    const rest = Math.max(0, 1 - sink - found.reduce((sum, [, share]) => sum + share, 0));
    const words = found.map(([i, share]) => h("div", {}, named(D.tokens[i]), ` at ${i}: ${part(share)}`));
    rows.push(h("tr", { "aria-current": head === chosen.head ? "true" : null }, choice("head", head, head, `Head ${head}`),
      cell(bar(sink, "sink"), ` ${part(sink)}`), cell(...words), number(part(rest))));
  }
  const all = h("tr", { "aria-current": chosen.head < 0 ? "true" : null }, choice("head", -1, "all", "All heads"), cell(bar(sinks, "sink"), ` ${part(sinks)}`), cell("the mean"), number(""));
  return table("Each head's share for the sink, its strongest sources, and what is not among them", ["Head", "Sink", "Sources", "Rest"], [all, ...rows]);
}

function experts(p) {
  const heads = ["Layer", ...[...Array(D.visits).keys()].map((j) => (j ? `${j + 1}.` : "Best"))];
  const rows = [];
  for (let layer = 0; layer < D.layers; layer++) {
    const cells = [];
    for (let j = 0; j < D.visits; j++) {
      const at = (p * D.layers + layer) * D.visits + j;
      cells.push(cell(h("strong", {}, `#${D.chosen[at]}`), ` ${part(D.share[at] / 255)}`));
    }
    rows.push(h("tr", { "aria-current": layer === chosen.layer ? "true" : null }, h("th", { scope: "row" }, layer), ...cells));
  }
  return table("The experts that this token visits in each layer, and their shares", heads, rows);
}

// --- routing over the whole conversation

function drawMap() {
  const sums = new Float64Array(D.layers * D.experts), size = D.layers * D.visits;
  let count = 0;
  for (let p = 0; p < D.tokens.length; p++) {
    if (chosen.channel && D.label[p] !== chosen.channel) continue;
    count++;
    for (let j = 0; j < size; j++) sums[Math.floor(j / D.visits) * D.experts + D.chosen[p * size + j]] += D.share[p * size + j] / 255;
  }
  const greatest = Math.max(...sums) || 1, rows = [];
  for (let layer = 0; layer < D.layers; layer++) {
    const cells = [];
    for (let e = 0; e < D.experts; e++) {
      const sum = sums[layer * D.experts + e], said = `${((100 * sum) / count).toFixed(1)} %`;
      cells.push(h("td", { "--heat": (sum / greatest).toFixed(3), title: `layer ${layer}, expert ${e}: ${said}` }, h("span", { class: "unseen" }, said)));
    }
    rows.push(h("tr", {}, h("th", { scope: "row" }, layer), ...cells));
  }
  $("map").replaceChildren(table(`Share of each expert (across) in each layer (down), over ${count} tokens`, ["", ...[...Array(D.experts).keys()]], rows));
  const at = sums.indexOf(Math.max(...sums));
  $("busiest").textContent = `Busiest: expert ${at % D.experts} of layer ${Math.floor(at / D.experts)}, with ${percent(sums[at] / count)} of what its layer adds.`;
}

// --- choosing

function choose(change) {
  Object.assign(chosen, change);
  chosen.token = Math.max(0, Math.min(D.tokens.length - 1, chosen.token));
  const held = document.activeElement?.dataset; // a button that is drawn anew keeps the focus
  $("shade").value = chosen.shade;
  shade();
  drawStep();
  if ("token" in change && D.ready) $(`t${chosen.token}`).scrollIntoView({ block: "nearest" });
  if (held?.set) document.querySelector(`[data-set="${held.set}"][data-value="${held.value}"]`)?.focus();
}

function neighbour(down) { // the nearest token of the next line
  const here = $(`t${chosen.token}`).getClientRects()[0], sign = down ? 1 : -1;
  let line = null, best = chosen.token, least = Infinity;
  for (let i = chosen.token + sign; i >= 0 && i < D.tokens.length; i += sign) {
    const there = $(`t${i}`).getClientRects()[0];
    if (!there || (there.top - here.top) * sign < 4) continue;
    line ??= there.top;
    if (Math.abs(there.top - line) > 4) break;
    const apart = Math.abs(there.left - here.left);
    if (apart < least) [least, best] = [apart, i];
  }
  return best;
}

function onKey(event) {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const i = chosen.token, messages = D.spans.map(([, start]) => start);
  const to = {
    ArrowLeft: () => i - 1, ArrowRight: () => i + 1, Home: () => 0, End: () => D.tokens.length - 1,
    ArrowUp: () => neighbour(false), ArrowDown: () => neighbour(true),
    PageUp: () => messages.findLast((at) => at < i) ?? 0, PageDown: () => messages.find((at) => at > i) ?? D.tokens.length - 1,
  }[event.key];
  if (!to) return;
  event.preventDefault();
  choose({ token: to() });
}

async function open() {
  D = await unpack();
  writeTokens();
  const last = D.tokens.length - 1;
  $("about").textContent = `${D.layers} layers of ${D.heads} heads, ${D.experts} experts of which a token visits ${D.visits}. ${fluency()}`;
  $("layer").max = D.layers - 1;
  for (const name of ["", ...new Set(D.label)]) $("channel").append(h("option", { value: name }, name || "all channels"));
  $("tokens").addEventListener("click", (event) => {
    const token = event.target.closest("[data-token]");
    if (token) choose({ token: Number(token.dataset.token) });
  });
  $("tokens").addEventListener("keydown", onKey);
  $("step").addEventListener("click", (event) => {
    const button = event.target.closest("[data-set]");
    if (!button) return;
    const shade = button.dataset.set === "head" ? { shade: "attention" } : {};
    choose({ [button.dataset.set]: Number(button.dataset.value), ...shade });
  });
  $("layer").addEventListener("input", (event) => choose({ layer: Number(event.target.value) }));
  $("shade").addEventListener("change", (event) => choose({ shade: event.target.value }));
  $("channel").addEventListener("change", (event) => { chosen.channel = event.target.value; drawMap(); });
  for (const radio of document.getElementsByName("side")) radio.addEventListener("change", () => choose({ side: radio.value }));
  $("all").addEventListener("toggle", writeTable, { once: true });
  drawMap();
  const answer = D.spans.findLast(([label]) => label === "final") ?? D.spans.at(-1);
  choose({ token: Math.min(answer[2], last), layer: D.layers - 1 });
  D.ready = true; // from now on, what is chosen comes into view
  document.querySelector("main").setAttribute("aria-busy", "false");
  performance.mark("ready");
}

open();
