"""All figures, by name."""

from __future__ import annotations

from collections.abc import Mapping

from fastfs._reproduce.paper import angles, decomposition, drawing, exponents, sensitivity, spectral, transformer
from fastfs._reproduce.paper.study import Study

__all__ = ["STUDIES"]

_STUDIES = (
    Study(
        "a",
        "Angle against layer",
        "Backward-feature angle at initialization after every layer of a ReLU ResNet, for five branch scales. Mean and "
        "standard deviation over seeds.",
        angles.against_layer,
        drawing.draw_layer,
    ),
    Study(
        "b",
        "Output angle against depth",
        "Angle after the last layer. Only branch scales proportional to 1/sqrt(L) have an angle that is neither 0 nor "
        "pi/2 at large depth. Bars: standard deviation over seeds.",
        angles.against_depth,
        drawing.draw_depth,
    ),
    Study(
        "c",
        "Output angle against branch scale",
        "Angle after the last layer over c = sqrt(L) beta: one curve for all depths. Dotted: spectral prediction "
        "for infinite width if the active units of the layers were independent of each other.",
        angles.against_scale,
        drawing.draw_scale,
    ),
    Study(
        "d",
        "Components of a feature update",
        "Two ways to split the feature update of every layer. By origin: the part due to the layer's own matrix, which "
        "is exactly along -b, and the part carried over from the layer below. By direction: along -b, and "
        "orthogonal to it. No numbers are published; the aligned part is checked against the feature speed formula.",
        decomposition.decompose,
        drawing.draw_decomposition,
    ),
    Study(
        "e",
        "Sensitivity against depth",
        "Movement of the last hidden features (after the ReLU of an MLP) per decrease of the loss, all matrices "
        "trained, width 400. Bars: quartiles over seeds. With NTK scaling the residual can be near 0: "
        "its median is shown.",
        sensitivity.against_depth,
        drawing.draw_sensitivity,
    ),
    Study(
        "f",
        "The tail at large branch scale",
        "Cosine of the output angle for large c = sqrt(L) beta at depth L >= 10 c^2. Conjecture: 1/c. Bars: standard "
        "deviation over seeds; the interval of the exponent is at 95 %.",
        exponents.resnet_tail,
        drawing.draw_tail,
    ),
    Study(
        "g",
        "The exponent of MLPs",
        "Cosine at every layer of a ReLU MLP, fitted from layer 10 on; 1/sqrt(l) is expected. The band is the standard "
        "deviation over seeds, the interval of the exponent is at 95 %.",
        exponents.mlp_layers,
        drawing.draw_mlp_exponent,
    ),
    Study(
        "h",
        "The angle predicted from the spectrum",
        "M1/sqrt(M2) of the densely formed backward-to-feature kernel beside the measured angle and, for one seed, the "
        "same from random probes of the kernel as an operator (two standard errors).",
        spectral.predicted_against_measured,
        drawing.draw_spectral,
    ),
    Study(
        "i",
        "Transformer: angle over depth",
        "Beyond the paper: angle of the residual stream of a pre-norm transformer at initialization, on text, for two "
        "scales of the residual branches; the parameters of the blocks move with the automatic learning rates.",
        transformer.over_depth,
        drawing.draw_transformer,
    ),
    Study(
        "j",
        "Transformer: angle through training",
        "Beyond the paper: angle of the actual AdamW steps (warm-up over 20 steps) in the training of a transformer "
        "on text, measured by the monitor.",
        transformer.through_training,
        drawing.draw_training,
    ),
)
STUDIES: Mapping[str, Study] = {study.name: study for study in _STUDIES}
