"""Small tables and a tiny WordPiece tokenizer for the tests of the data path."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

WORDS = """
    the a item seller buyer pay money back thanks late never arrived good bad price refund please hello order box
""".split()
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "b", "##b", "##s", "##ed", "!", ".", ","]

WriteTable = Callable[..., str]


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer, as a pretrained encoder has one."""
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(encoder_folder: str) -> PreTrainedTokenizerFast:
    from mmbert_core.data.tokens import load_tokenizer

    return load_tokenizer(encoder_folder)


@pytest.fixture
def write_table(tmp_path: Path) -> WriteTable:
    """write_table("a.csv", header, rows) -> path; a .tsv name gives tabs."""

    def write(name: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
        path = tmp_path / name
        with open(path, "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writerow(header)
            writer.writerows(rows)
        return str(path)

    return write
