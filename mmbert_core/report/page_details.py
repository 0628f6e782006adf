"""The page's sections on what the figures rest on, Training to Versions.

Each function takes its part of the report and the whole of it, and returns markup.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from mmbert_core.inference.attributions import highlight_level, largest_attributions
from mmbert_core.report import charts
from mmbert_core.report.charts import Axis, Curve, Guide
from mmbert_core.report.formatting import (
    NOTHING,
    bounds,
    chart,
    clean,
    count,
    decimals,
    details,
    figure,
    figures_row,
    interval,
    is_number,
    name,
    note,
    percent,
    reason,
    short,
    table,
    text,
)
from mmbert_core.report.page_quality import legend

MAX_SLICES = 200  # rows of the table, the worst ones
MAX_ERRORS = 50
MAX_PIECES = 500  # of a text
MAX_COLUMNS = 15  # of a wrong row; more are folded away
LONG_TEXT = 1500  # characters; more scroll in their own box
SPLITS = {"train": "training", "val": "validation", "test": "test"}

Part = Mapping[str, Any]


# ---- training ----


def training(part: Part, report: Part) -> str:
    """Losses, the watched metric and the learning rate by step, the best step marked."""
    validations, best, metric = part.get("validations") or [], part.get("best_step"), part.get("metric")
    steps = part.get("steps") or []
    train = Curve("training loss", *_known(steps, part.get("train_loss") or []))
    val = Curve("validation loss", *_by_step(validations, "val_loss"), 1, marker="square")
    made = [_by_step_chart("Loss", [train, val], best)]
    if metric:
        made.append(
            _by_step_chart(
                f"{metric} of the validation rows", [Curve(metric, *_by_step(validations, metric), marker="dot")], best
            )
        )
    made.append(_by_step_chart("Learning rate", [Curve("learning rate", *_known(steps, part.get("lr") or []))], None))
    words = (
        note(
            f"Dashed upright: step {count(best)}, the best in {name(metric or 'val_loss')}; its weights are the model's."
        )
        if is_number(best)
        else ""
    )
    if not validations:
        return figures_row(made) + words
    keys = list(dict.fromkeys(key for row in validations for key in row if key != "step"))
    rows = [
        [
            count(row.get("step")) + (" (best)" if row.get("step") == best else ""),
            *(figure(row.get(key), 4) for key in keys),
        ]
        for row in validations
    ]
    return (
        figures_row(made) + words + table("Validations", ["step", *(f">{name(key)}" for key in keys)], rows, kind="pin")
    )


def _by_step_chart(words: str, curves: Sequence[Curve], best: Any) -> str:
    drawn = [curve for curve in curves if curve.x]
    if not drawn:
        return chart(words, reason("no values"))
    low, high = charts.range_of([value for curve in drawn for value in curve.y])
    last = max(max(curve.x) for curve in drawn)
    guides = [Guide((best, low), (best, high), "best")] if is_number(best) else []
    said = "; ".join(f"{curve.name} from {figure(curve.y[0], 4)} to {figure(curve.y[-1], 4)}" for curve in drawn)
    svg = charts.plot(drawn, Axis("step", 0, max(last, 1)), Axis("", low, high), title=words, desc=said, guides=guides)
    return chart(words, svg, (legend(drawn) if len(drawn) > 1 else "") + note(text(said) + "."))


# ---- rows ----


def slices(part: Part, report: Part) -> str:
    """The worst parts of the rows first, on one scale with all rows."""
    rows, metric = part["rows"], part["metric"]
    whole = ((report.get("metrics", {}).get("model") or {}).get(metric) or {}).get("value")
    shown = rows[:MAX_SLICES]
    names = [metric, *dict.fromkeys(key for row in shown for key in row["metrics"] if key != metric)]
    known = [
        value
        for row in shown
        for value in (row["metrics"].get(metric), *((row.get("intervals") or {}).get(metric) or ()))
        if is_number(value)
    ]
    scale = charts.range_of(known, around=[whole] if is_number(whole) else [])
    cells = [_slice_row(row, names, scale, whole, report["class_names"]) for row in shown]
    beside_all = f'beside all rows<br><span class="muted">{name(metric)} {decimals(whole)}</span>'
    heads = ["part", ">rows", f">{name(metric)}", beside_all, *(f">{name(key)}" for key in names[1:]), "classes"]
    left_out = note(f"{count(len(rows))} slices; the {MAX_SLICES} worst are shown.") if len(rows) > MAX_SLICES else ""
    words = note(
        "Worst first. The dashed line is all rows, the other the interval: where they cross, the difference may be chance."
    )
    return words + left_out + table(f"Slices by {clean(metric)}", heads, cells, kind="pin")


def _slice_row(
    row: Part, names: Sequence[str], scale: tuple[float, float], whole: Any, class_names: Sequence[str]
) -> list[str]:
    metric, (_, *others) = names[0], names
    value, ends = row["metrics"].get(metric), bounds((row.get("intervals") or {}).get(metric))
    why = {key: text((row.get("undefined") or {}).get(key, "")) for key in names}
    dot = f'<span class="muted">{why[metric] or NOTHING}</span>'
    if is_number(value):
        dot = charts.interval_dot(value, ends, scale, reference=whole if is_number(whole) else None)
    first = f'<span class="first">{decimals(value)}</span>' + (
        f'<br><span class="muted">{interval(ends)}</span>' if ends else ""
    )
    rest = (
        decimals(row["metrics"].get(key)) + (f'<br><span class="muted">{why[key]}</span>' if why[key] else "")
        for key in others
    )
    return [
        f'<span class="muted">{name(row["column"])}</span><br>{name(row["value"])}',
        count(row["rows"]),
        first,
        dot,
        *rest,
        _classes_of_slice(row, class_names),
    ]


def _classes_of_slice(row: Part, class_names: Sequence[str]) -> str:
    """The shares of the classes in a slice's rows; of very many classes the report has the largest."""
    shares = [
        (title, share) for title, share in zip(class_names, row.get("share_of_classes") or []) if is_number(share)
    ]
    if largest := row.get("largest_classes"):
        shares = [(class_names[index], share) for index, share in largest]
    if not shares:
        return NOTHING
    title, share = shares[-1] if len(class_names) == 2 else max(shares, key=lambda pair: pair[1])
    if largest:
        shares.append(("all others", max(0.0, 1 - sum(share for _, share in shares))))
    return charts.shares(shares) + f'<span class="muted">{text(short(title))}: {percent(share)}</span>'


def importance(part: Part, report: Part) -> str:
    """How much the metric falls when a column's cells change places."""
    items = part["items"]
    spreads = [item["spread"] if is_number(item.get("spread")) else None for item in items]
    ends = [
        item["drop"] + sign * (spread or 0)
        for item, spread in zip(items, spreads)
        if is_number(item["drop"])
        for sign in (-1, 1)
    ]
    scale = charts.range_of(ends, around=[0.0])
    rows = []
    for item, spread in zip(items, spreads):
        drawn = charts.bar(item["drop"], spread, scale) if is_number(item["drop"]) else NOTHING
        said = decimals(item["drop"]) + (
            f' <span class="muted">± {decimals(spread)}</span>' if spread is not None else ""
        )
        rows.append([name(item["name"]), said, drawn, text(item.get("kind") or "")])
    words = f"How much {name(part['metric'])} falls when a column's cells are dealt anew among {count(part.get('rows'))} rows; "
    words += f"mean and spread of {count(part.get('repeats'))} deals."
    return note(words) + table("Columns by importance", ["column", ">drop", "drawn", "kind"], rows)


def errors(part: Part, report: Part) -> str:
    """Wrong rows, each with its text and what in it spoke for the wrong class."""
    rows = part["rows"]
    if not rows:
        return note("None: every row is right.")
    shown = rows[:MAX_ERRORS]
    words = f"Rows whose prediction is wrong, the surest first{f'; {count(len(shown))} of {count(len(rows))} are shown' if len(shown) < len(rows) else ''}. "
    legend_words = 'Words <mark class="p2">underlined and bold</mark> speak for the predicted class, <mark class="n2">dashed and slanted</mark> against it.'
    has_tokens = any(row.get("tokens") for row in shown)
    return note(words + (legend_words if has_tokens else "")) + "".join(
        _error(row, place) for place, row in enumerate(shown, 1)
    )


def _error(row: Part, place: int) -> str:
    head = f"{place}. Label {name(row['label'])}, predicted {name(row['pred'])} (prob {decimals(row.get('prob'))})"
    where = text(row.get("place") or "") + (f", id {name(row['id'])}" if row.get("id") is not None else "")
    pieces = row.get("tokens") or []
    cells = row.get("columns") or {}
    columns = "".join(f"<div><dt>{name(key)}</dt><dd>{name(value)}</dd></div>" for key, value in cells.items())
    listed = f'<dl class="facts small">{columns}</dl>' if cells else ""
    listed = details(f"{count(len(cells))} columns", listed) if len(cells) > MAX_COLUMNS else listed
    return f'<div class="error"><h3>{head}</h3><p class="note">{where}</p>{_highlighted(pieces, place)}{_strongest(pieces, row)}{listed}</div>'


def _highlighted(pieces: Sequence[Sequence[Any]], place: int) -> str:
    """The text with its pieces marked by sign and strength; neighbours of the same kind share one mark."""
    if not pieces:
        return ""
    shown = pieces[:MAX_PIECES]
    made = []
    for kind, group in groupby(shown, key=lambda piece: _kind_of(piece[1])):
        words = "".join(str(piece) for piece, _ in group)
        bare = words.lstrip()  # the space before a word stays outside its mark
        made.append(
            text(words[: len(words) - len(bare)]) + f'<mark class="{kind}">{text(bare)}</mark>'
            if kind and bare
            else text(words)
        )
    rest = (
        f' <span class="muted">… and {count(len(pieces) - MAX_PIECES)} more pieces</span>'
        if len(pieces) > MAX_PIECES
        else ""
    )
    is_long = sum(len(str(piece)) for piece, _ in shown) > LONG_TEXT
    box = f' long" tabindex="0" role="region" aria-label="Text of error {place}"' if is_long else '"'
    return f'<div class="tokens{box} dir="auto">{"".join(made)}{rest}</div>'


def _kind_of(weight: Any) -> str:
    """The class of a highlight: "p1" to "p3" for, "n1" to "n3" against, or none."""
    level = highlight_level(weight) if is_number(weight) else 0
    return f"{'p' if level > 0 else 'n'}{abs(level)}" if level else ""


def _strongest(pieces: Sequence[Sequence[Any]], row: Part) -> str:
    """The same in words: the strongest pieces of either sign."""
    largest = largest_attributions([(str(piece), weight) for piece, weight in pieces if is_number(weight)])
    said = [
        f"{side}: " + ", ".join(f"{text(short(span))} ({decimals(weight, 2)})" for span, weight in spans)
        for side, spans in zip(("for", "against"), largest)
        if spans
    ]
    return (
        note(f'Strongest {"; ".join(said)} <span class="muted">({text(row.get("method") or "weights")})</span>')
        if said
        else ""
    )


# ---- what was run ----


def config(part: Part, report: Part) -> str:
    """Every key as given, and what was decided from it."""
    resolved = report.get("resolved")
    given = _key_table("The run's config", part)
    if not isinstance(resolved, Mapping) or not resolved:
        return given
    return given + _key_table("Resolved from it", resolved)


def _key_table(caption: str, part: Part) -> str:
    return table(caption, ["key", "value"], ([name(key), _plain(value)] for key, value in part.items()))


def _plain(value: Any) -> str:
    """A value as JSON, a text as it is."""
    return f"<code>{text(value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str))}</code>"


def data(part: Part, report: Part) -> str:
    """Rows and classes of each split, and the files with their fingerprints."""
    splits = {title: part[key] for key, title in SPLITS.items() if isinstance(part.get(key), Mapping)}
    known = {title: split for title, split in splits.items() if "rows" in split}
    made = "".join(
        note(f"{text(title)}: {text(split['reason'])}") for title, split in splits.items() if split.get("reason")
    )
    if known:
        rows = [["rows", *(count(split["rows"]) for split in known.values())]]
        rows.append(["tokens on average", *(decimals(split.get("mean_tokens"), 1) for split in known.values())])
        classes = dict.fromkeys(key for split in known.values() for key in split.get("classes") or {})
        for title in classes:
            rows.append(
                [
                    f"class {name(title)}",
                    *(_class_count((split.get("classes") or {}).get(title), split["rows"]) for split in known.values()),
                ]
            )
        if any(split.get("classes_left_out") for split in known.values()):
            rows.append(
                [
                    "all other classes",
                    *(_class_count(split.get("rows_left_out"), split["rows"]) for split in known.values()),
                ]
            )
        made += table("Rows of each split", ["", *(f">{text(title)}" for title in known)], rows)
    files = part.get("files") or {}
    if files:
        rows = [
            [name(path), count(about.get("bytes")), f"<code>{text(about.get('sha256') or NOTHING)}</code>"]
            for path, about in files.items()
        ]
        made += table("Files", ["file", ">bytes", "sha256"], rows)
    return made or note("None known.")


def _class_count(value: Any, rows: Any) -> str:
    return count(value) + (
        f' <span class="muted">({percent(value / rows)})</span>' if is_number(value) and rows else ""
    )


def versions(part: Part, report: Part) -> str:
    return _key_table("Versions", part)


# ---- parts ----


def _known(steps: Sequence[Any], values: Sequence[Any]) -> tuple[list[float], list[float]]:
    pairs = [(step, value) for step, value in zip(steps, values) if is_number(step) and is_number(value)]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _by_step(validations: Sequence[Part], key: str) -> tuple[list[float], list[float]]:
    return _known([row.get("step") for row in validations], [row.get(key) for row in validations])
