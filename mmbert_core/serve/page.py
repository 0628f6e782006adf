"""The page of `mmbert serve`: a form with the model's columns, the probabilities, the words that spoke for them.

One text with its style and script inside, which a nonce allows and nothing else: no resource is fetched, and what
a model folder or a user wrote is only ever text.
"""

import json
import re
from html import escape
from pathlib import Path

from mmbert_core.config import Config
from mmbert_core.data.features import Features
from mmbert_core.data.labels import Labels
from mmbert_core.inference.attributions import HIGHLIGHT_LEVELS

MAX_VALUES = 1000  # of one category that the page suggests


def content_security_policy(nonce: str) -> str:
    inside = f"'nonce-{nonce}'"
    return f"default-src 'none'; script-src {inside}; style-src {inside}; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def render_page(
    model_path: str,
    config: Config,
    features: Features,
    labels: Labels,
    *,
    threshold: float,
    nonce: str,
    class_words: str | None = None,
) -> str:
    """The HTML. `nonce` must be new for each answer and stand in its `content_security_policy`."""
    about = {
        "labels": labels.names,
        "is_binary": config.is_binary,
        "threshold": threshold,
        "label_name": config.label_name,
        "texts": config.text_name,
        "min_highlight": HIGHLIGHT_LEVELS[0],
    }
    parts = {
        "NONCE": nonce,
        "TITLE": escape(Path(model_path).name or model_path),
        "CLASSWORDS": f'<p class="quiet">{escape(class_words)}</p>' if class_words else "",
        "FIELDS": "\n".join(form_fields(config, features)),
        "ABOUT": json.dumps(about).replace("<", "\\u003c"),  # or a label could end the script element
        "STYLE": STYLE,
        "SCRIPT": SCRIPT,
    }
    return re.sub(
        r"@@([A-Z]+)@@", lambda match: parts[match[1]], PAGE
    )  # in one go: what was put in is not looked at again


def form_fields(config: Config, features: Features) -> list[str]:
    """A label and an input for each column that scoring needs, once each."""
    fields: dict[str, str] = {}
    for name in config.text_name:
        fields[name] = _field(name, len(fields), "text", "textarea", 'rows="5" data-kind="text"></textarea>')
    for name, median in zip(features.number_names, features.medians, strict=True):
        hint = f"number; empty: the training median, {median:g}"
        fields[name] = _field(name, len(fields), hint, "input", 'type="number" step="any" data-kind="number">')
    for name, values in zip(features.category_names, features.categories, strict=True):
        number = len(fields)
        options = "".join(f'<option value="{escape(value)}"></option>' for value in values[:MAX_VALUES])
        more = f'autocomplete="off" data-kind="category" list="values{number}"><datalist id="values{number}">{options}</datalist>'
        fields[name] = _field(name, number, f"one of {len(values)} known values, or another", "input", more)
    if config.id_name is not None and config.id_name not in fields:
        fields[config.id_name] = _field(
            config.id_name, len(fields), "id; comes back as it is", "input", 'autocomplete="off" data-kind="id">'
        )
    return list(fields.values())


def _field(name: str, number: int, hint: str, tag: str, rest: str) -> str:
    start = f'<div class="field"><label for="field{number}">{escape(name)}</label> <small id="hint{number}">{escape(hint)}</small>'
    return f'{start}<{tag} id="field{number}" name="{escape(name)}" aria-describedby="hint{number}" {rest}</div>'


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@@TITLE@@ - mmbert</title>
<style nonce="@@NONCE@@">@@STYLE@@</style>
</head>
<body>
<main>
<h1>@@TITLE@@</h1>
@@CLASSWORDS@@
<form id="form">
@@FIELDS@@
<p class="quiet">Everything may be left empty.</p>
<button>Classify</button>
</form>
<p id="error" role="alert"></p>
<p id="summary" aria-live="polite"></p>
<p id="detail" class="quiet"></p>
<section id="result" aria-label="Result" hidden>
<div id="bars"></div>
<div id="words">
<h2>Words</h2>
<p class="quiet"><span class="for">underlined</span>: spoke for the predicted class; <span class="against">dotted</span>: against it. The number of a word
(point at it) is a share of the strongest. Integrated gradients: a hint at what the model looked at, no proof of a cause.</p>
<p id="text"></p>
</div>
<h2>The same from a program</h2>
<pre id="request" tabindex="0" aria-label="JSON of the request"></pre>
<pre id="curl" tabindex="0" aria-label="curl command"></pre>
</section>
</main>
<script type="application/json" id="about">@@ABOUT@@</script>
<script nonce="@@NONCE@@">@@SCRIPT@@</script>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --back: #fff; --front: #1a1c20; --quiet: #5a6069; --line: #8b919b; --soft: #eef0f3; --for: 21 101 192; --against: 175 75 0; }
@media (prefers-color-scheme: dark) {
  :root { --back: #15171a; --front: #e8eaed; --quiet: #a5abb5; --line: #6d737d; --soft: #24272c; --for: 90 160 255; --against: 255 150 60; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--front); font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 46rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin-bottom: .2rem; }
.field { margin-bottom: .8rem; }
label { font-weight: 600; overflow-wrap: anywhere; }
small, .quiet { color: var(--quiet); font-size: .85rem; }
input, textarea { display: block; width: 100%; padding: .4rem; font: inherit; color: inherit; background: var(--back); border: 1px solid var(--line); border-radius: 4px; }
button { padding: .5rem 1.4rem; font: inherit; font-weight: 600; color: var(--back); background: var(--front); border: 0; border-radius: 4px; cursor: pointer; }
form[aria-busy=true] button { opacity: .5; }
:focus-visible { outline: 3px solid rgb(var(--for)); outline-offset: 2px; }
#error { color: rgb(var(--against)); overflow-wrap: anywhere; }
#error::before { content: "Error: "; font-weight: 600; }
#error:empty { display: none; }
#summary { font-size: 1.2rem; font-weight: 600; overflow-wrap: anywhere; }
.class { display: grid; grid-template-columns: minmax(5rem, 30%) 1fr 4.5rem; gap: .6rem; align-items: center; margin: .2rem 0; }
.class > :first-child { overflow-wrap: anywhere; }
.class > :last-child { text-align: right; font-variant-numeric: tabular-nums; }
.track { height: 1rem; background: var(--soft); border-radius: 4px; overflow: hidden; }
.track > div { height: 100%; background: rgb(var(--for)); }
#detail { margin-top: -.8rem; overflow-wrap: anywhere; }
#detail:empty { display: none; }
#text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; }
.for, .against { text-decoration: underline 2px rgb(var(--for)); text-underline-offset: .25em; border-radius: 3px; }
.against { text-decoration: underline dotted 2px rgb(var(--against)); }
.cut { color: var(--quiet); }
pre { margin: .4rem 0; padding: .6rem; background: var(--soft); border-radius: 4px; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
[hidden] { display: none; }
"""

SCRIPT = r"""
"use strict";
const at = id => document.getElementById(id);
const about = JSON.parse(at("about").textContent);

function element(tag, text, className) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function row() {  // column -> cell, as a program would send it
  const cells = Object.create(null);
  for (const field of at("form").querySelectorAll("[data-kind]")) {
    cells[field.name] = field.dataset.kind !== "number" ? field.value : field.value === "" ? null : Number(field.value);
  }
  return cells;
}

function probabilities(prediction) {
  if (about.is_binary) return [1 - prediction.prob, prediction.prob];
  return about.labels.map(label => prediction["prob_" + label]);
}

function percent(share) { return (100 * share).toFixed(1) + " %"; }

function showClasses(prediction) {
  const shares = probabilities(prediction);
  at("summary").textContent = `${about.label_name}: ${prediction.pred} (${percent(shares[about.labels.indexOf(prediction.pred)])})`;
  const above = about.threshold < 0 ? `every row is ${about.labels[1]}; ` : `${about.labels[1]} is what lies above ${percent(about.threshold)}; `;
  const cut = about.is_binary ? above : "";
  at("detail").textContent = `${cut}calibrated probability of ${about.is_binary ? about.labels[1] : prediction.pred}: ${percent(prediction.prob_calibrated)}`;
  at("bars").replaceChildren(...about.labels.map((label, index) => {
    const line = element("div", "", "class"), track = element("div", "", "track"), bar = element("div", "");
    track.setAttribute("aria-hidden", "true");
    bar.style.width = percent(shares[index]).replace(" ", "");
    track.append(bar);
    line.append(element("span", label), track, element("span", percent(shares[index])));
    return line;
  }));
}

function showWords(tokens, cells) {
  at("words").hidden = tokens.length === 0;
  at("text").replaceChildren(...tokens.map(([piece, weight]) => {
    if (Math.abs(weight) < about.min_highlight) return document.createTextNode(piece);
    const word = element("span", piece, weight > 0 ? "for" : "against");
    word.style.backgroundColor = `rgb(var(--${word.className}) / ${(0.1 + 0.35 * Math.abs(weight)).toFixed(3)})`;
    word.title = (weight > 0 ? "+" : "\u2212") + Math.abs(weight).toFixed(2);
    return word;
  }));
  const whole = about.texts.map(name => cells[name]).filter(Boolean).join(" ");
  const read = tokens.map(([piece]) => piece).join("");
  if (whole.startsWith(read) && whole.length > read.length) {
    at("text").append(element("span", whole.slice(read.length), "cut"), element("small", " (the grey end was too long and not read)"));
  }
}

function showRequest(cells) {
  const json = JSON.stringify(cells);
  at("request").textContent = JSON.stringify(cells, null, 2);
  at("curl").textContent = `curl -H 'Content-Type: application/json' -d '${json.replaceAll("'", "'\\''")}' ${location.origin}/predict`;
}

async function classify() {
  const cells = row();
  let answer, made;
  try {
    answer = await fetch("explain", {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(cells)});
    made = await answer.json();
  } catch {
    throw new Error("the server does not answer");
  }
  if (!answer.ok) throw new Error(made.error);
  showClasses(made.prediction);
  showWords(made.tokens, cells);
  showRequest(cells);
  at("result").hidden = false;
}

at("form").addEventListener("submit", async event => {
  event.preventDefault();
  if (at("form").ariaBusy === "true") return;
  at("form").ariaBusy = "true";
  at("error").textContent = "";
  try {
    await classify();
  } catch (error) {
    at("summary").textContent = at("detail").textContent = "";
    at("result").hidden = true;
    at("error").textContent = error.message;
  } finally {
    at("form").ariaBusy = "false";
  }
});
"""
