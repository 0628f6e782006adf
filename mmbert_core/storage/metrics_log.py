"""The lines of a run's metrics.jsonl."""

from pathlib import Path

from mmbert_core.storage.schema import check_structure, mapping, nullable, number, parse_json, record, text, whole

# `stage`: what a line is about that belongs to no training step, such as head_first
LINE = record({"step": whole(0)}, {"undefined": mapping(text()), "stage": text()}, others=nullable(number()))


def kept_lines(path: Path, last_step: int, *, validated: bool = True, tested: bool = False) -> list[str]:
    """The lines that a resumed run keeps: those up to `last_step`, without results that will be computed again.

    `validated`: the validation at `last_step` is done and its line stays. `tested`: the same for the test's line.
    A new run keeps none: `last_step` -1. Lines that cannot be read, such as a half-written last one, are dropped.
    """
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = parse_json(line)
            check_structure(values, LINE, "line")
            step = values["step"]
        except ValueError:
            continue
        is_validated_again = "val_loss" in values and step == last_step and not validated
        is_tested_again = "test/num_rows" in values and not tested
        if step <= last_step and not is_validated_again and not is_tested_again:
            kept.append(line)
    return kept
