"""Scaling rules: by table, by measurement, and a check of the scaling that a model has."""

from __future__ import annotations

from fastfs.scaling.calibrate import calibrate
from fastfs.scaling.calibration import Calibration, GroupCalibration
from fastfs.scaling.rules import LayerScale, Rule, apply
from fastfs.scaling.tables import mlp, predicted_cos_angle, resnet

__all__ = [
    "Calibration",
    "GroupCalibration",
    "LayerScale",
    "Rule",
    "apply",
    "calibrate",
    "mlp",
    "predicted_cos_angle",
    "resnet",
]
