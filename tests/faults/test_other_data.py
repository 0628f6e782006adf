"""D14 and D15: new rows with other columns, model folders with files of other models, data changed before a resume."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mmbert_core.storage.files import read_json, write_json
from tests.faults.inputs import (
    HEADER,
    command,
    count_refusal,
    prediction_refuses,
    rows_of,
    train_run,
    trained,
    write_config,
    write_rows,
)
from tests.support import tiny
from tests.support.bad_tables import (
    as_csv,
    header,
)
from tests.support.fault_matrix import Figures, row

pytestmark = pytest.mark.fault

# ---- D14: other columns, files of other models ----


@row(
    "D14",
    "new rows with other columns than the training rows; model folders without, or with another model's, preprocessing",
    "exit code 2, one line",
)
def test_D14_other_schemas(tmp_path: Path) -> Figures:
    figures = Figures()
    for column in HEADER[:-1]:
        path = write_rows(tmp_path / "new.csv", header(column, f"{column}s")(rows_of("test")))
        prediction_refuses(
            figures, f"{column} renamed", path, [f"{path}: column {column!r} not found; nearest is '{column}s'"]
        )
    path = write_rows(tmp_path / "new.csv", [["id", "review", "stars"], ["1", "fine", "5"]])
    prediction_refuses(
        figures, "another table", path, [f"{path}: column ", "not found", "columns are 'id', 'review', 'stars'"]
    )
    path = write_rows(
        tmp_path / "new.csv",
        [HEADER[:-1], *[[line[0], line[1], line[4] or "a", *line[3:5]] for line in rows_of("test")[1:]]],
    )
    prediction_refuses(
        figures,
        "categories where the numbers were",
        path,
        [f"{path} row 1 (line 2), column 'age': expected a finite number", "found '"],
    )

    table = write_rows(tmp_path / "good.csv", rows_of("test"))
    for name in (
        "config.json",
        "features.json",
        "labels.json",
        "model.safetensors",
        "encoder",
        "encoder/config.json",
        "encoder/tokenizer.json",
    ):
        folder = shutil.copytree(trained() / "run", tmp_path / f"without {name.replace('/', ' ')}")
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
        prediction_refuses(figures, f"no {name}", table, [str(folder)], model=folder)

    features = read_json(trained() / "run/features.json")
    for case, name, changes in (
        ("statistics of other columns", "features.json", {"number_names": ["age", "weight"]}),
        ("numbers in another order", "features.json", {"number_names": ["amount", "age"]}),
        (
            "statistics of fewer columns",
            "features.json",
            {"means": features["means"][:1], "stds": features["stds"][:1]},
        ),
        ("one category less", "features.json", {"categories": [features["categories"][0][:-1]]}),
        ("one category more", "features.json", {"categories": [[*features["categories"][0], "z"]]}),
        ("labels of another model", "labels.json", {"names": ["0", "1", "2"]}),
    ):
        folder = tiny.without_manifest(shutil.copytree(trained() / "run", tmp_path / case))
        write_json(folder / name, {**read_json(folder / name), **changes})
        prediction_refuses(figures, case, table, [str(folder)], model=folder)
    for name in ("config.json", "model.safetensors"):
        folder = tiny.without_manifest(shutil.copytree(trained() / "run", tmp_path / f"another {name}"))
        shutil.copy(trained(3) / "run" / name, folder / name)
        prediction_refuses(figures, f"{name} of another model", table, [str(folder)], model=folder)
    return figures


# ---- D15: data that changed between start and restart ----

CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "one digit": lambda content: content[:-2] + (b"1\n" if content.endswith(b"0\n") else b"0\n"),
    "one row more": lambda content: content + content[content.rindex(b"\n", 0, -1) + 1 :],
    "one row less": lambda content: content[: content.rindex(b"\n", 0, -1) + 1],
    "another order": lambda content: b"\n".join([content.splitlines()[0], *content.splitlines()[:0:-1], b""]),
    "a line break of Windows": lambda content: content[:-1] + b"\r\n",
}


@row(
    "D15",
    "train, validation or test file changed between a run's start and its restart",
    "refused with the file's name, checkpoints unchanged; restored: the run ends like one that was not stopped",
)
def test_D15_changed_data(tmp_path: Path) -> Figures:
    figures = Figures()
    shutil.copytree(trained() / "encoder", tmp_path / "encoder")
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.csv").write_bytes(as_csv(rows_of(name)))
    config = write_config(tmp_path, tmp_path, max_epochs=2)
    train_run(figures, "first start", config)
    whole = (tmp_path / "run/model.safetensors").read_bytes()
    # as after a kill after step 8
    for name in ("model.safetensors", "train_results.json", "checkpoints/step-00000016"):
        shutil.rmtree(tmp_path / "run" / name) if "step" in name else (tmp_path / "run" / name).unlink()
    before = tiny.file_hashes(tmp_path / "run")
    for name in ("train", "val", "test"):
        path = tmp_path / f"{name}.csv"
        good = path.read_bytes()
        for case, change in CHANGES.items():
            path.write_bytes(change(good))
            assert path.read_bytes() != good
            for check in ("--check",), ():
                done = command("train", config, *check)
                count_refusal(
                    figures,
                    f"{name}.csv: {case}",
                    done,
                    f"{path} has changed since the checkpoint at step 8",
                    "sha256 ",
                )
            figures.count(tiny.file_hashes(tmp_path / "run") == before, f"{name}.csv: {case}: the run was changed")
        path.write_bytes(good)  # the same content at another time
    train_run(figures, "files restored", config)
    figures.count((tmp_path / "run/model.safetensors").read_bytes() == whole, "files restored: another model")
    return figures
