"use strict";
const byId = id => document.getElementById(id);
const model = JSON.parse(byId("model").textContent);

function element(tag, text, className) {
  const created = document.createElement(tag);
  created.textContent = text;
  if (className) created.className = className;
  return created;
}

// column -> cell, as a program would send it: an empty number is null
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
  return `${label} is predicted above ${percent(model.threshold)}; `;
}

function classBar(label, probability) {
  const line = element("div", "", "class"), track = element("div", "", "track"), bar = element("div", "");
  track.setAttribute("aria-hidden", "true");
  bar.style.width = percent(probability).replace(" ", "");
  track.append(bar);
  line.append(element("span", label), track, element("span", percent(probability)));
  return line;
}

function showClasses(prediction) {
  const byClass = probabilities(prediction);
  const predicted = byClass[model.labels.indexOf(prediction.pred)];
  byId("summary").textContent = `${model.label_name}: ${prediction.pred} (${percent(predicted)})`;
  const calibratedClass = model.is_binary ? model.labels[1] : prediction.pred;
  byId("detail").textContent = thresholdText() +
    `calibrated probability of ${calibratedClass}: ${percent(prediction.prob_calibrated)}`;
  byId("bars").replaceChildren(...model.labels.map((label, index) => classBar(label, byClass[index])));
}

// attribution: -1 to 1, relative to the strongest of the text
function highlighted(piece, attribution) {
  const strength = Math.abs(attribution);
  if (strength < model.min_highlight) return document.createTextNode(piece);
  const word = element("span", piece, attribution > 0 ? "for" : "against");
  word.style.backgroundColor = `rgb(var(--${word.className}) / ${(0.1 + 0.35 * strength).toFixed(3)})`;
  word.title = (attribution > 0 ? "+" : "\u2212") + strength.toFixed(2);
  return word;
}

function showWords(tokens, cells) {
  byId("words").hidden = tokens.length === 0;
  byId("text").replaceChildren(...tokens.map(([piece, attribution]) => highlighted(piece, attribution)));
  const text = model.texts.map(name => cells[name]).filter(Boolean).join(" ");
  const textRead = tokens.map(([piece]) => piece).join("");
  if (text.startsWith(textRead) && text.length > textRead.length) {
    byId("text").append(
      element("span", text.slice(textRead.length), "unread"),
      element("small", " (the text is too long; the model did not read the grey end)"),
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
