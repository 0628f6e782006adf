"""The cache: the same arrays as in memory, built once, found again, never used when incomplete."""

import fcntl
import json
import os
import subprocess
import sys
from dataclasses import replace
from mmap import mmap
from pathlib import Path

import numpy as np
import pytest

from mmbert_core.data import cache, dataset
from mmbert_core.data.cache import META, open_or_build_cache
from mmbert_core.data.encoding import encode_chunk
from mmbert_core.data.features import Features
from mmbert_core.data.labels import Labels
from mmbert_core.data.tokens import characters_read
from mmbert_core.runtime.errors import InputError, RunError
from mmbert_core.tables.table import Roles, read_chunks

HEADER = ["id", "text", "more", "price", "kind", "y", "g"]
ROLES = Roles(text=("text", "more"), numbers=("price",), categories=("kind",), label="y", id="id", group="g")
ODD_IDS = ["007", "NA", "=1+1", "a\tb", "line\nbreak", "line\r\nbreak", "", "007", "漢", "x" * 300, "1e5"]


def table(num_rows, seed=0):
    generator = np.random.default_rng(seed)
    words = ["item", "late", "refund", "please", "\n", "unknown"]
    return [
        (
            ODD_IDS[row % len(ODD_IDS)],
            " ".join(generator.choice(words, size=generator.integers(0, 40))),
            generator.choice(["", "hello"]),
            generator.choice(["", "1.5", "1e5"]),
            generator.choice(["", "a", "b", f"c{row}"]),
            generator.choice(["0", "1"]),
            f"g{row % 5}",
        )
        for row in range(num_rows)
    ]


@pytest.fixture
def build(tmp_path, tokenizer):
    def build(paths, *, roles=ROLES, **options):
        options = {"max_length": 8, "max_chunks": 3, "cache_path": tmp_path / "cache"} | options
        return open_or_build_cache(
            [str(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)], roles, tokenizer, **options
        )

    return build


def stores_of(cache):
    return sorted(path.name for path in Path(cache).iterdir() if path.suffix != ".lock")


def test_a_cache_built_in_chunks_equals_the_rows_in_memory(build, tokenizer, write_table):
    paths = [write_table("one.csv", HEADER, table(25)), write_table("two.tsv", HEADER, table(18, seed=1))]
    seen = []
    stored = build(paths, chunk_rows=7, progress=seen.append)
    assert seen == [7, 14, 21, 28, 35, 42, 43]
    [chunk] = read_chunks(paths, HEADER)
    memory = encode_chunk(chunk, ROLES, tokenizer, max_length=8, max_chunks=3)
    assert stored.num_rows == memory.num_rows == 43 and stored.num_truncated == memory.num_truncated > 0
    assert stored.vocabularies == memory.vocabularies and stored.label_values == memory.label_values
    names = ["numbers", "category_codes", "label_codes", "group_codes", "file_index", "file_rows", "lines"]
    for name in names:
        assert np.array_equal(getattr(stored, name), getattr(memory, name), equal_nan=name == "numbers"), name
        assert getattr(stored, name).dtype == getattr(memory, name).dtype, name
    for name in ("ids", "chunk_offsets", "row_chunks"):
        assert np.array_equal(getattr(stored.tokens, name), getattr(memory.tokens, name)), name
    assert stored.ids.take(np.arange(43)) == chunk.cells["id"]
    assert [stored.row_location(row) for row in range(43)] == [chunk.row_location(row) for row in range(43)]
    empty = stored.id_codes < 0  # an empty id equals no other
    assert empty.sum() == chunk.cells["id"].count("") and len(set(stored.id_codes[empty].tolist())) == empty.sum()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("roles", [ROLES, replace(ROLES, id="text"), replace(ROLES, group="text")])
def test_long_texts_are_truncated_while_reading_and_nothing_else_changes(
    build, write_table, tokenizer, roles, side, monkeypatch
):
    """Token ids and the number of truncated texts are those of whole cells."""
    monkeypatch.setattr(tokenizer, "truncation_side", side)
    most = characters_read(8, 3)
    lengths = [0, 1, most - 1, most, most + 1, most + 2, 3 * most]
    texts = [("x" * length, "", "y" * length, "a " * length)[row % 4] for length in lengths for row in range(4)]
    rows = [
        (f"i{row}", text, other, "1", "a", "1", "g")
        for row, (text, other) in enumerate((a, b) for a in texts for b in texts)
    ]
    path = write_table("t.csv", HEADER, rows)
    [chunk] = read_chunks([path], HEADER)
    whole, stored = encode_chunk(chunk, roles, tokenizer, max_length=8, max_chunks=3), build(path, roles=roles)
    assert 0 < whole.num_truncated == stored.num_truncated < len(rows)
    for name in ("ids", "chunk_offsets", "row_chunks"):
        assert np.array_equal(getattr(whole.tokens, name), getattr(stored.tokens, name)), name
    positions = np.arange(len(rows))
    assert whole.ids.take(positions) == stored.ids.take(positions) and np.array_equal(
        whole.group_codes, stored.group_codes
    )


def test_arrays_are_mapped_not_read(build, write_table):
    rows = build(write_table("t.csv", HEADER, table(20)))
    for array in (rows.numbers, rows.tokens.ids, rows.ids.data, rows.label_codes):
        assert not array.flags.writeable
        while isinstance(array, np.ndarray):
            array = array.base
        assert isinstance(array.obj, mmap)  # the buffer's owner


def test_texts_are_the_same_after_their_pages_were_released(build, write_table):
    rows = build(write_table("t.csv", HEADER, table(20)))
    before = rows.tokens.ids.tolist()
    rows.release_token_pages()
    assert rows.tokens.ids.tolist() == before and before


def resident_kb(array):
    """Resident kilobytes of the mapping that begins at the array's address (proc(5), smaps)."""
    _, _, after = open("/proc/self/smaps").read().partition(f"{array.__array_interface__['data'][0]:x}-")
    return int(after.partition("Rss:")[2].split()[0])


@pytest.mark.parametrize(("max_rows", "all_stay"), [(60, False), (10**9, True)])
def test_pages_of_texts_are_released(build, write_table, monkeypatch, max_rows, all_stay):
    monkeypatch.setattr(dataset, "MAX_ROWS_IN_MEMORY", max_rows)
    rows = build(
        write_table("t.csv", HEADER, [(f"i{row}", "good " * 2000, "", "1", "a", "1", "g") for row in range(1200)]),
        max_length=2048,
    )
    features, labels = Features.fit(rows.numbers, rows.category_codes, rows.vocabularies, ROLES), Labels(("1",))
    whole = dataset.Dataset(rows, None, features, labels, pad_token_id=0, name="train", require_labels=False)
    resident = []
    for start in range(0, len(whole), 20):
        whole.batch(np.arange(start, start + 20))
        resident.append(resident_kb(rows.tokens.ids))
    assert (max(resident) > rows.tokens.ids.nbytes / 1024 - 4) is all_stay  # the system maps up to 2 MB around a text


def test_a_second_start_does_not_read_the_rows_again(build, write_table, monkeypatch):
    path = write_table("t.csv", HEADER, table(20))
    first = build(path)
    monkeypatch.setattr(cache, "read_chunks", lambda *a, **k: pytest.fail("read again"))
    second = build(path)
    assert np.array_equal(first.tokens.ids, second.tokens.ids)
    assert (
        second.fingerprints[path]["bytes"] == os.path.getsize(path) and len(second.fingerprints[path]["sha256"]) == 64
    )


def test_the_same_content_elsewhere_keeps_its_own_name_in_messages(build, write_table):
    first, second = write_table("one.csv", HEADER, table(5)), write_table("two.csv", HEADER, table(5))
    assert build(first).row_location(0).startswith(f"{first} row 1")
    assert build(second).row_location(0).startswith(f"{second} row 1")


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 9},
        {"max_chunks": 2},
        {"roles": Roles(("more", "text"), ("price",), ("kind",), "y", "id", "g")},
        {"roles": Roles(("text", "more"), (), ("price", "kind"), "y", "id", "g")},
        {"roles": Roles(("text", "more"), ("price",), ("kind",), None, "id", "g")},
    ],
)
def test_other_settings_are_another_cache(build, write_table, tmp_path, change):
    path = write_table("t.csv", HEADER, table(10))
    build(path)
    build(path, **change)
    assert len(stores_of(tmp_path / "cache")) == 2


def test_changed_content_is_another_cache(build, write_table, tmp_path):
    rows = table(10)
    before = build(write_table("t.csv", HEADER, rows))
    rows[3] = ("changed", *rows[3][1:])
    path = write_table("t.csv", HEADER, rows)
    os.utime(path, ns=(0, 0))
    after = build(path)
    assert after.ids.take(np.array([3])) == ["changed"] and before.ids.take(np.array([3])) == [table(10)[3][0]]
    assert len(stores_of(tmp_path / "cache")) == 2


def test_an_optional_label_is_there_or_not(build, write_table):
    roles = Roles(("text", "more"), ("price",), ("kind",), "y", "id", None)
    without = write_table("u.csv", HEADER[:5], [row[:5] for row in table(4)])
    assert build(without, roles=roles, label_optional=True).label_codes is None
    with pytest.raises(InputError, match="u.csv: column 'y' not found"):  # although that cache exists now
        build(without, roles=roles)
    path = write_table("t.csv", HEADER, table(4))
    assert build(path, roles=roles, label_optional=True).label_codes is not None


def test_a_header_alone_is_a_cache_without_rows(build, write_table):
    rows = build(write_table("t.csv", HEADER, []))
    assert rows.num_rows == 0 and rows.numbers.shape == (0, 1) and rows.label_codes.shape == (0,)
    assert rows.tokens.row_chunks.tolist() == [0] and rows.vocabularies == [[""]] and rows.ids.take(np.arange(0)) == []


def test_columns_only_needs_no_tokenizer(write_table, tmp_path):
    path = write_table("t.csv", HEADER, table(4))
    roles = Roles((), ("price",), ("kind",), "y", None, None)
    rows = open_or_build_cache([path], roles, None, max_length=8, max_chunks=1, cache_path=tmp_path / "cache")
    assert rows.tokens is None and rows.ids is None and rows.numbers.shape == (4, 1)


def test_a_failed_build_leaves_nothing(build, write_table, tmp_path):
    rows = table(30)
    rows[20] = (*rows[20][:3], "cheap", *rows[20][4:])
    with pytest.raises(InputError, match=r"t.csv row 21 \(line \d+\), column 'price': .* found 'cheap'"):
        build(write_table("t.csv", HEADER, rows), chunk_rows=10)
    assert stores_of(tmp_path / "cache") == []


def test_a_file_that_changes_while_it_is_read(build, write_table, tmp_path):
    path = write_table("t.csv", HEADER, table(30))

    def touch(rows_done):
        os.utime(path, ns=(0, 0))

    with pytest.raises(InputError, match="t.csv: the file changed while it was read"):
        build(path, chunk_rows=10, progress=touch)
    assert stores_of(tmp_path / "cache") == []


BUILDER = """
import os, sys, time
from mmbert_core.data.cache import open_or_build_cache
from mmbert_core.tables.table import Roles
from mmbert_core.data.tokens import load_tokenizer
path, cache, encoder, mode = sys.argv[1:]
roles = Roles(("text", "more"), ("price",), ("kind",), "y", "id", "g")
def progress(rows_done):
    print("built", rows_done, flush=True)
    if mode == "die" and rows_done >= 20:
        os._exit(9)
    time.sleep(0.05 if mode == "slow" else 0)
settings = dict(max_length=8, max_chunks=3, cache_path=cache, chunk_rows=10, progress=progress)
rows = open_or_build_cache([path], roles, load_tokenizer(encoder), **settings)
print("opened", rows.num_rows, int(rows.tokens.ids.sum()), flush=True)
"""


def start(path, cache, encoder, mode):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BUILDER, path, str(cache), encoder, mode]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_that_start_together_build_once(write_table, tmp_path, encoder_folder):
    path = write_table("t.csv", HEADER, table(60))
    outputs = [
        process.communicate(timeout=60)
        for process in [start(path, tmp_path / "cache", encoder_folder, "slow") for _ in range(2)]
    ]
    lines = [output.split("\n") for output, _ in outputs]
    assert sum("built 60" in some for some in lines) == 1, outputs
    assert lines[0][-2] == lines[1][-2] and lines[0][-2].startswith("opened 60 ")
    assert len(stores_of(tmp_path / "cache")) == 1


def test_a_killed_build_is_not_used_and_is_removed_by_the_next(build, write_table, tmp_path, encoder_folder):
    path = write_table("t.csv", HEADER, table(60))
    process = start(path, tmp_path / "cache", encoder_folder, "die")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 9 and "opened" not in output
    [left] = stores_of(tmp_path / "cache")
    assert left.startswith(".tmp-")
    rows = build(path)
    assert rows.num_rows == 60
    [name] = stores_of(tmp_path / "cache")
    assert not name.startswith(".tmp-")


def test_without_locks_a_cache_is_built_all_the_same(build, write_table, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = write_table("t.csv", HEADER, table(9))
    assert build(path).num_rows == build(path).num_rows == 9
    assert [message for message in caplog.messages if "no locks (Function not implemented)" in message]


@pytest.mark.parametrize("damage", ["cut", "remove", "no meta", "bad meta"])
def test_a_damaged_cache_is_built_again(build, write_table, tmp_path, damage):
    path = write_table("t.csv", HEADER, table(20))
    expected = np.array(build(path).tokens.ids)
    [folder] = [tmp_path / "cache" / name for name in stores_of(tmp_path / "cache")]
    if damage == "cut":
        os.truncate(folder / "token_ids.bin", 8)
    elif damage == "remove":
        (folder / "numbers.bin").unlink()
    elif damage == "no meta":
        (folder / META).unlink()
    else:
        (folder / META).write_text("{")
    assert np.array_equal(build(path).tokens.ids, expected)
    assert json.loads((folder / META).read_text())["num_cut"] > 0


@pytest.mark.parametrize("read", ("batch", "token_ids", "columns", "cells", "ids", "label_strings"))
@pytest.mark.parametrize("name", ("token_ids", "numbers", "id_bytes"))
def test_a_file_that_is_truncated_while_it_is_in_use_is_one_line(build, write_table, tmp_path, read, name):
    """Reading behind the end would be a bus error. The next start builds the cache again."""
    path = write_table("one.csv", HEADER, table(25))
    rows = build(path)
    labels = Labels(("0", "1"))
    features = Features.fit(rows.numbers, rows.category_codes, rows.vocabularies, ROLES)
    data = dataset.Dataset(rows, None, features, labels, pad_token_id=0, name="train")
    getattr(data, read)([3, 24])
    [file] = tmp_path.glob(f"cache/*/{name}.bin")
    expected = file.stat().st_size
    os.truncate(file, 1)
    problem = f"this file of the cache was truncated while it was in use: expected {expected} bytes, found 1"
    with pytest.raises(RunError, match=f"{name}.bin: {problem}; start again"):
        getattr(data, read)([3, 24])
    again = build(path)
    assert file.stat().st_size == expected and again.num_rows == 25
