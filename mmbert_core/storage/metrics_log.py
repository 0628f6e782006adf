"""The lines of a run's metrics.jsonl."""

from pathlib import Path

from mmbert_core.storage.schema import check_structure, mapping, nullable, number, parse_json, record, text, whole

LINE = record({"step": whole(0)}, {"undefined": mapping(text())}, others=nullable(number()))


def kept_lines(path: Path, last_step: int, *, validated: bool = True, tested: bool = False) -> list[str]:
    """The lines that a resumed run keeps: up to `last_step`, without those of work that is done again.

    Lines that cannot be read, such as a half-written last one, are dropped. `validated`, `tested`: the validation of
    `last_step` and the test are done.
    """
    if last_step == 0 or not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = parse_json(line)
            check_structure(values, LINE, "line")
            step = values["step"]
        except ValueError:
            continue
        is_pending = ("val_loss" in values and step == last_step and not validated) or (
            "test/num_rows" in values and not tested
        )
        if step <= last_step and not is_pending:
            kept.append(line)
    return kept
