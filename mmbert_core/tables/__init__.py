"""CSV, TSV, JSONL and Parquet files, data frames and dicts -> rows of text cells, with columns named by their roles.

Modules, each importing only those before it: cells, lines, csv_reader, parquet_reader, readers, table.
"""
