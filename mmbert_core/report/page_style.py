"""The page's colours and style sheet, light and dark."""

from __future__ import annotations

LIGHT = {
    "page": "#f5f6f9",
    "surface": "#ffffff",
    "sunken": "#f0f2f7",
    "line": "#dfe3eb",
    "strong-line": "#7d8798",
    "text": "#1a2230",
    "muted": "#566074",
    "accent": "#2350b8",
    "accent-soft": "#e8eefb",
    "good": "#156a3c",
    "bad": "#ab2a1c",
    "warn-soft": "#fdf3dc",
    "s0": "#2457c5",
    "s1": "#b4530a",
    "s2": "#0f766e",
    "s3": "#a21caf",
    "s4": "#4d7c0f",
    "s5": "#be123c",
    "s6": "#475569",
    "s7": "#0369a1",
    "s8": "#854d0e",
    "s9": "#6d28d9",
    "h0": "#f0f2f7",
    "h1": "#dbe7fb",
    "h2": "#b5cef6",
    "h3": "#86aef0",
    "h4": "#2f60c6",
    "h5": "#173f91",
    "t0": "#566074",
    "t1": "#1a2230",
    "t2": "#1a2230",
    "t3": "#101827",
    "t4": "#ffffff",
    "t5": "#ffffff",
    "p1": "#e4edfd",
    "p2": "#c3d8fb",
    "p3": "#9bbef8",
    "n1": "#fdeede",
    "n2": "#fbd8b4",
    "n3": "#f6bb80",
}
DARK = {
    "page": "#10141b",
    "surface": "#181e28",
    "sunken": "#202836",
    "line": "#2e3848",
    "strong-line": "#7f8ca0",
    "text": "#e7ebf2",
    "muted": "#a5b0c2",
    "accent": "#93b8fa",
    "accent-soft": "#1f2c47",
    "good": "#6fd39b",
    "bad": "#ff9d8f",
    "warn-soft": "#352b14",
    "s0": "#8ab4f8",
    "s1": "#f2a65a",
    "s2": "#5fd0c2",
    "s3": "#e29af0",
    "s4": "#b5d36b",
    "s5": "#ff8fa3",
    "s6": "#b6c2d4",
    "s7": "#6fc3f0",
    "s8": "#e0c068",
    "s9": "#b8a1ff",
    "h0": "#202836",
    "h1": "#22375c",
    "h2": "#2a4a80",
    "h3": "#345da0",
    "h4": "#94bafb",
    "h5": "#cfe0ff",
    "t0": "#a5b0c2",
    "t1": "#e7ebf2",
    "t2": "#ffffff",
    "t3": "#ffffff",
    "t4": "#101827",
    "t5": "#101827",
    "p1": "#1d2f50",
    "p2": "#25437a",
    "p3": "#2f58a3",
    "n1": "#3a2a17",
    "n2": "#5a3c17",
    "n3": "#7d5116",
}
# Text on the colour behind it, at least 4.5 to 1; a test computes it.
TEXT_ON = [(text, ground) for text in ("text", "muted", "accent") for ground in ("page", "surface", "sunken")]
TEXT_ON += [
    ("good", "surface"),
    ("bad", "surface"),
    ("text", "warn-soft"),
    ("accent", "accent-soft"),
    ("text", "accent-soft"),
]
TEXT_ON += [(f"t{index}", f"h{index}") for index in range(6)] + [
    ("text", f"{sign}{index}") for sign in "pn" for index in (1, 2, 3)
]
# Lines, bars and marks on the colour behind them, at least 3 to 1.
MARK_ON = [(f"s{index}", "surface") for index in range(10)] + [
    ("strong-line", "surface"),
    ("accent", "surface"),
    ("accent", "page"),
]
DASHES = (
    "none",
    "7 3",
    "2 3",
    "9 3 2 3",
    "12 4",
)  # of the line styles in turn, so that colour is not needed to tell ten apart

_RULES = """
*, *::before, *::after { box-sizing: border-box }
html { scroll-padding-top: 1rem; -webkit-text-size-adjust: 100% }
body { margin: 0; background: var(--page); color: var(--text); overflow-wrap: anywhere;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif }
a { color: var(--accent) }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; border-radius: 6px }
.skip { position: absolute; left: -999rem; top: 0; z-index: 9; padding: .6rem 1rem; background: var(--surface) }
.skip:focus { left: 1rem; top: 1rem }
.muted, .note, .line, .label { color: var(--muted) }

header { padding: 2.2rem 1.25rem 1.2rem; max-width: 84rem; margin: 0 auto }
h1 { margin: 0 0 .8rem; font-size: clamp(1.5rem, 1.1rem + 1.8vw, 2.3rem); line-height: 1.2; letter-spacing: -.015em }
.facts { display: flex; flex-wrap: wrap; gap: .35rem 1.6rem; margin: 0; font-size: .92rem }
.facts div { display: flex; gap: .5rem; min-width: 0 } .facts dt { color: var(--muted); flex: none } .facts dd { margin: 0; min-width: 0 }
.frame { max-width: 84rem; margin: 0 auto; padding: 0 1.25rem 3rem; display: grid; grid-template-columns: minmax(0, 1fr); gap: 1.25rem }
nav ul { list-style: none; margin: 0; padding: 0; display: flex; gap: .3rem; overflow-x: auto; scrollbar-width: thin }
nav a { display: block; padding: .35rem .75rem; border-radius: 8px; text-decoration: none; white-space: nowrap; font-size: .92rem; color: var(--muted) }
nav a:hover { background: var(--accent-soft); color: var(--accent) }
nav { position: sticky; top: 0; z-index: 5; background: var(--page); padding: .4rem 0; min-width: 0; border-bottom: 1px solid var(--line) }
nav .empty::after { content: " \\2013" }
@media (max-width: 61.99rem) { html { scroll-padding-top: 4rem } }
@media (min-width: 62rem) {
  .frame { grid-template-columns: 11.5rem minmax(0, 1fr); gap: 2rem }
  nav { top: 0; align-self: start; border: 0; padding: .3rem 0 1rem; max-height: 100vh; overflow-y: auto }
  nav ul { display: block }
}

main { display: grid; gap: 1.25rem; min-width: 0; grid-template-columns: minmax(0, 1fr) }
section { background: var(--surface); border: 1px solid var(--line); border-radius: 14px; padding: 1.3rem 1.4rem 1.4rem; min-width: 0 }
h2 { margin: 0 0 .8rem; font-size: 1.22rem; letter-spacing: -.01em }
h3 { margin: 1.4rem 0 .6rem; font-size: 1rem }
p { margin: .6rem 0; max-width: 72ch }
.note { font-size: .92rem }
.reason { margin: .3rem 0; color: var(--muted) }
.tag { display: inline-block; padding: .05rem .55rem; margin-right: .35rem; border: 1px solid var(--strong-line); border-radius: 99px; font-size: .8rem }
.verdict { font-size: 1.05rem; border-left: 4px solid var(--accent); padding-left: .9rem }
.warnings { margin: 0; padding: .8rem 1rem .8rem 2.1rem; background: var(--warn-soft); border-radius: 10px } .warnings li + li { margin-top: .35rem }
.good { color: var(--good); font-weight: 600 } .bad { color: var(--bad); font-weight: 600 }

.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(13.5rem, 100%), 1fr)); gap: .8rem; margin: .4rem 0 1.1rem }
.cards.small { grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)) } .cards.small .big { font-size: 1.4rem }
.card { display: flex; flex-direction: column; padding: .85rem 1rem; background: var(--sunken); border-radius: 11px; min-width: 0 }
.card:first-child { box-shadow: inset 0 0 0 2px var(--accent) }
.label { font-size: .88rem } .line { font-size: .86rem; line-height: 1.45 }
.big { font-size: 2rem; line-height: 1.25; font-weight: 650; letter-spacing: -.02em; font-variant-numeric: tabular-nums }

.scroll { overflow-x: auto; margin: .8rem 0 0; border: 1px solid var(--line); border-radius: 10px; max-width: 100%; width: fit-content }
.scroll.tall { max-height: 32rem; overflow-y: auto }
.scroll.plain { border: 0 }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem; font-variant-numeric: tabular-nums }
caption { text-align: left; padding: .6rem .8rem .5rem; color: var(--muted); font-size: .86rem }
th, td { padding: .4rem .8rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line); font-weight: 400; overflow-wrap: break-word }
th[scope=row] { min-width: 6.5rem; max-width: 22rem } td { max-width: 28rem }
thead th { font-weight: 600; background: var(--sunken); font-size: .86rem; vertical-align: bottom }
.tall thead th { position: sticky; top: 0; z-index: 1 }
.num { text-align: right; white-space: nowrap } thead .num { white-space: normal }
.pin th:first-child { position: sticky; left: 0; z-index: 1; background: var(--surface); max-width: 11rem }
.pin thead th:first-child { background: var(--sunken); z-index: 2 }
td .muted, th .muted { font-size: .84rem; font-weight: 400 } .first { font-weight: 650 }
.small-cells th, .small-cells td { padding: .2rem .45rem; font-size: .82rem } .zero { color: var(--muted) }
code { font-family: ui-monospace, "SF Mono", "Cascadia Mono", "DejaVu Sans Mono", Menlo, monospace; font-size: .86em; overflow-wrap: anywhere; white-space: pre-wrap }
details { margin-top: .9rem } summary { cursor: pointer; color: var(--accent); font-size: .92rem; padding: .2rem 0; width: fit-content }

.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem 2rem; align-items: start }
.beside { display: grid; gap: 1rem 2rem; grid-template-columns: minmax(0, 1fr) } .beside > * { min-width: 0 }
.beside table { font-size: .86rem } .beside th, .beside td { padding-left: .42rem; padding-right: .42rem }
.beside th[scope=row] { min-width: 5.6rem; overflow-wrap: break-word }
.beside th:first-child { padding-left: .8rem } .beside tr > :last-child { padding-right: .8rem }
@media (min-width: 56rem) {
  .beside { grid-template-columns: minmax(0, 21rem) minmax(0, 1fr) } .beside .scroll { max-height: 26rem; overflow-y: auto }
  .beside thead th { position: sticky; top: 0; z-index: 1 }
}
figure { margin: .4rem 0; min-width: 0; max-width: 30rem } figcaption { font-weight: 600; font-size: .92rem; margin-bottom: .3rem }
svg { display: block; overflow: hidden } .chart { width: 100%; height: auto } .chart.wide { width: auto; max-width: none; height: auto }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; fill: var(--muted); font-variant-numeric: tabular-nums }
svg .mid { text-anchor: middle } svg .end { text-anchor: end } svg .strong { fill: var(--text); font-weight: 600 }
.grid { stroke: var(--line); fill: none } .axis, .guide { stroke: var(--strong-line); fill: none } .guide { stroke-dasharray: 4 4 }
.line path { fill: none; stroke-width: 2; stroke-linejoin: round } .line.solid path { stroke-dasharray: none; stroke-width: 2.5 }
.whisker { stroke: var(--text); stroke-width: 1.5; fill: none }
.cell .guide { stroke: var(--text); stroke-dasharray: 2 2 } .cell { width: 8.5rem; height: 1.15rem; display: inline-block; vertical-align: middle }
.strip { width: 5.5rem; height: .6rem; border-radius: 3px; overflow: hidden }
.swatch { display: inline-block; width: 28px; height: 12px; flex: none; margin-top: .35rem } .swatch path { stroke-width: 2; fill: none }
.legend { list-style: none; margin: .5rem 0 0; padding: 0; font-size: .86rem; display: grid; gap: .15rem } .legend li { display: flex; gap: .5rem }
.legend.flat { display: flex; flex-wrap: wrap; gap: .1rem 1rem }
.right { stroke: var(--strong-line); stroke-width: 1.5 }

.error { border-top: 1px solid var(--line); padding: 1rem 0 .4rem } .error h3 { margin: 0 0 .35rem }
.facts.small { font-size: .86rem; gap: .15rem 1.2rem; margin-top: .5rem }
.facts.small div { display: block } .facts.small dt, .facts.small dd { display: inline; margin-right: .35rem }
.tokens { white-space: pre-wrap; background: var(--sunken); border-radius: 10px; padding: .7rem .9rem; margin: .5rem 0;
  max-width: 78ch; line-height: 1.75; font-size: .95rem }
.tokens.long { max-height: 17rem; overflow-y: auto }
mark { color: var(--text); border-radius: 3px; padding: .05em .06em; text-underline-offset: 3px }
mark.p1, mark.p2, mark.p3 { text-decoration: underline solid; font-weight: 600 } mark.p3 { font-weight: 750; text-decoration-thickness: 2.5px }
mark.n1, mark.n2, mark.n3 { text-decoration: underline dashed; font-style: italic } mark.n3 { text-decoration-thickness: 2.5px }
footer { color: var(--muted); font-size: .86rem; padding: 0 .2rem }

@media (max-width: 30rem) {
  header { padding: 1.4rem .9rem .8rem } .frame { padding: 0 .6rem 2rem } section { padding: 1rem .9rem 1.1rem; border-radius: 12px }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .55rem } .cards .card { padding: .7rem .75rem } .big { font-size: 1.55rem }
  .cards.small { grid-template-columns: repeat(2, minmax(0, 1fr)) } svg text { font-size: 13px }
  th, td { padding: .35rem .55rem } .pin th:first-child { max-width: 8.5rem; min-width: 5.5rem }
}
@media print {
  body { background: none; font-size: 10.5pt } nav, .skip { display: none } .frame { display: block; padding: 0 } header { padding: 0 0 1rem }
  section { border: 0; padding: .6rem 0 }
  .scroll, .scroll.tall, .beside .scroll, .tokens.long { overflow: visible; max-height: none } .pin th:first-child, .tall thead th, .beside thead th { position: static }
  .cards, figure, .error, tr { break-inside: avoid } h2, h3, caption { break-after: avoid }
  details::details-content { content-visibility: visible; block-size: auto }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact }
}
"""


def style_sheet() -> str:
    """The whole style sheet; the dark colours where the reader's system asks for them, never on paper."""
    colours = [
        f".s{index} {{ stroke: var(--s{index}); fill: var(--s{index}); stroke-dasharray: {DASHES[index % len(DASHES)]} }}"
        for index in range(10)
    ]
    colours += [
        f".h{index} {{ fill: var(--h{index}) }} .h{index} text {{ fill: var(--t{index}) }}" for index in range(6)
    ]
    colours += [f"mark.{sign}{index} {{ background: var(--{sign}{index}) }}" for sign in "pn" for index in (1, 2, 3)]
    colours += [
        "g.fill, rect.fill { stroke: none }",
        ".s0 circle, .s1 circle, .line rect, .line circle { stroke-dasharray: none }",
    ]
    light, dark = (" ".join(f"--{name}: {colour};" for name, colour in palette.items()) for palette in (LIGHT, DARK))
    roots = [
        f":root {{ color-scheme: light dark; {light} }}",
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}",
    ]
    return "\n".join([*roots, _RULES, *colours, ""])
