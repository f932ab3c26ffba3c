"""YAML to cells to plan to Ray to rows. Importing this package imports nothing heavy."""
