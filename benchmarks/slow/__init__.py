"""Stamps one picture at a time in numpy: what the batched ones are tested and timed against."""
