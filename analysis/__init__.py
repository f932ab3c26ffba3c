"""Parquet to boards. Imports neither torch nor ray."""
