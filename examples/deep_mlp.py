# %% [markdown]
# # My deep MLP does not train
#
# From a network that no learning rate trains to the measurement, the cause, and two remedies: a scaling from a table,
# and a measured one. Runs in less than a minute on two cores, on the digits that scikit-learn ships.
#
#     pip install ".[demo,scaling]"
#     python examples/deep_mlp.py
#
# The cells also open as a notebook (`# %%` is the percent format of Jupytext, VS Code, PyCharm and Spyder).

# %%
from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from fastfs import formula, scaling
from fastfs.models import MLP, ResNet

DEPTH, WIDTH, STEPS = 30, 256, 300

digits, labels = load_digits(return_X_y=True)
inputs = torch.tensor(digits, dtype=torch.float32)
inputs = (inputs - inputs.mean()) / inputs.std()
targets = torch.tensor(labels)
batch = inputs[:256], targets[:256]  # for measurements


def loss_fn(model: Any, batch: Any) -> Any:
    return F.cross_entropy(model(batch[0]), batch[1])


# %% [markdown]
# ## 1. The problem
#
# A ReLU MLP of 30 matrices of width 256, in the maximal update parametrization (muP), whose learning rates transfer
# across widths. `scaling.mlp` returns its initial standard deviations and learning rates, and `scaling.apply`
# initializes the model and returns the optimizer's parameter groups. One factor on all learning rates remains to sweep.


# %%
def train(model: Any, optimizer: torch.optim.Optimizer, seed: int = 0) -> Any:
    """Return mean loss and accuracy over the last 20 batches of plain SGD; inf and 0 if it diverged."""
    generator = torch.Generator().manual_seed(seed)
    results = []
    for _ in range(STEPS):
        rows = torch.randint(0, len(inputs), (64,), generator=generator)
        logits = model(inputs[rows])
        loss = F.cross_entropy(logits, targets[rows])
        if not loss.isfinite():
            return math.inf, 0.0
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        results.append((loss.item(), (logits.argmax(dim=1) == targets[rows]).float().mean().item()))
    return tuple(sum(values) / 20 for values in zip(*results[-20:], strict=True))


def mlp_by(scheme: Any, factor: float = 1.0) -> tuple[Any, ...]:
    """Return a new MLP and its optimizer, scaled by the table."""
    model = MLP(64, WIDTH, DEPTH, 10)
    rule = scaling.mlp(DEPTH, WIDTH, 64, 10, scheme=scheme).scaled(lr=factor)
    groups = scaling.apply(model, rule, generator=torch.Generator().manual_seed(0))
    return model, torch.optim.SGD(groups)


def sweep(scheme: Any, factors: Any) -> Any:
    """Return the best loss, with its accuracy, over factors of the learning rates."""
    results = {}
    for factor in factors:
        results[factor] = train(*mlp_by(scheme, factor))
        print(
            f"{scheme}, learning rates x {factor:<5} loss {results[factor][0]:.3f}, accuracy {results[factor][1]:.2f}"
        )
    return min(results.values())


best_mup = sweep("mup", [0.1, 0.3, 1.0])

# %% [markdown]
# No factor works: smaller ones are slow, larger ones worse. The cause is not a single number that a sweep would find.
#
# ## 2. The measurement
#
# `formula.measure` reports what the first step does to the features of each layer, without taking it: how far they move
# (`update_rms`), at which angle to the direction -b of steepest descent (the backward-feature angle), and the resulting
# decrease of the loss. The sensitivity S is the movement of the last hidden features per unit of loss.

# %%
model, optimizer = mlp_by("mup", 0.1)
measured = formula.measure(model, loss_fn, batch, optimizer=optimizer, first_order=True)
print(measured.to_frame()[["layer", "angle", "cos_angle", "update_rms", "sensitivity"]].iloc[::7])
print(f"S = {measured.sensitivity[-1]:.1f}, angle of the last features = {measured.stats.angle[-1]:.2f} rad")

# %% [markdown]
# ## 3. The cause
#
# The angle is 1.4 in the first layer and tends to pi/2: cos(angle) falls like 1/sqrt(l). The features move almost
# orthogonally to the direction of descent, so they have to move far: by the feature speed formula,
#
#     |df| = D / (cos(angle) |b|),
#
# and muP, derived for networks of fixed depth, does not compensate for the cosine. S is twenty where it should be one:
# before the loss has decreased by a tenth, the features have changed completely, and the next gradient belongs to
# another network. All layers contribute to the decrease (`contribution`, within a factor of 2 between adjacent layers),
# so the cause is not the learning rate of a single layer.
#
# ## 4. The remedy from the table
#
# The feature speed corrected scaling (FSC) increases the output's initial scale, and with it |b|, by sqrt(L), and
# decreases the learning rates to match.

# %%
best_fsc = sweep("fsc", [1.0, 3.0])
model, optimizer = mlp_by("fsc")
corrected = formula.measure(model, loss_fn, batch, optimizer=optimizer, first_order=True)
print(f"S = {corrected.sensitivity[-1]:.1f}; best loss {best_fsc[0]:.3f} instead of {best_mup[0]:.3f}")

# %% [markdown]
# ## 5. The remedy by measurement
#
# The table's constants hold for one output and one row. `scaling.first_step` measures instead: it finds learning rates
# with which all layers contribute equally to a given decrease per step, and the output scale at which S = 1. It works
# for any model and optimizer, and explains its numbers before anything is changed.

# %%
model, _ = mlp_by("mup")
calibration = scaling.first_step(model, loss_fn, batch, optimizer="sgd", target_loss_decrease=0.1)
print(calibration)
calibration.apply(model)
best_calibrated = train(model, torch.optim.SGD(calibration.groups()))
print(f"calibrated: loss {best_calibrated[0]:.3f}, accuracy {best_calibrated[1]:.2f}, nothing swept")

# %% [markdown]
# ## 6. Or another architecture
#
# The scaling makes the best of an angle that the architecture degrades. A residual network with branch scale 1/sqrt(L)
# keeps the angle away from pi/2 at any depth, and needs no correction that grows with depth.

# %%
torch.manual_seed(0)
resnet = ResNet(64, WIDTH, DEPTH, 10)
calibration = scaling.first_step(resnet, loss_fn, batch, optimizer="sgd", target_loss_decrease=0.1)
calibration.apply(resnet)
optimizer = torch.optim.SGD(calibration.groups())
residual = formula.measure(resnet, loss_fn, batch, optimizer=optimizer, first_order=True)
best_resnet = train(resnet, optimizer)
print(f"ResNet: loss {best_resnet[0]:.3f}, accuracy {best_resnet[1]:.2f}")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for name, found in (("MLP, muP", measured), ("MLP, FSC", corrected), ("ResNet, calibrated", residual)):
    left.plot(range(1, len(found.layers) + 1), found.stats.angle, label=name)
left.axhline(math.pi / 2, color="0.6", linestyle=":", label="pi/2")
left.set(xlabel="layer", ylabel="backward-feature angle (rad)", ylim=(0, 1.7))
left.legend(frameon=False)
ends = {
    f"MLP, muP (best of 3), S = {measured.sensitivity[-1]:.0f}": best_mup[0],
    f"MLP, FSC (best of 2), S = {corrected.sensitivity[-1]:.1f}": best_fsc[0],
    "MLP, calibrated, S = 1": best_calibrated[0],
    "ResNet, calibrated, S = 1": best_resnet[0],
}
right.barh(list(ends), list(ends.values()))
right.invert_yaxis()
right.set(xlabel=f"loss after {STEPS} steps")
Path("runs").mkdir(exist_ok=True)
figure.savefig("runs/deep_mlp.png", dpi=150)
print("runs/deep_mlp.png")
