"""Draw docs/lesions.png: how maps of a dark and of a bright lesion look, by the simplest network.

    python3 docs/lesions.py

Its logit is w·x: each voxel times a weight, negative where patients are darker, positive where they
are brighter. Integrated gradients from 0 are then w·x exactly, SmoothGrad and an SVM's weights are
w, and Welch's t has the sign of w.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

TISSUE, CHANGE, SIDE = 0.8, 0.4, 60
DARK, BRIGHT = (
    np.hypot(*(np.indices((SIDE, SIDE)) - np.array(centre).reshape(2, 1, 1))) < 8
    for centre in ((30, 18), (30, 42))
)


def main() -> None:
    """Draw six panels: a control, a patient, and what each kind of map shows."""
    head = np.hypot(*(np.indices((SIDE, SIDE)) - SIDE / 2)) < 28
    control = TISSUE * head * np.where(BRIGHT, 0.5, 1)
    patient = control - CHANGE * DARK + CHANGE * BRIGHT
    weight = BRIGHT * 1.0 - DARK
    panels = {
        "control": control,
        "patient": patient,
        "IG, patients' mean": weight * patient,
        "IG, controls' mean": weight * control,
        "IG, contrast": weight * (patient - control),
        "SG, SVM, t": weight,
    }
    figure = Figure(figsize=(11, 2.2), layout="constrained")
    for axis, (title, data) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        is_scan = title in ("control", "patient")
        colors = {"cmap": "gray", "vmin": 0, "vmax": 1.3} if is_scan else {
            "cmap": "RdBu_r", "vmin": -1, "vmax": 1}  # fmt: skip
        axis.imshow(data, **colors)
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
        for mask, name in ((DARK, "dark"), (BRIGHT, "bright")):
            column = np.argwhere(mask)[:, 1].mean()
            axis.text(column, 45, name, ha="center", fontsize=7, color="w" if is_scan else "k")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
