"""Fixtures of the data path."""

from tests.support.table_fixtures import encoder_folder, tokenizer, write_table

__all__ = ["encoder_folder", "tokenizer", "write_table"]
