"""A head in three dimensions: folded cortex, ventricles, deep nuclei, veins, skull and scalp; tissue values of 3 T.

T1 and proton density lie in the ranges of PINQI's synthetic data (Zimmermann et al., after BrainWeb's classes); R2* and
susceptibility of the deep nuclei follow the literature at 3 T, rounded. The cortex is not a drawing: sulci are level
sets of a random field, deep at the surface and closing inwards, and grey matter is what lies within 3 mm of fluid.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from recon_core.simulation.phantoms import Canvas, FloatArray, Grid, Texture, Tissue, TissueMaps, soft

LABELS = {
    "background": 0,
    "scalp": 1,
    "skull": 2,
    "csf": 3,
    "grey": 4,
    "white": 5,
    "caudate": 6,
    "putamen": 7,
    "pallidum": 8,
    "thalamus": 9,
    "nigra": 10,
    "ruber": 11,
    "vein": 12,
    "cerebellum": 13,
    "dura": 14,
}

TISSUES = {
    "scalp": Tissue(0.85, 0.38, 0.080, 40.0, 0.0),
    "dura": Tissue(0.90, 2.20, 0.080, 40.0, 0.0),
    "skull": Tissue(0.06, 0.60, 0.010, 250.0, -2.0),
    "marrow": Tissue(0.60, 0.50, 0.060, 80.0, -0.5),
    "csf": Tissue(1.00, 3.60, 1.600, 2.0, 0.0),
    "grey": Tissue(0.84, 1.45, 0.095, 17.0, 0.020),
    "white": Tissue(0.70, 0.90, 0.075, 20.0, -0.030),
    "caudate": Tissue(0.82, 1.45, 0.085, 25.0, 0.060),
    "putamen": Tissue(0.81, 1.42, 0.080, 29.0, 0.070),
    "pallidum": Tissue(0.76, 1.05, 0.065, 43.0, 0.170),
    "thalamus": Tissue(0.79, 1.28, 0.085, 22.0, 0.010),
    "nigra": Tissue(0.78, 1.10, 0.065, 40.0, 0.150),
    "ruber": Tissue(0.78, 1.10, 0.070, 36.0, 0.130),
    "vein": Tissue(0.92, 1.80, 0.050, 60.0, 0.300),
}

# name: centre (|x|, y, z) and half axes in m; both sides alike, the deformation below breaks the symmetry
NUCLEI: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "thalamus": ((0.0105, 0.017, 0.004), (0.0090, 0.0145, 0.0105)),
    "putamen": ((0.0265, -0.002, 0.002), (0.0056, 0.0170, 0.0120)),
    "pallidum": ((0.0195, 0.002, 0.000), (0.0042, 0.0100, 0.0080)),
    "caudate": ((0.0150, -0.025, 0.010), (0.0052, 0.0100, 0.0130)),
    "nigra": ((0.0105, 0.010, -0.014), (0.0060, 0.0035, 0.0040)),
    "ruber": ((0.0050, 0.015, -0.012), (0.0030, 0.0030, 0.0040)),
}


def ellipsoid(
    dx: NDArray[np.floating], dy: NDArray[np.floating], dz: NDArray[np.floating], axes: tuple[float, float, float]
) -> FloatArray:
    """Approximate signed distance to an ellipsoid with half axes ``(x, y, z)``."""
    a, b, c = axes
    level = np.sqrt((dx / a) ** 2 + (dy / b) ** 2 + (dz / c) ** 2)
    slope = np.sqrt((dx / a**2) ** 2 + (dy / b**2) ** 2 + (dz / c**2) ** 2)
    return np.asarray((level - 1.0) * level / np.maximum(slope, 0.2 / max(axes)), dtype=np.float32)


class BrainPhantom:
    """One person's head.

    Parameters
    ----------
    seed
        Another seed is another anatomy.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng([seed, 2])
        self.tissues = {
            name: Tissue(
                t.pd, t.t1 * rng.uniform(0.94, 1.06), t.t2, t.r2star * rng.uniform(0.9, 1.1), t.chi * rng.uniform(0.9, 1.1)
            )
            for name, t in TISSUES.items()
        }
        self.fold = Texture(rng, 3, 0.0076, 0.0, 64)
        self.fold_slope = 1.0 / 0.0035  # rms gradient per m of a unit field of that feature size
        self.folia = Texture(rng, 3, 0.0030, 0.0)
        self.bend = [Texture(rng, 3, 0.030, 1.0, 32) for _ in range(3)]
        self.tube = [Texture(rng, 3, 0.016, 0.0, 64) for _ in range(2)]
        self.grain = Texture(rng, 3, 0.0022, 0.2)
        self.cloud = Texture(rng, 3, 0.008, 1.0)
        a, b, c = np.array([0.068, 0.084, 0.072]) * rng.uniform(0.96, 1.03, 3)
        self.head = (float(a), float(b), float(c))
        self.ventricle = rng.uniform(0.0042, 0.0062)

    def maps(self, grid: Grid) -> TissueMaps:
        """Tissue maps on a grid of any spacing (a slab, or some slices)."""
        x3, y3, z3 = (
            np.asarray(v, dtype=np.float32) for v in (grid.x[None, None, :], grid.y[None, :, None], grid.z[:, None, None])
        )
        e, t = grid.pixel, self.tissues
        canvas = Canvas(grid.shape, edge=e)
        bx, by, bz = (0.0018 * bend(z3, y3, x3) for bend in self.bend)
        x, y, z = x3 + bx, y3 + by, z3 + bz
        surface = ellipsoid(x, y, z, self.head)
        grain, cloud = self.grain(z3, y3, x3), self.cloud(z3, y3, x3)

        canvas.paint(soft(surface - 0.0145 - 0.0012 * cloud, e), t["scalp"], LABELS["scalp"], 0.12 * cloud + 0.10 * grain)
        canvas.paint(soft(np.abs(surface - 0.0095) - 0.0010, e), t["dura"], LABELS["scalp"], -0.2)
        canvas.paint(soft(surface - 0.0080, e), t["skull"], LABELS["skull"], 0.2 * grain)
        diploe = np.abs(surface - 0.0052 - 0.0006 * cloud) - 0.0014
        canvas.paint(soft(diploe, e), t["marrow"], LABELS["skull"], 0.25 * grain)
        canvas.paint(soft(surface - 0.0022, e), t["dura"], LABELS["dura"])
        canvas.paint(soft(surface - 0.0014, e), t["csf"], LABELS["csf"], 0.02 * grain)

        fluid = self._fluid_distance(surface, x, y, z)
        brain = surface + 0.0008
        canvas.paint(
            soft(np.maximum(brain, -fluid), e), t["grey"], LABELS["grey"], 0.05 * grain + 0.03 * cloud, 0.03 * cloud
        )
        white = np.maximum(brain + 0.0028, 0.0028 + 0.0004 * cloud - fluid)
        canvas.paint(soft(white, e), t["white"], LABELS["white"], 0.03 * grain + 0.025 * cloud, 0.03 * cloud)
        self._cerebellum(canvas, x, y, z, grain)
        self._deep(canvas, x, y, z, grain, cloud)
        self._veins(canvas, x3, y3, z3, surface)
        return canvas.maps()

    def _fluid_distance(self, surface: FloatArray, x: FloatArray, y: FloatArray, z: FloatArray) -> FloatArray:
        """Distance to the fluid around and between the gyri: positive inside the tissue."""
        depth = -surface
        gyri = np.abs(self.fold(z, y, x)) / np.float32(self.fold_slope)
        width = 0.0008 * np.clip(1.0 - depth / 0.024, 0.0, 1.0) + 0.0002
        sulci = np.maximum(gyri - width, depth - 0.018 - 0.004 * self.bend[1](y * 2, z * 2, x * 2))
        # the falx reaches the corpus callosum; above it, it parts the hemispheres altogether
        fissure = np.maximum(np.abs(x + 0.0006 * self.bend[0](y, z, x)) - 0.0009, np.minimum(depth - 0.032, 0.026 - z))
        bent = y + 0.010 + 0.15 * (np.abs(x) - 0.04) + 0.003 * self.cloud(y * 0.4, z * 0.4, x * 0.4)
        sylvian = np.maximum(np.abs(bent) - 0.0011, 0.034 - np.abs(x))
        sylvian = np.maximum(sylvian, np.abs(z - 0.002) - 0.020)
        return np.minimum(np.minimum(depth, sulci), np.minimum(fissure, sylvian))

    def _deep(
        self, canvas: Canvas, x: FloatArray, y: FloatArray, z: FloatArray, grain: FloatArray, cloud: FloatArray
    ) -> None:
        e, t = canvas.edge, self.tissues
        side = np.abs(x)
        for name, ((cx, cy, cz), axes) in NUCLEI.items():
            distance = ellipsoid(side - cx - 0.12 * np.abs(y - cy), y - cy, z - cz, axes) + 0.0005 * cloud
            canvas.paint(soft(distance, e), t[name], LABELS[name], 0.04 * grain, 0.05 * cloud)
        v = self.ventricle
        front = ellipsoid(side - 0.0060 - 0.30 * np.clip(-y - 0.008, 0, 1), y + 0.022, z - 0.014, (v, 0.020, 0.011))
        back = ellipsoid(side - 0.0085 - 0.55 * np.clip(y - 0.008, 0, 1), y - 0.028, z - 0.012, (v, 0.024, 0.010))
        third = np.maximum(np.maximum(side - 0.0016, np.abs(y - 0.012) - 0.011), np.abs(z + 0.002) - 0.010)
        canvas.paint(soft(np.minimum(np.minimum(front, back), third), e), t["csf"], LABELS["csf"], 0.02 * grain)

    def _cerebellum(self, canvas: Canvas, x: FloatArray, y: FloatArray, z: FloatArray, grain: FloatArray) -> None:
        e, t = canvas.edge, self.tissues
        lobe = ellipsoid(x, y - 0.042, z + 0.048, (0.046, 0.028, 0.022))
        folia = np.abs(self.folia(z, y, x * 0.35)) * 0.0018
        canvas.paint(soft(lobe - 0.0020, e), t["csf"], LABELS["csf"])
        canvas.paint(soft(np.maximum(lobe, 0.0005 - folia), e), t["grey"], LABELS["cerebellum"], 0.05 * grain)
        canvas.paint(soft(np.maximum(lobe + 0.006, 0.0016 - folia), e), t["white"], LABELS["cerebellum"], 0.05 * grain)
        stem = np.maximum(ellipsoid(x, y - 0.008, z * 0, (0.014, 0.012, 1.0)), z + 0.022)
        stem = np.maximum(stem, -0.075 - z)
        canvas.paint(soft(stem - 0.003, e), t["csf"], LABELS["csf"])
        canvas.paint(soft(stem, e), t["white"], LABELS["white"], 0.05 * grain)

    def _veins(self, canvas: Canvas, x: FloatArray, y: FloatArray, z: FloatArray, surface: FloatArray) -> None:
        """Tubes where two random fields vanish together, and the sagittal sinus."""
        e, t = canvas.edge, self.tissues
        first, second = (tube(z, y, x) for tube in self.tube)
        distance = np.sqrt(first**2 + second**2) * 0.0095 - 0.0009
        canvas.paint(soft(np.maximum(distance, surface + 0.001), e), t["vein"], LABELS["vein"])
        sinus = np.maximum(np.hypot(x, surface - 0.0005) - 0.0032, -z - 0.03)
        canvas.paint(soft(sinus, e), t["vein"], LABELS["vein"])
