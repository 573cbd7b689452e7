"""A beating heart in a chest: short-axis anatomy with texture, smooth periodic motion, tissue values of 1.5 T.

Relaxation times: Bojorquez et al., Magn Reson Imaging 2017 (doi:10.1016/j.mri.2016.08.021) and Stanisz et al., Magn
Reson Med
2005 (doi:10.1002/mrm.20605), rounded; every seed draws its own anatomy, heart size and values within some per cent.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from recon_core.simulation.phantoms import Canvas, FloatArray, Grid, Texture, Tissue, TissueMaps, ellipse, soft, stack

LABELS = {
    "background": 0,
    "fat": 1,
    "muscle": 2,
    "lung": 3,
    "bone": 4,
    "liver": 5,
    "spleen": 6,
    "csf": 7,
    "aorta": 8,
    "pericardium": 9,
    "rv_blood": 10,
    "rv_wall": 11,
    "myocardium": 12,
    "lv_blood": 13,
    "papillary": 14,
    "vessel": 15,
}

TISSUES = {
    "fat": Tissue(0.90, 0.30, 0.120),
    "muscle": Tissue(0.80, 0.98, 0.044),
    "lung": Tissue(0.15, 1.20, 0.045, 150.0),
    "bone": Tissue(0.50, 0.45, 0.060),
    "cortical": Tissue(0.06, 0.60, 0.010, 200.0),
    "liver": Tissue(0.82, 0.58, 0.050),
    "spleen": Tissue(0.85, 1.05, 0.075),
    "csf": Tissue(1.00, 3.60, 1.500, 2.0),
    "blood": Tissue(0.95, 1.55, 0.230, 8.0),
    "myocardium": Tissue(0.84, 1.00, 0.052),
}


def contraction(phase: NDArray[np.floating] | float) -> NDArray[np.float64]:
    """How far the left ventricle is contracted, 0 (end diastole) to 1 (end systole), at a cardiac phase of 0 to 1
    (periodic).

    Systole takes 35 % of the cycle, then rapid filling, diastasis and the atrial kick. A sum of 6 harmonics, hence smooth.
    """
    nodes_t = np.array([0.0, 0.06, 0.15, 0.25, 0.34, 0.40, 0.48, 0.56, 0.66, 0.80, 0.90, 1.0])
    nodes_c = np.array([0.02, 0.07, 0.45, 0.85, 1.00, 0.97, 0.68, 0.36, 0.24, 0.20, 0.06, 0.02])
    samples = np.interp(np.arange(256) / 256, nodes_t, nodes_c)
    spectrum = np.fft.rfft(samples) / 256
    t = np.asarray(phase, dtype=float)[..., None]
    order = np.arange(1, 7)
    damped = spectrum[1:7] * np.exp(-((order / 8.0) ** 2))
    wave = spectrum[0].real + 2 * (damped * np.exp(2j * np.pi * order * t)).real.sum(-1)
    return np.asarray(np.clip(wave, 0.0, 1.0))


class TorsoPhantom:
    """One person's chest in short-axis view.

    Parameters
    ----------
    seed
        Another seed is another anatomy.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng([seed, 1])
        self.tissues = {
            name: Tissue(t.pd, t.t1 * rng.uniform(0.95, 1.05), t.t2 * rng.uniform(0.95, 1.05), t.r2star, t.chi)
            for name, t in TISSUES.items()
        }
        self.grain = Texture(rng, 2, 0.0022, 0.4)
        self.cloud = Texture(rng, 2, 0.006, 1.2)
        self.strand = Texture(rng, 2, 0.008, 0.6)
        self.vein = Texture(rng, 2, 0.012, 0.5)
        self.body = (0.156 * rng.uniform(0.96, 1.03), 0.112 * rng.uniform(0.95, 1.05))
        self.fat_layer = rng.uniform(0.010, 0.018)
        self.lv = np.array([0.036, 0.002]) + rng.uniform(-0.005, 0.005, 2)
        self.endo = rng.uniform(0.0235, 0.0265)
        self.wall = rng.uniform(0.0085, 0.0105)
        self.ejection = rng.uniform(0.30, 0.38)  # radial shortening of the endocardium
        self.rv_angle = rng.uniform(-2.75, -2.45)  # direction from the LV to the RV: left and anterior in the image
        self.twist = rng.uniform(0.10, 0.18)
        self.wobble = rng.uniform(-1, 1, (2, 5)) * 0.02
        self.papillary = (rng.uniform(0.45, 0.8), rng.uniform(2.2, 2.7))
        self.rib_turn = rng.uniform(0, 0.3)

    def maps(self, grid: Grid, phase: float) -> TissueMaps:
        """All slices at one cardiac phase (0 = end diastole, periodic with 1)."""
        return self.frames(grid, np.array([phase]))[0]

    def frames(self, grid: Grid, phases: NDArray[np.floating]) -> list[TissueMaps]:
        """One set of maps per cardiac phase; what does not move is painted once."""
        y, x = np.meshgrid(grid.y.astype(np.float32), grid.x.astype(np.float32), indexing="ij")
        still = [self._chest(x, y, float(z), grid.pixel) for z in grid.z]
        result = []
        for phase in phases:
            slices = []
            for z, chest in zip(grid.z, still, strict=True):
                canvas = chest.copy()
                self._aorta(canvas, x, y, float(phase))
                self._heart(canvas, x, y, float(z), float(phase))
                slices.append(canvas.maps())
            result.append(stack(slices))
        return result

    def _chest(self, x: FloatArray, y: FloatArray, z: float, pixel: float) -> Canvas:
        canvas = Canvas(x.shape, edge=pixel)
        e, t = pixel, self.tissues
        a, b = self.body
        xw = x + 0.004 * np.sin(9 * y / b + 1.0) * (np.abs(x) / a)
        grain, cloud = self.grain(y, x + z), self.cloud(y + z, x)
        strand = np.abs(self.strand(y - z, x))
        skin = ellipse(xw, y, a, b, 2.4)
        lobules = 0.10 * cloud - 0.35 * np.exp(-((strand / 0.10) ** 2))
        canvas.paint(soft(skin, e), t["fat"], LABELS["fat"], lobules)
        canvas.paint(soft(np.abs(skin + 0.0012) - 0.0012, e), t["muscle"], LABELS["muscle"])
        inner = ellipse(xw, y - 0.002, a - self.fat_layer * 0.8, b - self.fat_layer, 2.3)
        fibres = 0.14 * grain + 0.12 * cloud - 0.3 * np.exp(-((strand / 0.08) ** 2))
        canvas.paint(soft(inner, e), t["muscle"], LABELS["muscle"], fibres, 0.03 * cloud)
        # a fat plane between the muscle layers of the wall
        plane = np.abs(inner + 0.009 + 0.0015 * self.cloud(y * 0.5, x * 0.5)) - 0.0014
        canvas.paint(soft(plane, e) * (y < 0.06), t["fat"], LABELS["fat"], lobules)
        wall = 0.021
        cavity = ellipse(xw, y + 0.004, a - self.fat_layer - wall, b - self.fat_layer - wall * 0.9, 2.2)
        self._ribs(canvas, x, y)
        canvas.paint(soft(cavity, e), t["fat"], LABELS["fat"], lobules - 0.1)
        self._lungs(canvas, x, y, z, cavity)
        self._abdomen(canvas, x, y, z, cavity)
        self._spine(canvas, x, y)
        return canvas

    def _ribs(self, canvas: Canvas, x: FloatArray, y: FloatArray) -> None:
        e, (a, b) = canvas.edge, self.body
        for i, angle in enumerate(np.arange(14) * (2 * np.pi / 14) + self.rib_turn):
            if abs(np.sin(angle) - 1.0) < 0.25:  # the spine is there
                continue
            ra, rb = a - self.fat_layer - 0.013, b - self.fat_layer - 0.0125
            cx, cy = ra * np.cos(angle), rb * np.sin(angle) - 0.003
            tangent = np.arctan2(rb * np.cos(angle), -ra * np.sin(angle))
            c, s = np.cos(tangent), np.sin(tangent)
            u, v = c * (x - cx) + s * (y - cy), -s * (x - cx) + c * (y - cy)
            distance = ellipse(u, v, 0.0115 + 0.002 * (i % 3), 0.0048)
            canvas.paint(soft(distance, e), self.tissues["cortical"], LABELS["bone"])
            canvas.paint(soft(distance + 0.0016, e), self.tissues["bone"], LABELS["bone"], 0.15 * self.grain(v, u))

    def _lungs(self, canvas: Canvas, x: FloatArray, y: FloatArray, z: float, cavity: FloatArray) -> None:
        e, t = canvas.edge, self.tissues
        mediastinum = 0.030 - 0.10 * np.abs(y + 0.01) + 0.004 * self.cloud(y * 0.4, x * 0.4)
        lung = np.maximum(cavity + 0.0012 + 0.0008 * self.cloud(y, x), -(np.abs(x - 0.012) - mediastinum))
        canvas.paint(soft(lung, e), t["lung"], LABELS["lung"], 0.25 * self.grain(y, x))
        # branching vessels: level sets of a random field, thinner and rarer towards the pleura
        field = self.vein(y + 3 * z, x)
        depth = np.clip(-lung / 0.045, 0.0, 1.0)
        thickness = 0.05 + 0.16 * depth**2
        gate = soft(-(self.cloud(y * 0.5, x * 0.5 + z) + 0.6) * 0.01, 4 * e)
        branches = soft((np.abs(field) - thickness) * 0.006, e) * gate
        dots = soft((1.4 + 0.7 * (1 - depth) - self.cloud(y * 0.8 + z, x * 0.8)) * 0.003, e)  # vessels through the plane
        canvas.paint(np.maximum(branches, dots) * soft(lung + 0.002, e), t["blood"], LABELS["vessel"], -0.3)

    def _abdomen(self, canvas: Canvas, x: FloatArray, y: FloatArray, z: float, cavity: FloatArray) -> None:
        """Dome of the liver below right of the heart, the spleen behind left."""
        e, t = canvas.edge, self.tissues
        grain, cloud = self.grain(y, x), self.cloud(y, x)
        bump = 0.004 * self.cloud(y * 0.25, x * 0.25)
        liver = np.maximum(cavity + 0.003, ellipse(x + 0.072 - 0.3 * z, y - 0.048, 0.078, 0.052, 2.3) + bump)
        canvas.paint(soft(liver, e), t["liver"], LABELS["liver"], 0.08 * grain + 0.07 * cloud, 0.03 * cloud)
        vessels = soft((np.abs(self.vein(y * 0.8, x * 0.8 + z)) - 0.12) * 0.008, e)
        vessels = vessels * soft(-(self.cloud(y * 0.4, x * 0.4) + 0.2) * 0.01, 3 * e)
        canvas.paint(vessels * soft(liver + 0.006, 2 * e), t["blood"], LABELS["vessel"])
        spleen = np.maximum(cavity + 0.003, ellipse(x - 0.098, y - 0.044, 0.026, 0.034) - bump)
        canvas.paint(soft(spleen, e), t["spleen"], LABELS["spleen"], 0.06 * grain, 0.03 * cloud)

    def _spine(self, canvas: Canvas, x: FloatArray, y: FloatArray) -> None:
        e, t = canvas.edge, self.tissues
        cy = self.body[1] - 0.046
        grain = self.grain(y, x)
        muscle = np.minimum(
            ellipse(x + 0.028, y - cy - 0.024, 0.024, 0.015), ellipse(x - 0.028, y - cy - 0.024, 0.024, 0.015)
        )
        canvas.paint(soft(muscle, e), t["muscle"], LABELS["muscle"], 0.12 * grain)
        body = ellipse(x, y - cy, 0.021, 0.0165, 2.3)
        canvas.paint(soft(body, e), t["cortical"], LABELS["bone"])
        canvas.paint(soft(body + 0.0018, e), t["bone"], LABELS["bone"], 0.2 * grain + 0.1 * self.cloud(y, x))
        process = np.minimum(ellipse(x, y - cy - 0.034, 0.0035, 0.012), ellipse(x, y - cy - 0.024, 0.013, 0.004))
        canvas.paint(soft(process, e), t["cortical"], LABELS["bone"])
        canvas.paint(soft(ellipse(x, y - cy - 0.0215, 0.0085, 0.0065), e), t["csf"], LABELS["csf"], 0.03 * grain)
        canvas.paint(soft(ellipse(x, y - cy - 0.0215, 0.0048, 0.0036), e), t["muscle"], LABELS["muscle"])

    def _aorta(self, canvas: Canvas, x: FloatArray, y: FloatArray, phase: float) -> None:
        e, t = canvas.edge, self.tissues
        pulse = 1.0 + 0.05 * float(contraction(phase - 0.10))
        dx, dy = x - 0.024, y - (self.body[1] - 0.066)
        canvas.paint(soft(ellipse(dx, dy, 0.0128 * pulse, 0.0128 * pulse), e), t["muscle"], LABELS["muscle"])
        flow = 0.05 * self.cloud(dy / pulse + 0.002 * np.cos(2 * np.pi * phase), dx / pulse)
        canvas.paint(soft(ellipse(dx, dy, 0.0112 * pulse, 0.0112 * pulse), e), t["blood"], LABELS["aorta"], flow)

    def _heart(self, canvas: Canvas, x: FloatArray, y: FloatArray, z: float, phase: float) -> None:
        """Warp the present position back to end diastole, where the anatomy and its textures are defined."""
        box = (
            slice(*_range(y[:, 0], self.lv[1] - 0.08, self.lv[1] + 0.07)),
            slice(*_range(x[0], self.lv[0] - 0.12, self.lv[0] + 0.07)),
        )
        part = Canvas.__new__(Canvas)
        part.edge, part.labels = canvas.edge, canvas.labels[box]
        part.fields = {name: field[box] for name, field in canvas.fields.items()}  # views: painting goes through
        e, t = canvas.edge, self.tissues
        c = float(contraction(phase))
        size = 1.0 - np.clip(z / 0.10, -0.2, 0.55) ** 2 * 1.5 - 0.6 * max(z, 0.0) / 0.10  # towards +z is the apex
        size = max(size, 0.45)
        centre = self.lv + 0.003 * c * np.array([-1.0, 0.6])
        dx, dy = x[box] - centre[0], y[box] - centre[1]
        r, theta = np.hypot(dx, dy), np.arctan2(dy, dx)
        wave = sum(
            self.wobble[0, k] * np.cos((k + 2) * theta) + self.wobble[1, k] * np.sin((k + 2) * theta) for k in range(5)
        )
        oval = np.asarray(1.0 + 0.5 * wave + 0.03 * np.cos(2 * theta), dtype=np.float32)
        endo_ed = self.endo * size
        epi_ed = endo_ed + self.wall * (0.75 + 0.25 * size)
        endo = endo_ed * (1.0 - self.ejection * c)
        # the wall's area stays, plus what longitudinal shortening pushes into the plane
        area = (epi_ed**2 - endo_ed**2) * (1.0 + 0.12 * c)
        epi = np.sqrt(endo**2 + area)
        s = r / oval
        outside = np.maximum(s - epi, 0.0)
        rv_side = 0.5 + 0.5 * np.cos(theta - self.rv_angle)
        reach = 0.036
        squeeze = 0.55 * c * rv_side**2 * outside * np.exp(-0.5 * (outside / reach) ** 2)
        s0 = np.where(
            s < endo,
            s * (endo_ed / endo),
            np.where(
                s < epi,
                np.sqrt(endo_ed**2 + np.clip(s**2 - endo**2, 0, None) * ((epi_ed**2 - endo_ed**2) / area)),
                s + (epi_ed - epi) * np.exp(-((outside / 0.05) ** 2)) + squeeze,
            ),
        ).astype(np.float32)
        turn = theta - self.twist * c * np.exp(-((s0 / 0.05) ** 2)) * (0.4 + 8.0 * z)
        mx, my = s0 * oval * np.cos(turn), s0 * oval * np.sin(turn)
        self._ventricles(part, mx, my, s0, z, size, epi_ed, endo_ed)
        # papillary muscles keep their area while the cavity shrinks
        for angle in self.papillary:
            px = 0.68 * endo * np.cos(angle + self.twist * c)
            py = 0.68 * endo * np.sin(angle + self.twist * c)
            radius = 0.0046 * size * (1.0 + 0.10 * c)
            distance = ellipse(dx - px, dy - py, radius * 1.15, radius * 0.9) + 0.0008 * self.cloud(my, mx)
            part.paint(soft(distance, e), t["myocardium"], LABELS["papillary"], 0.05 * self.grain(my, mx))

    def _ventricles(
        self,
        canvas: Canvas,
        mx: FloatArray,
        my: FloatArray,
        s0: FloatArray,
        z: float,
        size: float,
        epi_ed: float,
        endo_ed: float,
    ) -> None:
        """The heart at end diastole, in its own coordinates: relative to the centre of the LV."""
        e, t = canvas.edge, self.tissues
        grain, cloud = self.grain(my, mx + z), self.cloud(my + z, mx)
        ux, uy = np.cos(self.rv_angle), np.sin(self.rv_angle)
        along, across = ux * mx + uy * my, -uy * mx + ux * my
        sac = (
            np.minimum(ellipse(along - 0.020 * size, across, 0.048 * size, 0.053 * size, 2.2), s0 - epi_ed - 0.003)
            + 0.0015 * cloud
        )
        canvas.paint(soft(sac - 0.0015, e), t["muscle"], LABELS["pericardium"], -0.3)
        canvas.paint(soft(sac, e), t["fat"], LABELS["pericardium"], 0.12 * cloud)
        rv = ellipse(along - 0.023 * size, across + 0.15 * along, 0.0385 * size, 0.046 * size, 1.8) + 0.0012 * cloud
        rv_wall = np.maximum(rv, -(s0 - epi_ed + 0.001))
        canvas.paint(soft(rv_wall, e), t["myocardium"], LABELS["rv_wall"], 0.06 * grain)
        trabeculae = 0.0012 * self.strand(my, mx) * (across > -0.02)
        rv_cavity = np.maximum(rv + 0.0035 + trabeculae, -(s0 - epi_ed))
        flow = 0.08 * cloud + 0.02 * grain
        canvas.paint(soft(rv_cavity, e), t["blood"], LABELS["rv_blood"], flow)
        bands = (
            soft((np.abs(self.vein(my, mx)) - 0.10) * 0.006, e)
            * soft(rv_cavity + 0.002, e)
            * soft(-(rv_cavity + 0.013), 3 * e)
        )
        canvas.paint(0.8 * bands, t["myocardium"], LABELS["rv_wall"])
        canvas.paint(soft(s0 - epi_ed, e), t["myocardium"], LABELS["myocardium"], 0.07 * grain + 0.05 * cloud, 0.025 * cloud)
        rough = 0.0010 * self.strand(my * 1.3, mx * 1.3)
        canvas.paint(soft(s0 - endo_ed + rough, e), t["blood"], LABELS["lv_blood"], 0.07 * cloud + 0.02 * grain)


def _range(axis: FloatArray, low: float, high: float) -> tuple[int, int]:
    return int(np.searchsorted(axis, low)), int(np.searchsorted(axis, high))
