"""Adapters for code that was written for torch hub's or timm's DINOv2 models.

shared  the attributes of the patch embedding, and loading
meta    `HubModel`: the models of torch hub, which `hubconf.py` returns, and Meta's linear classifiers
timm    `TimmModel`: the models of timm

Both adapters are this project's backbone with the same parameters under Meta's names, so they load and save the same
weights as the backbone.
"""

from model.hub.meta import HubModel, LinearClassifier, backbone_entry, classifier_entry, hub_model
from model.hub.timm import TimmModel, timm_model

__all__ = [
    "HubModel",
    "LinearClassifier",
    "TimmModel",
    "backbone_entry",
    "classifier_entry",
    "hub_model",
    "timm_model",
]
