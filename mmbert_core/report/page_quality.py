"""The page's sections on how good the model is, Headline to Scores.

Each function takes its part of the report and the whole of it, and returns markup. K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from mmbert_core.evaluation.class_ranking import FEW_CLASSES
from mmbert_core.evaluation.metrics import ONE_SIDED, lower_is_better
from mmbert_core.report import charts
from mmbert_core.report.charts import Axis, Curve, Guide
from mmbert_core.report.formatting import (
    NOTHING,
    beside,
    bounds,
    brief,
    card,
    cards,
    chart,
    count,
    decimals,
    details,
    figure,
    interval,
    is_number,
    name,
    note,
    percent,
    reason,
    scroll_box,
    short,
    table,
    text,
)

HEADLINE = 6  # metrics with a card of their own
MAX_CLASSES = 40  # of the confusion grid: the most frequent ones
MAX_LISTED = 25  # classes of a table, where there are too many for a grid: as many as need no scrolling
MAX_MIXED = 15  # pairs of classes taken for each other
RATES = ("precision", "recall", "f1")
FALSE_RATES, RECALLS = (0.01, 0.05, 0.1, 0.2), (0.5, 0.8, 0.9, 0.95)  # at which the curves are read off

Part = Mapping[str, Any]


# ---- metrics ----


def headline(part: Part, report: Part) -> str:
    """The first metrics as big figures, beside each the best baseline; then all of them."""
    names, model = part["names"], part["model"]
    rows = report.get("baselines", {}).get("rows", [])
    shown = [_headline_card(metric, model.get(metric) or {}, rows) for metric in names[:HEADLINE]]
    listed = []
    for metric in names:
        value = model.get(metric) or {}
        listed.append(
            [
                name(metric),
                decimals(value.get("value")),
                interval(value.get("interval")),
                text(value.get("reason") or ""),
            ]
        )
    without_notes = not any(row[3] for row in listed)
    heads = ["metric", ">value", ">interval", "note"][: 3 if without_notes else 4]
    words = note("In brackets: where 95 of 100 resamples of these rows lie.") if any(row[2] for row in listed) else ""
    if num_left_out := part.get("classes_left_out"):
        words += note(
            f"Of the {count(len(report['class_names']))} classes those with the lowest average precision are listed; {count(num_left_out)} more are in test_metrics.json."
        )
    return cards(shown) + words + table("All metrics", heads, [row[: len(heads)] for row in listed])


def _headline_card(metric: str, value: Part, baselines: Sequence[Part]) -> str:
    if not is_number(value.get("value")):
        return card(name(metric), NOTHING, text(value.get("reason") or "not measured"))
    lines = [interval(value.get("interval"))]
    best = best_baseline(metric, baselines)
    if best and metric not in ONE_SIDED:
        gain = (value["value"] - best[1]) * (-1 if lower_is_better(metric) else 1)
        words = (
            f'<span class="{"good" if gain > 0 else "bad"}">{decimals(abs(gain))} {"better" if gain > 0 else "worse"} than</span>'
            if gain
            else "equal to"
        )
        lines.append(f"{words} the best baseline: {decimals(best[1])} ({text(best[0])})")
    return card(name(metric), decimals(value["value"]), *lines)


def best_baseline(metric: str, baselines: Sequence[Part]) -> tuple[str, float] | None:
    """Name and value of the baseline that does best in a metric."""
    known = [
        (row["name"], row["metrics"][metric]["value"])
        for row in baselines
        if is_number((row["metrics"].get(metric) or {}).get("value"))
    ]
    if not known:
        return None
    return min(known, key=lambda pair: pair[1]) if lower_is_better(metric) else max(known, key=lambda pair: pair[1])


def warnings(part: Sequence[str], report: Part) -> str:
    return f'<ul class="warnings">{"".join(f"<li>{text(line)}</li>" for line in part)}</ul>' if part else note("None.")


def baselines(part: Part, report: Part) -> str:
    """The verdict, the first metric on one scale, and every metric of every baseline."""
    metrics = report.get("metrics", {})
    names = metrics.get("names") or list(dict.fromkeys(metric for row in part["rows"] for metric in row["metrics"]))
    columns = [
        ("this model", "", metrics.get("model") or {}),
        *((row["name"], row.get("how") or "", row["metrics"]) for row in part["rows"]),
    ]
    made = f'<p class="verdict">{text(part["verdict"])}</p>' if part.get("verdict") else ""
    first = [(title, values.get(names[0]) or {}) for title, _, values in columns] if names else []
    dots = [
        (title, value["value"], bounds(value.get("interval")))
        for title, value in first
        if is_number(value.get("value"))
    ]
    if dots:
        desc = "; ".join(f"{short(title, 40)} {decimals(value)}" for title, value, _ in dots)
        words = f"{names[0]} of the model and of simple models"
        made += chart(words, charts.interval_dots(dots, label=names[0], title=words, desc=desc))
    heads = ["metric", *(f'>{name(title)}<br><span class="muted">{text(how)}</span>' for title, how, _ in columns)]
    rows = [[name(metric), *(_with_interval(values.get(metric) or {}) for _, _, values in columns)] for metric in names]
    return made + table("The model beside simple models on the same rows", heads, rows, kind="pin")


def _with_interval(value: Part) -> str:
    below = interval(value.get("interval")) or (text(value["reason"]) if value.get("reason") else "")
    return decimals(value.get("value")) + (f'<br><span class="muted">{below}</span>' if below else "")


# ---- thresholds and probabilities ----


def threshold(part: Part, report: Part) -> str:
    """The chosen threshold, what it brings on these rows and brought on those that it was chosen on, and what others would."""
    rows = sorted(
        (row for row in part.get("table") or [] if is_number(row.get("threshold"))), key=lambda row: row["threshold"]
    )
    here: Part = next((row for row in rows if row["threshold"] == part.get("value")), {})
    big = [("threshold", _threshold(part.get("value"))), *((key, decimals(here.get(key))) for key in RATES)]
    big.append(("alerts per 1,000 rows", decimals(here.get("alerts_per_1000"), 1)))
    made = cards((card(label, value) for label, value in big), kind="small")
    there = ", ".join(f"{key} {decimals(part[key])}" for key in RATES if is_number(part.get(key)))
    made += f"<p>Rule <code>{text(part.get('rule') or NOTHING)}</code>, chosen on {text(part.get('chosen_on') or NOTHING)}{f' with {there}' if there else ''}. "
    counted = "Every row" if is_number(part.get("value")) and part["value"] < 0 else "A row above the threshold"
    made += f"{counted} counts as class {name(_positive(report))}.</p>"
    made += note(text(part["reason"]) + ".") if part.get("reason") else ""
    if not rows:
        return made
    curves = [
        Curve(key, *_points([max(row["threshold"], 0) for row in rows], [row.get(key) for row in rows]), style)
        for style, key in enumerate(RATES)
    ]
    guides = (
        [Guide((max(part["value"], 0), 0), (max(part["value"], 0), 1), "chosen")]
        if is_number(part.get("value"))
        else []
    )
    words = "Precision, recall and F1 by threshold"
    svg = charts.plot(
        curves,
        Axis("threshold"),
        Axis("value"),
        title=words,
        desc=f"{len(rows)} thresholds; the table has the figures",
        guides=guides,
    )
    heads = ["threshold", ">precision", ">recall", ">f1", ">alerts per 1,000", ">false alerts per 1,000"]
    cells = []
    for row in reversed(rows):
        alerts = (decimals(row.get(key), 1) for key in ("alerts_per_1000", "false_alerts_per_1000"))
        cells.append([_threshold(row["threshold"], figure), *(decimals(row.get(key)) for key in RATES), *alerts])
    return made + beside(chart(words, svg, legend(curves)), table("What each threshold brings", heads, cells))


def _threshold(value: Any, written: Callable[[Any, int], str] = decimals) -> str:
    """A threshold with 4 digits; the one below 0 is not a probability but stands for every row."""
    return "every row" if is_number(value) and value < 0 else written(value, 4)


def calibration(part: Part, report: Part) -> str:
    """What a probability of 0.8 is worth: bins, before and after dividing by the temperature."""
    big = [
        ("temperature", figure(part.get("temperature"), 4)),
        ("ece before", decimals(part.get("ece_before"))),
        ("ece after", decimals(part.get("ece_after"))),
        ("validation rows", count(part.get("rows"))),
    ]
    made = cards((card(label, value) for label, value in big), kind="small")
    made += reason(part["reason"]) if part.get("reason") else ""
    made += note(text(f"Method: {part['method']}.")) if part.get("method") else ""
    given = {"as the model says": part.get("bins") or [], "calibrated": part.get("calibrated_bins") or []}
    series = {title: bins for title, bins in given.items() if bins}
    if not series:
        return made
    words = "Probability and share found"
    about = (
        f"probability of {short(_positive(report))}"
        if report.get("task") == "binary"
        else "probability of the chosen class"
    )
    desc = "On the diagonal both agree; the table has the figures"
    svg = charts.reliability(series, x_label=f"{about}, mean of a bin", y_label="share found", title=words, desc=desc)
    below = legend([Curve(title, (), (), style, marker=charts.MARKERS[style]) for style, title in enumerate(series)])
    kinds = ["", '<br><span class="muted">calibrated</span>'] if len(series) > 1 else [""]
    heads = ["bin", *(f">{head}{kind}" for kind in kinds for head in ("rows", "mean", "share"))]
    rows = []
    for bins in zip_longest(*series.values(), fillvalue={}):
        first = next(one for one in bins if one)
        cells = [
            cell
            for one in bins
            for cell in (
                count(one.get("rows")),
                *((decimals(one.get(key)) if one.get("rows") else NOTHING) for key in ("mean", "share")),
            )
        ]
        rows.append([f"{decimals(first.get('low'), 2)}–{decimals(first.get('high'), 2)}", *cells])
    under = note("Points below the diagonal: the model promises too much; above it: too little.")
    return made + beside(
        chart(words, svg, below + under), table("Rows, mean probability and share found in each bin", heads, rows)
    )


def roc(part: Part, report: Part) -> str:
    curves = part["curves"]
    drawn = [Curve(title, curve["x"], curve["y"], style) for style, (title, curve) in enumerate(curves.items())]
    words = "True beside false positive rate"
    svg = charts.plot(
        drawn,
        Axis("false positive rate"),
        Axis("true positive rate"),
        title=words,
        desc=_areas(curves),
        guides=[Guide((0, 0), (1, 1))],
    )
    below = legend(drawn, [f"area {decimals(curve.get('area'))}" for curve in curves.values()]) + _curves_left_out(
        curves, report
    )
    heads = ["class", ">area", *(f">at&nbsp;{rate:.0%}" for rate in FALSE_RATES)]
    rows = []
    for title, curve in curves.items():
        found = (_best(curve, lambda x, rate=rate: x <= rate) for rate in FALSE_RATES)
        rows.append([name(title), decimals(curve.get("area")), *map(decimals, found)])
    return beside(chart(words, svg, below), table("True positive rate at a false positive rate of ...", heads, rows))


def precision_recall(part: Part, report: Part) -> str:
    curves = part["curves"]
    drawn = []
    for style, (title, curve) in enumerate(curves.items()):
        # Read from high recall to low: a precision holds until the next lower recall, as average precision sums it.
        points = sorted(zip(*_points(curve["x"], curve["y"])), key=lambda point: -point[0])
        drawn.append(Curve(title, [x for x, _ in points], [y for _, y in points], style, step=True))
    share = next(iter(curves.values())).get("share") if len(curves) == 1 else None
    guides = [Guide((0, share), (1, share), "share of rows")] if is_number(share) else []
    words = "Precision beside recall"
    svg = charts.plot(drawn, Axis("recall"), Axis("precision"), title=words, desc=_areas(curves), guides=guides)
    below = legend(
        drawn,
        [f"area {decimals(curve.get('area'))}, {percent(curve.get('share'))} of rows" for curve in curves.values()],
    )
    below += _curves_left_out(curves, report)
    heads = ["class", ">area", ">share of&nbsp;rows", *(f">at&nbsp;{recall:.0%}" for recall in RECALLS)]
    rows = []
    for title, curve in curves.items():
        found = (_best(curve, lambda x, recall=recall: x >= recall) for recall in RECALLS)
        rows.append([name(title), decimals(curve.get("area")), percent(curve.get("share")), *map(decimals, found)])
    return beside(chart(words, svg, below), table("Precision at a recall of ...", heads, rows))


# ---- classes ----


def confusion(part: Part, report: Part) -> str:
    """The grid, each class's figures, the classes most often taken for each other, all counts."""
    if "counts" not in part:
        return _confusion_of_many(part, report["class_names"])
    counts, names = part["counts"], report["class_names"]
    order = range(len(names))
    made = ""
    if len(names) > MAX_CLASSES:
        order = sorted(sorted(order, key=lambda index: -sum(counts[index]))[:MAX_CLASSES])
        made += note(f"Of {count(len(names))} classes the {MAX_CLASSES} most frequent ones are drawn.")
    drawn, titles = [[counts[row][column] for column in order] for row in order], [names[index] for index in order]
    words = "Labels and predictions"
    svg = charts.confusion(
        drawn, titles, title=words, desc="Rows are labels, columns predictions; the tables have the figures"
    )
    under = note("A cell's shade is its share of the label's rows; outlined: right.") + charts.shades()
    if len(titles) > charts.MAX_NUMBERED:
        made += scroll_box(svg, words, kind="plain") + under + _per_class(counts, names)
    else:
        made += beside(chart(words, svg, under), _per_class(counts, names))
    mixed = (
        (value, row, column)
        for row, line in enumerate(counts)
        for column, value in enumerate(line)
        if value and row != column
    )
    pairs = sorted(mixed, key=lambda pair: -pair[0])[:MAX_MIXED]
    if len(names) > 2 and pairs:
        made += _mistakes([(row, column, value) for value, row, column in pairs], [sum(line) for line in counts], names)
    cells = [
        [name(title), *((brief(value) if value else '<span class="zero">0</span>') for value in line)]
        for title, line in zip(titles, drawn)
    ]
    heads = ["label", *(f">{name(title)}" for title in titles)]
    return made + details(
        "All counts as a table", table("Rows: labels; columns: predictions", heads, cells, kind="pin small-cells")
    )


def _per_class(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    predicted = [sum(line[index] for line in counts) for index in range(len(names))]
    return _class_table(
        "Each class",
        names,
        [line[index] for index, line in enumerate(counts)],
        [sum(line) for line in counts],
        predicted,
    )


def _class_table(
    caption: str, names: Sequence[str], right: Sequence[int], labelled: Sequence[int], predicted: Sequence[int]
) -> str:
    """Rows, precision, recall and F1 of classes from their counts."""
    rows = []
    for title, hits, rows_of_class, chosen in zip(names, right, labelled, predicted):
        precision, recall = (hits / whole if whole else None for whole in (chosen, rows_of_class))
        f1 = 2 * hits / (chosen + rows_of_class) if chosen + rows_of_class else None
        rows.append(
            [name(title), count(rows_of_class), count(chosen), decimals(precision), decimals(recall), decimals(f1)]
        )
    return table(caption, ["class", ">rows", ">predicted", ">precision", ">recall", ">f1"], rows)


def _confusion_of_many(part: Part, names: Sequence[str]) -> str:
    """Of hundreds of classes no grid: the most frequent mistakes, and the figures of the most frequent classes."""
    right, labelled, predicted = part["right"], part["labelled"], part["predicted"]
    made = note(
        f"{count(len(names))} classes are too many for a grid: the most frequent mistakes, then the most frequent classes."
    )
    made += _mistakes(part["mistakes"], labelled, names) if part["mistakes"] else note("No row was predicted wrong.")
    listed = sorted(range(len(names)), key=lambda index: -labelled[index])[:MAX_LISTED]
    made += _class_table(
        "The most frequent classes",
        *([column[index] for index in listed] for column in (names, right, labelled, predicted)),
    )
    num_never, num_missed = (
        sum(not rows for rows in labelled),
        sum(bool(rows) and not hits for rows, hits in zip(labelled, right)),
    )
    words = f"The counts of all {count(len(names))} classes are in report.json. No row was found of {count(num_missed)} classes; {count(num_never)} have no row."
    return made + note(words)


def _mistakes(mistakes: Sequence[Sequence[int]], labelled: Sequence[int], names: Sequence[str]) -> str:
    """Label, predicted class and rows, the most frequent first."""
    rows = [
        [name(names[label]), name(names[chosen]), count(value), percent(value / labelled[label])]
        for label, chosen, value in mistakes
    ]
    return table("Most often taken for another class", ["label", "predicted", ">rows", ">of the label"], rows)


def scores(part: Part, report: Part) -> str:
    """Where the probabilities lie, one histogram for each class (or for right and wrong)."""
    edges, counts = part["edges"], part["counts"]
    chosen = (report.get("threshold") or {}).get("value")
    label = (
        f"probability of {short(_positive(report))}"
        if report.get("task") == "binary"
        else "probability of the chosen class"
    )
    words = "Rows by probability"
    desc = "; ".join(f"{short(title)}: {count(sum(column))} rows" for title, column in counts.items())
    svg = charts.histograms(
        edges, counts, label=label, title=words, desc=desc, mark=max(chosen, 0) if is_number(chosen) else None
    )
    under = note(f"Dashed: the threshold, {_threshold(chosen)}.") if is_number(chosen) else ""
    rows = [
        [f"{figure(low)}–{figure(high)}", *(count(value) for value in values)]
        for low, high, *values in zip(edges, edges[1:], *counts.values())
    ]
    return chart(words, svg, under) + details(
        "These figures as a table", table(words, [text(label), *(f">{name(title)}" for title in counts)], rows)
    )


# ---- parts ----


def legend(curves: Sequence[Curve], words: Sequence[str] = ()) -> str:
    """Each curve's line, name and, if there are, words."""
    made = []
    for curve, said in zip_longest(curves, words):
        made.append(
            f"<li>{charts.swatch(curve.style, curve.marker)}<span>{name(curve.name)}{': ' + text(said) if said else ''}</span></li>"
        )
    return f'<ul class="legend">{"".join(made)}</ul>'


def _positive(report: Part) -> str:
    """The class whose probability a binary model gives."""
    return (report.get("class_names") or ["0", "1"])[-1]


def _points(x: Sequence[Any], y: Sequence[Any]) -> tuple[list[float], list[float]]:
    """Without the points that lack a number."""
    known = [(a, b) for a, b in zip(x, y) if is_number(a) and is_number(b)]
    return [a for a, _ in known], [b for _, b in known]


def _best(curve: Part, is_allowed: Callable[[float], bool]) -> float | None:
    """The highest y among the points whose x is allowed."""
    return max((y for x, y in zip(*_points(curve["x"], curve["y"])) if is_allowed(x)), default=None)


def _curves_left_out(curves: Mapping[str, Part], report: Part) -> str:
    """Which of very many classes are drawn."""
    num_classes = len(report.get("class_names") or [])
    return (
        note(f"The {count(len(curves))} most frequent of {count(num_classes)} classes.")
        if num_classes > FEW_CLASSES
        else ""
    )


def _areas(curves: Mapping[str, Part]) -> str:
    return "; ".join(f"{short(title)}: area {decimals(curve.get('area'))}" for title, curve in curves.items())
