"""Tables of scaling rules for ReLU MLPs and ResNets: initial standard deviations and learning rates of SGD.

The learning rates follow from two desiderata, balanced contributions and a first-order loss decrease D,

    lr_l = D / (n |g_l|^2)        for each of the n matrices,

with |g_l| at initialization, for one row and a residual |dLoss/df_L| of 1. The output's standard deviation determines
how far the features move: by the feature speed formula rms(df) = D / (sqrt(m) |b| cos(theta)).
"""

from __future__ import annotations

import math

from fastfs.scaling._angle import predicted_cos_angle
from fastfs.scaling._rules import LayerScale, Rule

__all__ = ["MLP_SCHEMES", "RESNET_SCHEMES", "mlp", "resnet"]

MLP_SCHEMES = ("standard", "ntk", "mup", "fsc")
RESNET_SCHEMES = ("standard", "ntk", "mup", "fsc")
_INPUTS = ("dense", "sparse")


def mlp(
    depth: int,
    width: int,
    in_dim: int,
    out_dim: int = 1,
    *,
    scheme: str = "fsc",
    input: str = "dense",
    decrease: float = 1.0,
) -> Rule:
    r"""Return the rule for a ReLU MLP ``f_1 = U x``, ``f_l = V_l relu(f_{l-1})``, output ``f_L = W relu(f_{L-1})``.

    Entries of U have std 1/|x|, those of V sqrt(2/m), so that rms(f_l) = 1 in every hidden layer. Consider one row and
    residual r = dLoss/df_L with |r| = 1. Half of the units are active, so

        |b_{L-1}|^2 = std_W^2 m/2,  and |b_l| is the same in all hidden layers (a factor of 2 of V, 1/2 of the ReLU);
        |g_1|^2 = |b|^2 |x|^2,   |g_l|^2 = |b|^2 |relu(f_{l-1})|^2 = |b|^2 m/2,   |g_L|^2 = |relu(f_{L-1})|^2 = m/2.

    With lr_l = D/(L |g_l|^2), for D = 1:

    ========  =============  =====================  ==============  =============
    scheme    std of output  lr of input            lr of hidden    lr of output
    ========  =============  =====================  ==============  =============
    ntk       1/sqrt(m)      2 / (L |x|^2)          4 / (L m)       2 / (L m)
    mup       1/m            2 m / (L |x|^2)        4 / L           2 / (L m)
    fsc       sqrt(L)/m      2 m / (L^2 |x|^2)      4 / L^2         2 / (L m)
    standard  1/sqrt(m)      1                      1               1
    ========  =============  =====================  ==============  =============

    The angle at f_l has cos(theta_l) of about sqrt(3/(2 l)) (:func:`fastfs.scaling.predicted_cos_angle`), so the
    sensitivity S = rms(df_{L-1})/D = 1/(sqrt(m) |b| cos(theta)) scales as sqrt(L/m) for ``ntk``, sqrt(L) for ``mup``,
    and 1 for ``fsc``. ``standard`` is the initialization of ``ntk`` with a single learning rate: its loss decrease
    scales as L m. :func:`fastfs.scaling.predict` returns all of these with their constants.

    Args:
        depth: number L of weight matrices, at least 2.
        width: size m of the hidden layers.
        in_dim: size d of the input.
        out_dim: size of the output. The constants hold for a residual vector of norm 1.
        scheme: ``"standard"``, ``"ntk"``, ``"mup"`` or ``"fsc"``.
        input: ``"dense"``: entries of order 1, |x| = sqrt(d). ``"sparse"``: one-hot or normalized, |x| = 1.
        decrease: D, which multiplies every learning rate. With 1, an actual step is far beyond first order.

    Returns:
        The rule, with L matrices.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size, the scheme, the input or the decrease is invalid.

    Source: "The Feature Speed Formula" (arXiv 2311.18718), the table of scalings of ReLU MLPs, with its constants
    worked out.
    """
    norm = _checked(depth, 2, width, in_dim, out_dim, scheme, MLP_SCHEMES, input, decrease)
    output_std = {"mup": 1.0 / width, "fsc": math.sqrt(depth) / width}.get(scheme, 1.0 / math.sqrt(width))
    backward_sq = output_std**2 * width / 2
    gradients_sq = (backward_sq * norm**2, backward_sq * width / 2, width / 2)
    rates = [decrease if scheme == "standard" else decrease / (depth * g) for g in gradients_sq]
    layers = (
        LayerScale("input", width, in_dim, 1.0 / norm, rates[0]),
        *[LayerScale("hidden", width, width, math.sqrt(2.0 / width), rates[1])] * (depth - 2),
        LayerScale("output", out_dim, width, output_std, rates[2]),
    )
    return Rule("mlp", scheme, layers)


def resnet(
    depth: int,
    width: int,
    branch_scale: float | None = None,
    *,
    in_dim: int,
    out_dim: int = 1,
    scheme: str = "mup",
    input: str = "dense",
    decrease: float = 1.0,
) -> Rule:
    r"""Return the rule for a ReLU ResNet: ``f_0 = U x``, L blocks with branch scale beta, output ``W f_L``.

    A block is ``f_l = sqrt(1 - beta^2) f_{l-1} + beta V_l relu(f_{l-1})``, as in :class:`fastfs.models.ResNet`.

    As for the MLP, rms(f_l) = 1 and |b_l| is constant; there are n = L + 2 matrices. For one row and |r| = 1

        |b|^2 = std_W^2 m,   |g_U|^2 = |b|^2 |x|^2,   |g_V|^2 = beta^2 |b|^2 m/2,   |g_W|^2 = |f_L|^2 = m.

    With lr_l = D/(n |g_l|^2), for D = 1:

    ========  ==================  =====================  =======================  =============
    scheme    std of output       lr of input            lr of branches           lr of output
    ========  ==================  =====================  =======================  =============
    ntk       1/sqrt(m)           1 / (n |x|^2)          2 / (n m beta^2)         1 / (n m)
    mup       1/m                 m / (n |x|^2)          2 / (n beta^2)           1 / (n m)
    fsc       1/(m c)             m c^2 / (n |x|^2)      2 c^2 / (n beta^2)       1 / (n m)
    standard  1/sqrt(m)           1                      1                        1
    ========  ==================  =====================  =======================  =============

    with c = cos(theta_L) predicted by :func:`fastfs.scaling.predicted_cos_angle`: ``fsc`` sets S to about 1. For
    beta = 1/sqrt(L) the branch learning rate is Theta(1) (depth-muP), and for beta = 1/L it is Theta(L). In both cases
    c tends to a limit, so ``mup`` and ``fsc`` differ only by a constant. For beta = 1, c decreases like 1/sqrt(L), as
    in the MLP.

    Args:
        depth: number L of residual blocks, at least 1.
        width: size m of the features.
        branch_scale: beta in (0, 1]; None means 1/sqrt(L).
        in_dim: size d of the input.
        out_dim: size of the output. The constants hold for a residual vector of norm 1.
        scheme: ``"standard"``, ``"ntk"``, ``"mup"`` or ``"fsc"``.
        input: ``"dense"``: |x| = sqrt(d); ``"sparse"``: |x| = 1.
        decrease: D, which multiplies every learning rate.

    Returns:
        The rule, with L + 2 matrices.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size, the branch scale, the scheme, the input or the decrease is invalid.

    Source: "The Feature Speed Formula" (arXiv 2311.18718), the scalings of ReLU ResNets, with their constants.
    """
    norm = _checked(depth, 1, width, in_dim, out_dim, scheme, RESNET_SCHEMES, input, decrease)
    beta = 1.0 / math.sqrt(depth) if branch_scale is None else float(branch_scale)
    if not 0.0 < beta <= 1.0:
        raise ValueError(f"branch_scale: expected a number in (0, 1], got {branch_scale}")
    output_std = 1.0 / math.sqrt(width)
    if scheme in ("mup", "fsc"):
        output_std = 1.0 / width
    if scheme == "fsc":
        output_std /= predicted_cos_angle(depth, branch_scale=beta)
    backward_sq = output_std**2 * width
    gradients_sq = (backward_sq * norm**2, beta**2 * backward_sq * width / 2, float(width))
    rates = [decrease if scheme == "standard" else decrease / ((depth + 2) * g) for g in gradients_sq]
    layers = (
        LayerScale("input", width, in_dim, 1.0 / norm, rates[0]),
        *[LayerScale("hidden", width, width, math.sqrt(2.0 / width), rates[1])] * depth,
        LayerScale("output", out_dim, width, output_std, rates[2]),
    )
    return Rule("resnet", scheme, layers, branch_scale=beta)


def _checked(
    depth: int,
    least: int,
    width: int,
    in_dim: int,
    out_dim: int,
    scheme: str,
    schemes: tuple[str, ...],
    kind: str,
    decrease: float,
) -> float:
    """Validate the arguments and return the norm of the input."""
    for name, size in (("depth", depth), ("width", width), ("in_dim", in_dim), ("out_dim", out_dim)):
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name}: expected an integer, got {size!r}")
    if depth < least:
        raise ValueError(f"depth: expected at least {least}, got {depth}")
    if min(width, in_dim, out_dim) < 1:
        raise ValueError(f"width, in_dim and out_dim: expected at least 1, got {width}, {in_dim} and {out_dim}")
    if scheme not in schemes:
        raise ValueError(f"scheme: expected one of {', '.join(schemes)}, got {scheme!r}")
    if kind not in _INPUTS:
        raise ValueError(f"input: expected one of {', '.join(_INPUTS)}, got {kind!r}")
    if not (math.isfinite(decrease) and decrease > 0):
        raise ValueError(f"decrease: expected a positive finite number, got {decrease}")
    return math.sqrt(in_dim) if kind == "dense" else 1.0
