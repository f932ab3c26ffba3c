"""Defenses, one file per paper. A new one is a file and a line in this table."""

from __future__ import annotations

from collections.abc import Mapping

# name in a grid file -> module:class
DEFENSES: Mapping[str, str] = {
    "none": "defenses.controls:NoDefense",
    "finetune": "defenses.finetune:Finetune",
    "cleanclip": "defenses.cleanclip:CleanClip",
    "roclip": "defenses.roclip:RoClip",
    "safeclip": "defenses.safeclip:SafeClip",
    "abd": "defenses.abd:Abd",
    "ta_cleaner": "defenses.ta_cleaner:TaCleaner",
    "ubt": "defenses.ubt:Ubt",
    "cgd": "defenses.cgd:Cgd",
    "cgd_classifier": "defenses.cgd_classifier:CgdClassifier",
    "par": "defenses.par:Par",
    "local_outlier": "defenses.local_outlier:LocalOutlier",
    "abl": "defenses.abl:Abl",
    "anp": "defenses.anp:Anp",
    "fine_pruning": "defenses.fine_pruning:FinePruning",
    "neural_cleanse": "defenses.neural_cleanse:NeuralCleanse",
    "spectral_signatures": "defenses.spectral_signatures:SpectralSignatures",
    "clean_model": "defenses.controls:CleanModel",
    "clean_training": "defenses.controls:CleanTraining",
    "oracle_filter": "defenses.controls:OracleFilter",
    "partial_oracle": "defenses.controls:PartialOracle",
    "random_filter": "defenses.controls:RandomFilter",
    "same_budget_finetune": "defenses.controls:SameBudgetFinetune",
    "augment_only": "defenses.controls:AugmentOnly",
    "ubt_oracle": "defenses.ubt:UbtOracle",
}
