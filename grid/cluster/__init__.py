"""Stages on Ray. The driver owns the order, Ray owns the machines, the store owns the results.

A stage on one device is a Ray Train run in local mode inside a warm task; a stage on several is a
Train worker group started by a launcher task. Both run the same code.
"""
