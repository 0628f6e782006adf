"""CSV, TSV, JSONL and Parquet files, and frames -> rows of text cells. Knows the columns' roles, not their meaning.

Modules, each importing only those before it: cells, lines, csv_reader, parquet_reader, readers, table.
"""
