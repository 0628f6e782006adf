"use strict";
const byId = id => document.getElementById(id);
const model = JSON.parse(byId("model").textContent);

function element(tag, text, className) {
  const created = document.createElement(tag);
  created.textContent = text;
  if (className) created.className = className;
  return created;
}

// column -> cell, as a program would send it: null for a number that is left empty
function readRow() {
  const cells = Object.create(null);
  for (const field of byId("form").querySelectorAll("[data-kind]")) {
    if (field.dataset.kind !== "number") cells[field.name] = field.value;
    else cells[field.name] = field.value === "" ? null : Number(field.value);
  }
  return cells;
}

function probabilities(prediction) {
  if (model.is_binary) return [1 - prediction.prob, prediction.prob];
  return model.labels.map(label => prediction["prob_" + label]);
}

function percent(share) {
  return (100 * share).toFixed(1) + " %";
}

function thresholdText() {
  if (!model.is_binary) return "";
  const label = model.labels[1];
  if (model.threshold < 0) return `every row is ${label}; `;
  return `${label} is what lies above ${percent(model.threshold)}; `;
}

function classBar(label, share) {
  const line = element("div", "", "class"), track = element("div", "", "track"), bar = element("div", "");
  track.setAttribute("aria-hidden", "true");
  bar.style.width = percent(share).replace(" ", "");
  track.append(bar);
  line.append(element("span", label), track, element("span", percent(share)));
  return line;
}

function showClasses(prediction) {
  const shares = probabilities(prediction);
  const share = shares[model.labels.indexOf(prediction.pred)];
  byId("summary").textContent = `${model.label_name}: ${prediction.pred} (${percent(share)})`;
  const calibratedClass = model.is_binary ? model.labels[1] : prediction.pred;
  byId("detail").textContent = thresholdText() +
    `calibrated probability of ${calibratedClass}: ${percent(prediction.prob_calibrated)}`;
  byId("bars").replaceChildren(...model.labels.map((label, index) => classBar(label, shares[index])));
}

// attribution: -1 to 1, a share of the strongest of the text
function highlighted(span, attribution) {
  const strength = Math.abs(attribution);
  if (strength < model.min_highlight) return document.createTextNode(span);
  const word = element("span", span, attribution > 0 ? "for" : "against");
  word.style.backgroundColor = `rgb(var(--${word.className}) / ${(0.1 + 0.35 * strength).toFixed(3)})`;
  word.title = (attribution > 0 ? "+" : "\u2212") + strength.toFixed(2);
  return word;
}

function showWords(tokens, cells) {
  byId("words").hidden = tokens.length === 0;
  byId("text").replaceChildren(...tokens.map(([span, attribution]) => highlighted(span, attribution)));
  const text = model.texts.map(name => cells[name]).filter(Boolean).join(" ");
  const read = tokens.map(([span]) => span).join("");
  if (text.startsWith(read) && text.length > read.length) {
    byId("text").append(
      element("span", text.slice(read.length), "unread"),
      element("small", " (the grey end was too long and not read)"),
    );
  }
}

function showRequest(cells) {
  const quoted = JSON.stringify(cells).replaceAll("'", "'\\''");
  byId("request").textContent = JSON.stringify(cells, null, 2);
  byId("curl").textContent =
    `curl -H 'Content-Type: application/json' -d '${quoted}' ${location.origin}/predict`;
}

async function classify() {
  const cells = readRow();
  let answer, explanation;
  try {
    const headers = {"Content-Type": "application/json"};
    answer = await fetch("explain", {method: "POST", headers, body: JSON.stringify(cells)});
    explanation = await answer.json();
  } catch {
    throw new Error("the server does not answer");
  }
  if (!answer.ok) throw new Error(explanation.error);
  showClasses(explanation.prediction);
  showWords(explanation.tokens, cells);
  showRequest(cells);
  byId("result").hidden = false;
}

byId("form").addEventListener("submit", async event => {
  event.preventDefault();
  if (byId("form").ariaBusy === "true") return;
  byId("form").ariaBusy = "true";
  byId("error").textContent = "";
  try {
    await classify();
  } catch (error) {
    byId("summary").textContent = byId("detail").textContent = "";
    byId("result").hidden = true;
    byId("error").textContent = error.message;
  } finally {
    byId("form").ariaBusy = "false";
  }
});
