"""Campaigns: which settings of a defense are best, searched on the tuning split alone."""
