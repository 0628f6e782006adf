"""JSON files of a real model folder and checkpoint, changed at random with fixed seeds.

Each change is refused in one line, or accepted without changing a prediction.
"""

import copy
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mmbert_core.config import FREE_ON_RESUME, Config
from mmbert_core.data.cache import META, is_complete
from mmbert_core.inference.model_files import check_complete, check_manifest, read_decision, read_settings
from mmbert_core.inference.model_folder import LoadedModel, load_model_folder
from mmbert_core.predictor import Predictor
from mmbert_core.report.model_card import read_summary, render_card
from mmbert_core.report.run_sections import training_section
from mmbert_core.runtime.errors import InputError, RunError
from mmbert_core.runtime.versions import VERSIONS
from mmbert_core.storage.manifest import MANIFEST
from mmbert_core.training.checkpoint import read_checkpoint, train_state_from, why_invalid
from mmbert_core.training.resume import check_resumable
from mmbert_core.training.run_folder import RESULTS, already_finished
from mmbert_core.training.saved_state import check_progress, check_run_state, check_schedule
from tests.support import tiny

MAX_SECONDS = 20.0  # of one file
HOSTILE: list[Any] = [None, True, False]
HOSTILE += [0, -1, 1, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.5, 1e300, float("inf"), float("nan")]
HOSTILE += ["", "a", "\0", "é\u0301", "\ud800", "../../x", "x" * 5000, [], {}, [[]], [None], ["0", "0"]]
HOSTILE += [{"a": None}, {"": {"": []}}, "1", "null", [0.1] * 3]
Loader = Callable[[], Any]  # returns what it read, or raises InputError or RunError


# ---- changes of a file ----


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Keys that lead to every value within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for key, item in items for inner in paths_in(item, (*path, key)))]


def with_value_changed(value: Any, generator: random.Random) -> Any:
    """Another value at a random path, a key or entry removed, added or duplicated, or another order."""
    value = copy.deepcopy(value)
    path = generator.choice(paths_in(value)[1:] or [()])
    if not path:
        return generator.choice(HOSTILE)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    how = generator.randrange(6)
    if how == 0:
        del parent[path[-1]]
    elif how == 1 and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[path[-1]]))
    elif how == 1:
        parent[generator.choice(("x", "", "format_version", "names", "é"))] = parent[path[-1]]
    elif how == 2 and isinstance(parent, list):
        parent.reverse()
    elif how == 3 and isinstance(parent[path[-1]], (int, float)):
        parent[path[-1]] = parent[path[-1]] * generator.choice((-1, 2, 0.5, 10, 1e200)) + generator.choice((0, 1, -1))
    else:
        parent[path[-1]] = generator.choice(HOSTILE)
    return value


def with_bytes_changed(content: bytes, generator: random.Random) -> bytes:
    """Flipped bits, a truncation, repeated bytes, deep nesting, a duplicate key, a long number, bytes not in UTF-8."""
    start, end = sorted(generator.randrange(len(content) + 1) for _ in range(2))
    how = generator.randrange(7)
    if how == 0:
        changed = bytearray(content)
        for _ in range(generator.randint(1, 4)):
            changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        return bytes(changed)
    nested = generator.choice((b"[" * 100_000, b'{"a":' * 5000, b"[" * 60 + b"]" * 60))
    return {
        1: content[:start],
        2: content[:end] + content[start:],
        3: content[:start] + nested + content[end:],
        4: content.replace(b"{", b'{"step": 1, "step": 2, ', 1),
        5: content[:start] + b"9" * generator.choice((20, 400, 10_000)) + content[start:],
        6: content[:start]
        + generator.choice((b"\xff", b"\xef\xbb\xbf", b"\\ud800", b"NaN", b"1e999"))
        + content[start:],
    }[how]


def changed(content: bytes, generator: random.Random) -> bytes:
    if generator.random() < 0.4 or not content.strip():
        return with_bytes_changed(content, generator)
    if content.count(b"\n{") > 0:  # JSON lines: one of them
        lines = content.splitlines(keepends=True)
        index = generator.randrange(len(lines))
        lines[index] = changed(lines[index].strip(), generator) + b"\n"
        return b"".join(lines)
    return json.dumps(with_value_changed(json.loads(content), generator), ensure_ascii=generator.random() < 0.5).encode(
        "utf-8", "surrogatepass"
    )


# ---- a run and the readers of its files ----


class HostileRun:
    """A finished tiny run, a copy of its model folder, and for each JSON file a function that reads it completely."""

    def __init__(self, folder: Path) -> None:
        self.config = Config(**tiny.settings(folder, num_rows=32, max_epochs=1, cache_path=None))
        tiny.train(self.config)
        self.run = Path(self.config.model_path)
        self.model = shutil.copytree(
            self.run,
            folder / "model",
            ignore=shutil.ignore_patterns("checkpoints", "cache", "tensorboard", "multimodal_bert-*"),
        )
        self.loaded: LoadedModel = load_model_folder(self.model)
        self.checkpoint = next((self.run / "checkpoints").glob("step-*"))
        self.state = json.loads((self.checkpoint / "state.json").read_text())
        self.store = next(path.parent for path in (self.run / "cache").glob(f"*/{META}"))
        self.rows = [
            {"text": "refund pay outside", "age": "40", "amount": "2.5", "kind": "a"},
            {"text": "", "age": "", "amount": "", "kind": "?"},
        ]
        self.expected = Predictor.from_folder(self.model).predict(self.rows)
        self.old = (self.model / MANIFEST).read_bytes()

    def files(self) -> dict[Path, Loader]:
        settings = ("config.json", "features.json", "labels.json", "thresholds.json", "baselines.json")
        return {
            **{self.model / name: self.read_model for name in settings},
            self.model / MANIFEST: self.read_model,
            self.model / "summary.json": self.read_card,
            self.checkpoint / "state.json": self.read_state,
            self.checkpoint / MANIFEST: lambda: why_invalid(self.checkpoint),
            self.run / RESULTS: lambda: already_finished(self.config),
            self.run / "metrics.jsonl": lambda: training_section(self.run),
            self.store / META: lambda: is_complete(self.store),
        }

    def read_model(self) -> Any:
        """Everything of a model folder except the encoder and the weights."""
        check_complete(self.model)
        check_manifest(self.model)
        settings = read_settings(self.model)
        return settings, read_decision(self.model, settings)

    def read_card(self) -> Any:
        return render_card("name", self.loaded, read_summary(self.model))

    def read_state(self) -> Any:
        found = read_checkpoint(self.checkpoint).state
        check_run_state(found)
        check_resumable(
            found,
            config=self.config.to_dict(),
            fingerprints=self.state["fingerprints"],
            parameters=self.state["parameters"],
            versions=VERSIONS,
            free_keys=FREE_ON_RESUME,
        )
        check_progress(found, num_rows=32, batch_size=self.config.batch_size)
        check_schedule(found["scheduler"], num_groups=len(self.state["scheduler"]["base_lrs"]))
        return asdict(train_state_from(found))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> HostileRun:
    return HostileRun(tmp_path_factory.mktemp("hostile"))


def outcome(load: Loader, case: str, problems: list[str]) -> tuple[str, Any]:
    """ "refused" or "accepted", and what was read; other errors, long messages and long times are problems."""
    started = time.perf_counter()
    try:
        found: tuple[str, Any] = ("accepted", load())
    except (InputError, RunError) as error:
        found = ("refused", str(error))
        if "\n" in str(error) or len(str(error)) > 1500:
            problems.append(f"{case}: a message of {len(str(error))} characters: {str(error)[:200]!r}")
    except Exception as error:
        found = ("broken", None)
        problems.append(f"{case}: {type(error).__name__}: {str(error)[:200]}")
    if (seconds := time.perf_counter() - started) > MAX_SECONDS:
        problems.append(f"{case}: {seconds:.0f} s")
    return found


def is_same(content: bytes, other: bytes) -> bool:
    """Whether two texts hold the same JSON value."""
    try:
        return json.dumps(json.loads(content)) == json.dumps(json.loads(other))
    except (ValueError, RecursionError):
        return False


def count_mutations(run: HostileRun, seeds: range) -> Counter[str]:
    """Each seed changes one file of the folder, with its manifest or, as older versions wrote it, without one."""
    files, problems, counts = run.files(), [], Counter()
    for seed in seeds:
        generator = random.Random(seed)
        path = generator.choice(sorted(files))
        content, has_manifest = path.read_bytes(), generator.random() < 0.3
        if not has_manifest and path.name != MANIFEST:
            (run.model / MANIFEST).unlink(missing_ok=True)
        mutated = changed(content, generator)
        path.write_bytes(mutated)
        case = f"seed {seed}, {path.relative_to(run.run.parent)}, {'with' if has_manifest else 'without'} manifest"
        result, _ = outcome(files[path], case, problems)
        counts[result] += 1
        is_protected = path.parent == run.model and path.name not in (MANIFEST, "summary.json")
        if is_protected and has_manifest and result == "accepted" and mutated != content:
            problems.append(f"{case}: a changed file was accepted")
        if path == run.model / MANIFEST and result == "accepted" and not is_same(mutated, content):
            problems.append(f"{case}: a changed manifest was accepted")
        path.write_bytes(content)
        (run.model / MANIFEST).write_bytes(run.old)
    assert not problems, f"{len(problems)} problems of {len(seeds)}:\n" + "\n".join(problems[:20])
    return counts


def test_a_thousand_changed_files(hostile):
    counts = count_mutations(hostile, range(1000))
    assert counts["refused"] > 500 and counts["broken"] == 0


@pytest.mark.fault
def test_ten_thousand_changed_files(hostile):
    counts = count_mutations(hostile, range(1000, 11_000))
    assert counts["refused"] > 5000 and counts["broken"] == 0


def count_whole_loads(run: HostileRun, seeds: range) -> Counter[str]:
    """The whole Predictor: with the manifest no prediction changes; without it a change is refused or predicts."""
    encoder = [run.model / "encoder" / name for name in ("config.json", "tokenizer.json", "tokenizer_config.json")]
    own = [path for path in run.files() if path.parent == run.model]
    paths, problems, counts = [*encoder, *own, run.model / "model.safetensors"], [], Counter()
    for seed in seeds:
        generator = random.Random(seed)
        path = generator.choice(sorted(paths))
        content, has_manifest = path.read_bytes(), generator.random() < 0.5
        if not has_manifest and path.name != MANIFEST:
            (run.model / MANIFEST).unlink()
        is_json = path.suffix == ".json"
        path.write_bytes(changed(content, generator) if is_json else with_bytes_changed(content, generator))
        case = f"seed {seed}, {path.relative_to(run.model)}, {'with' if has_manifest else 'without'} manifest"
        result, found = outcome(lambda: Predictor.from_folder(run.model).predict(run.rows), case, problems)
        counts[result] += 1
        if result == "accepted" and (has_manifest or path.name in (MANIFEST, "summary.json")) and found != run.expected:
            problems.append(f"{case}: another prediction, silently")
        path.write_bytes(content)
        (run.model / MANIFEST).write_bytes(run.old)
    assert not problems, f"{len(problems)} problems of {len(seeds)}:\n" + "\n".join(problems[:20])
    return counts


def test_whole_folders_with_a_changed_file(hostile):
    assert count_whole_loads(hostile, range(40))["refused"] > 20


@pytest.mark.fault
def test_hundreds_of_whole_folders_with_a_changed_file(hostile):
    assert count_whole_loads(hostile, range(100, 400))["refused"] > 150
