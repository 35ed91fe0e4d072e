"""Scaling rules from tables, calibration by measurement, and a check of a model's scaling over width and depth."""

from __future__ import annotations

from fastfs.scaling._angle import predicted_cos_angle
from fastfs.scaling._calibrate import calibrate
from fastfs.scaling._calibration import CalibratedGroup, Calibration
from fastfs.scaling._check import check, check_point
from fastfs.scaling._factory import FactoryError, Parts, load_factory
from fastfs.scaling._first_step import first_step
from fastfs.scaling._first_step_result import FirstStep, GroupCalibration
from fastfs.scaling._fit import Exponent, Status, fit_exponent
from fastfs.scaling._predicted import Prediction, predict
from fastfs.scaling._report import ScalingReport
from fastfs.scaling._rules import LayerScale, Rule, apply
from fastfs.scaling._tables import mlp, resnet
from fastfs.scaling._transfer import transfer
from fastfs.scaling._transfer_report import TransferReport
from fastfs.scaling._trials import Trial

__all__ = [
    "CalibratedGroup",
    "Calibration",
    "Exponent",
    "FactoryError",
    "FirstStep",
    "GroupCalibration",
    "LayerScale",
    "Parts",
    "Prediction",
    "Rule",
    "ScalingReport",
    "Status",
    "TransferReport",
    "Trial",
    "apply",
    "calibrate",
    "check",
    "check_point",
    "first_step",
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
