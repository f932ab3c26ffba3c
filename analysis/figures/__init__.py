"""Figures of a grid's results for a paper: a function per figure, from a frame to a picture.

Shares are 0 to 1 in frames and percent in pictures. A figure is as wide as a column where its
panels fit, else as wide as a page. A defense has one look in all figures that are given the same
``order``; the undefended victim is black with a star.
"""

from __future__ import annotations

from analysis.figures.curves import detection, profile, training
from analysis.figures.heat import heat_map
from analysis.figures.pictures import Stamped, feature_map, gallery
from analysis.figures.ranks import rank_plot
from analysis.figures.rates import rate_curves
from analysis.figures.scatter import cost, trade_off
from analysis.theme import Drawn, NothingToDraw, draw_all

__all__ = [
    "Drawn",
    "NothingToDraw",
    "Stamped",
    "cost",
    "detection",
    "draw_all",
    "feature_map",
    "gallery",
    "heat_map",
    "profile",
    "rank_plot",
    "rate_curves",
    "trade_off",
    "training",
]
