"""Scaling rules: by table, by measurement, and a check of the scaling that a model has."""

from __future__ import annotations

from fastfs.scaling.angle import predicted_cos_angle
from fastfs.scaling.calibrate import calibrate
from fastfs.scaling.calibration import Calibration, GroupCalibration
from fastfs.scaling.check import check, check_point
from fastfs.scaling.factory import FactoryError, Parts, load_factory
from fastfs.scaling.fit import Exponent, Status, fit_exponent
from fastfs.scaling.predicted import Prediction, predict
from fastfs.scaling.report import ScalingReport
from fastfs.scaling.rules import LayerScale, Rule, apply
from fastfs.scaling.tables import mlp, resnet

__all__ = [
    "Calibration",
    "Exponent",
    "FactoryError",
    "GroupCalibration",
    "LayerScale",
    "Parts",
    "Prediction",
    "Rule",
    "ScalingReport",
    "Status",
    "apply",
    "calibrate",
    "check",
    "check_point",
    "fit_exponent",
    "load_factory",
    "mlp",
    "predict",
    "predicted_cos_angle",
    "resnet",
]
