"""Documents and what generates their tables and pictures."""
