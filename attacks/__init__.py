"""Attacks, one file per paper. A new one is a file and a line in this table."""

from __future__ import annotations

from collections.abc import Mapping

# name in a grid file -> module:class
ATTACKS: Mapping[str, str] = {
    "badnet": "attacks.badnet:BadNet",
    "blended": "attacks.blended:Blended",
    "sig": "attacks.sig:Sig",
    "wanet": "attacks.wanet:WaNet",
    "label_consistent": "attacks.label_consistent:LabelConsistent",
    "badnet_stripes": "attacks.structured_triggers:BadNetStripes",
    "blended_stripes": "attacks.structured_triggers:BlendedStripes",
    "blended_triangles": "attacks.structured_triggers:BlendedTriangles",
    "blended_text": "attacks.structured_triggers:BlendedText",
    "adaptive_blend": "attacks.adaptive_blend_patch:AdaptiveBlend",
    "adaptive_patch": "attacks.adaptive_blend_patch:AdaptivePatch",
    "ssba": "attacks.ssba:Ssba",
    "bpp": "attacks.frequency:Bpp",
    "ctrl": "attacks.frequency:Ctrl",
    "ftrojan": "attacks.frequency:FTrojan",
    "stripe_labels": "attacks.clean_image:StripeLabels",
    "flip_labels": "attacks.clean_image:FlipLabels",
    "badclip": "attacks.badclip:BadClip",
    "trojvqa": "attacks.trojvqa:TrojVqa",
    "trojvqa_optimised": "attacks.trojvqa:TrojVqaOptimised",
    "carlini_terzis": "attacks.targeted_poisoning:CarliniTerzis",
    "targeted_poisoning": "attacks.targeted_poisoning:TargetedPoisoning",
    "mmpoison": "attacks.mmpoison:MmPoison",
    "label_consistent_adversarial": "attacks.classifier_extras:LabelConsistentAdversarial",
    "trojannn": "attacks.classifier_extras:TrojanNN",
    "narcissus": "attacks.classifier_extras:Narcissus",
    "input_aware": "attacks.classifier_extras:InputAware",
    "toxic_text": "attacks.toxic_text:ToxicText",
    "toxic_pairing": "attacks.toxic_text:ToxicPairing",
}
