# %% [markdown]
"""A lecture in six steps: neural collapse, minority collapse, the remedy, and what the remedy changes.

    python results/lecture.py        about a minute on a laptop without a GPU; figures in runs/lecture

Or cell by cell, as a notebook: `jupytext --to notebook results/lecture.py`. It imports the scripts and copies
nothing: what is shown here is what the chapters run. EPOCHS=5 in front of the command shortens the training.
"""

# %%
import os
import sys
from pathlib import Path

import torch

sys.path[:0] = [".", ".."]  # started beside the scripts, or in results/
import bmls_msclf
import common
import nc_metrics

EPOCHS = os.environ.get("EPOCHS", "60")
OUT = Path("runs/lecture")

# %% [markdown]
# ## 1. What is a class vector?
# A network maps an image to a feature $h$. Its last layer holds one class vector $w_k$ per class. The score
# of class $k$ is $w_k \cdot h$, and the largest score wins. Here are three classes in the plane, at the end
# of the training of step 2.

# %%
states, y = nc_metrics.fall([0, 30, 200, 3000])
H, W = states[3000]
print("Class vectors:", *W.numpy().round(2))
print(f"A feature of class 0: {H[0].numpy().round(2)}; its three scores: {(W @ H[0]).numpy().round(2)}")

# %% [markdown]
# ## 2. Neural collapse
# Let features and class vectors be free, as if the network could put a feature anywhere, and descend. The
# features of a class become one point: NC1, their spread within classes, falls to 0. The class vectors spread
# out at equal angles and point at the features. *Question: why equal angles?*

# %%
panels = {}
for step, (H, W) in states.items():
    spread = nc_metrics.neural_collapse(H, W, y)["nc1"]
    points = {f"class {k}": H[y == k].numpy() for k in range(3)}
    panels[f"step {step}: NC1 = {spread:.3g}"] = (points, 3**0.5 * W.numpy())  # |h| = sqrt(K) |w| there
    print(f"step {step}: NC1 = {spread:.3g}")
nc_metrics.draw_planes(OUT / "falling.png", panels, "free features")

# %% [markdown]
# ## 3. Minority collapse, and 3/2
# Ten classes, five of them rare, again with free features; penalties $\lambda_W$ on class vectors and
# $\lambda_H$ on features. `times` is the share $n_B / N$ of a rare class's images, over
# $\lambda_W \lambda_H$. Up to 1 all rare classes get the same class vector (cosine 1). Under Mixup, training
# on blends of two images, they do so up to 3/2.
# *Question: what does a network answer for an image of a rare class then?*

# %%
points = {}
for method in ("ce", "mixup", "bmls"):
    times = [0.9, 1.0, 1.1, 1.25, 1.5, 1.6, 2.0]
    points[method] = (times, [bmls_msclf.rare_cosine(method, x) for x in times])
    print(f"{method}: cosine of the rare class vectors at 1.25 is {points[method][1][3]:.2f}")
axes = {"xlabel": r"$n_B/N$ in units of $\lambda_W \lambda_H$", "ylabel": "cosine of rare class vectors"}
common.curves(OUT / "threshold.png", points, common.styles(points), **axes)

# %% [markdown]
# ## 4. The remedy: which classes come?
# Mixup blends two images drawn from all. Five classes have 143 images, five have one, so rare ones hardly
# come. Class-balanced draws take every class with equal chance; BMLS deals every pair of classes once before
# any comes again. *Question: which of the two is needed?*

# %%
counts = {name: bmls_msclf.count_pairs(sampler) for name, sampler in bmls_msclf.SAMPLERS.items()}
for name, count in counts.items():
    drawn = count[tuple(torch.triu_indices(10, 10))]
    print(f"{name}: a pair comes {drawn.min()} to {drawn.max()} times; {(drawn == 0).sum()} of 55 never come")
bmls_msclf.draw_pairs(OUT / "pairs.png", counts)

# %% [markdown]
# ## 5. Trained networks
# The same on real digits; `cb` has class-balanced draws and no blends. Look at the lower right of the figure:
# a red block is minority collapse. *Question: cross-entropy has half a block, and its rare classes are
# not found either. What does "train few" say?*

# %%
methods = ["ce", "mixup", "cb", "bmls+ms"]
flags = ["--method", *methods, "--epochs", EPOCHS, "--precision", "fp32", "--out", str(OUT)]
folder = Path(bmls_msclf.main(flags)["folder"])

# %% [markdown]
# ## 6. Features or heads?
# Keep the features and exchange the last layer, the head. Logit adjustment subtracts $\log n_k$ from the
# score of class $k$, $n_k$ its number of images. Tau-normalisation cuts class vectors to one length. Nearest
# class mean uses no head at all: what differs there lies in the features. *Question: how much of the gain?*

# %%
found = {}
for method in methods:
    kept = common.Run(folder / method / "seed0").load_features()
    arrays = [torch.from_numpy(kept[name]) for name in ("train_h", "train_y", "test_h", "test_y", "W")]
    found[method] = {common.HEADS[name]: [100 * right] for name, right in common.heads(*arrays).items()}
rows = [[method, *(f"{right:.1f}" for (right,) in of_head.values())] for method, of_head in found.items()]
print("\n" + common.table(["trained with", *common.HEADS.values()], rows))
common.bars(OUT / "heads.png", found, common.styles(found), ylabel="test accuracy (%)", ylim=(0, 100))
print(f"figures: {OUT}, and {folder / 'class_vectors.png'}")
