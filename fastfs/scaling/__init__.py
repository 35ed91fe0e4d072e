"""Scaling rules from tables, calibration by measurement, and a check of a model's scaling over width and depth."""

from __future__ import annotations

from fastfs.scaling._angle import predicted_cos_angle
from fastfs.scaling._calibrate import calibrate
from fastfs.scaling._calibration import Calibration, GroupCalibration
from fastfs.scaling._check import check, check_point
from fastfs.scaling._factory import FactoryError, Parts, load_factory
from fastfs.scaling._fit import Exponent, Status, fit_exponent
from fastfs.scaling._predicted import Prediction, predict
from fastfs.scaling._report import ScalingReport
from fastfs.scaling._rules import LayerScale, Rule, apply
from fastfs.scaling._tables import mlp, resnet
from fastfs.scaling._transfer import transfer
from fastfs.scaling._transfer_report import TransferReport

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
    "TransferReport",
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
    "transfer",
]


def __dir__() -> list[str]:
    return __all__
