"""Memory of `mmbert predict` is bounded in bytes, also for compressed files that expand to gigabytes.

pytest -m fault tests/faults/test_reading_memory.py -s
"""

import gzip
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from tests.faults.inputs import trained
from tests.support import tiny

pytestmark = pytest.mark.fault
TEXT = ("refund pay outside the shop thanks " * 30_000)[:1_000_000]
HEADER = b"row_id,text,age,amount,kind\n"
MEASURE = """
import sys
from mmbert_core import cli
code = cli.main(["predict", *sys.argv[1:], "--num_threads", "1"])
[peak] = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print("peak", code, int(peak) // 1024)
"""


def predicted(source: Path, output: Path) -> tuple[int, int, str]:
    """Exit code, largest resident memory in MB and the last line of stderr of a process that scores `source`."""
    words = [sys.executable, "-c", MEASURE, str(trained() / "run"), str(source), str(output)]
    done = subprocess.run(words, cwd=tiny.ROOT, capture_output=True, text=True, timeout=300)
    name, code, peak = done.stdout.split()
    assert name == "peak", done.stderr
    return int(code), int(peak), done.stderr.splitlines()[-1]


def table_of(texts: list[str], **columns: list[str]) -> pyarrow.Table:
    count = len(texts)
    values = {
        "row_id": [str(row) for row in range(count)],
        "text": texts,
        "age": ["30"] * count,
        "amount": ["1"] * count,
        "kind": ["a"] * count,
    }
    return pyarrow.table(values | columns)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> int:
    """MB of a process that scores one short row."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "new.csv").write_bytes(HEADER + b"1,refund,30,1,a\n")
    code, peak, line = predicted(folder / "new.csv", folder / "out.tsv")
    assert code == 0, line
    return peak


def test_long_texts_take_no_more_memory_in_parquet_than_in_csv(tmp_path, base):
    (tmp_path / "new.csv").write_bytes(HEADER + b"".join(f"{row},{TEXT},30,1,a\n".encode() for row in range(300)))
    parquet.write_table(table_of([TEXT] * 300), tmp_path / "new.parquet")
    parquet.write_table(
        table_of([TEXT] * 300), tmp_path / "plain.parquet", use_dictionary=False, row_group_size=16, compression="zstd"
    )
    for name in ("new.csv", "new.parquet", "plain.parquet"):
        code, peak, line = predicted(tmp_path / name, tmp_path / f"{name}.tsv")
        assert code == 0 and peak < base + 250, (name, peak, base, line)
        assert (tmp_path / f"{name}.tsv").read_bytes() == (tmp_path / "new.csv.tsv").read_bytes(), name


def test_a_small_file_that_unpacks_to_gigabytes_does_not_fill_the_memory(tmp_path, base):
    parquet.write_table(table_of([TEXT] * 2500), tmp_path / "texts.parquet")
    parquet.write_table(table_of(["refund"] * 1000, kind=[TEXT] * 1000), tmp_path / "categories.parquet")
    for name in ("texts.parquet", "categories.parquet"):
        assert (tmp_path / name).stat().st_size < 1_000_000
        code, peak, line = predicted(tmp_path / name, tmp_path / "out.tsv")
        assert code == 0 and peak < base + 400, (name, peak, base, line)


def test_a_line_without_end_is_refused_before_it_is_in_memory(tmp_path, base):
    for name, start in (("line.csv.gz", HEADER), ("quote.csv.gz", HEADER + b'1,"'), ("line.jsonl.gz", b'{"text": "')):
        end = b"x\n" if name.startswith("quote") else b"xx"
        with gzip.open(tmp_path / name, "wb", compresslevel=1) as stream:
            stream.write(start)
            for _ in range(1000):
                stream.write(end * 500_000)
        code, peak, line = predicted(tmp_path / name, tmp_path / "out.tsv")
        assert code == 2 and peak < base + 700, (name, peak, base, line)
        assert line.startswith(f"error: {tmp_path / name} ") and (
            "expected lines of at most" in line or "expected cells of at most" in line
        ), line
