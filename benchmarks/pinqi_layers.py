"""Question: what do PINQI's two solver layers cost, forwards and backwards, and how exact are they?

One slice of 192 x 192, 5 saturation delays, 8 coils, random lines at 8x; layers as in one iteration of the network: the previous
images as first guess, a prior some per cent off. ``--batch 8 --device cuda`` is the same on a GPU.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.common import print_table, write_result
from benchmarks.pinqi_speed import timed
from recon_core.operators.batched_sense import BatchedSense
from recon_core.signal_models import SaturationRecovery
from recon_core.simulation.coils import biot_savart_maps
from recon_core.simulation.phantoms import Grid, centred_axis
from recon_core.solvers.linear_layer import LinearSettings, solve_linear
from recon_core.solvers.nonlinear_layer import NonlinearSettings, solve_nonlinear

Tensor = torch.Tensor
MODEL = SaturationRecovery((0.5, 1.0, 1.5, 2.0, 8.0))
BOUNDS = ((-2.0, -2.0, -1.0), (3.0, 2.0, 10.0))  # of the authors' code
START = (0.9, 0.0, 0.8)
WEIGHTS = (0.1, 0.2)  # lambda_q and lambda_y of the first iteration
N_CENTRE, ACCELERATION = 8, 8
DISCS = (  # centre y, x, half axes, |M0|, T1 in s: a head of two tissues, fluid, fat
    (0.0, 0.0, 0.85, 0.7, 0.9, 0.4),
    (0.0, 0.0, 0.78, 0.63, 0.85, 1.6),
    (0.05, 0.0, 0.55, 0.45, 0.7, 1.1),
    (-0.1, 0.15, 0.2, 0.08, 0.95, 3.0),
    (-0.1, -0.15, 0.2, 0.08, 0.95, 3.0),
)


@dataclass(frozen=True)
class Scene:
    """Truth and measurement, ``(batch, ..., x, y)``."""

    operator: BatchedSense
    maps: Tensor
    rhs: Tensor
    images: Tensor
    parameters: Tensor
    prior: Tensor


def head(n: int) -> Tensor:
    """``(Re M0, Im M0, R1)``, float32 ``(3, y, x)``; outside M0 = 0 and R1 = 1/s."""
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, n),) * 2, indexing="ij")
    m0, r1 = torch.zeros(n, n), torch.ones(n, n)
    for cy, cx, ry, rx, amplitude, t1 in DISCS:
        inside = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
        m0, r1 = torch.where(inside, amplitude, m0), torch.where(inside, 1 / t1, r1)
    phase = 0.6 * x - 0.4 * y * x
    return torch.stack((m0 * torch.cos(phase), m0 * torch.sin(phase), r1))


def scene(batch: int, n: int, n_coils: int, device: str) -> Scene:
    """A head behind loops of wire, sampled as in training: the centre and random lines, denser inside."""
    generator = torch.Generator().manual_seed(3)
    grid = Grid(np.zeros(1), centred_axis(n, 0.24), centred_axis(n, 0.24))
    maps = [torch.from_numpy(biot_savart_maps(grid, n_coils, np.random.default_rng(b))[0][:, 0]) for b in range(batch)]
    position = (torch.arange(n) - n // 2).abs() / (n / 2)
    density = torch.exp(-0.5 * (position / 0.2) ** 2) + 1 / (2 * ACCELERATION)
    density[position < N_CENTRE / n] = 0
    rows = density.expand(batch * MODEL.n_states, n)
    lines = torch.multinomial(rows, n // ACCELERATION - N_CENTRE, generator=generator)
    sampling = torch.zeros(rows.shape).scatter_(1, lines, 1.0)
    sampling[:, n // 2 - N_CENTRE // 2 : n // 2 + N_CENTRE // 2] = 1
    p = head(n).mT.expand(batch, 3, n, n).to(device)
    coil_maps = torch.stack(maps).to(device)
    operator = BatchedSense(coil_maps, sampling.reshape(batch, MODEL.n_states, n).to(device))
    images = MODEL.signal(p.movedim(1, 0)).movedim(0, 1)
    prior = p + 0.05 * torch.randn(p.shape, generator=generator).to(device)
    return Scene(operator, coil_maps, operator.normal(images), images, p.contiguous(), prior)


def linear_terms(s: Scene) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(s.images.shape, dtype=s.images.dtype, generator=generator).to(s.images.device)
    return [
        (torch.tensor(WEIGHTS[0], device=noise.device), s.images + 0.05 * noise),
        (torch.tensor(WEIGHTS[1], device=noise.device), s.images + 0.05 * noise.flip(-1)),
    ]


def linear_rows(s: Scene, repeats: int) -> list[list[Any]]:
    """CG forwards and backwards, with and without the coil maps' gradient."""
    terms, device = linear_terms(s), s.images.device.type
    rows: list[list[Any]] = [["normal operator, once", *timed(lambda: s.operator.normal(s.images), device, repeats), ""]]
    for name, initial in (("from zero", None), ("from the previous images", terms[1][1])):
        with torch.no_grad():
            _, report = solve_linear(s.operator, s.rhs, terms, initial=initial)

            def forward(initial: Tensor | None = initial) -> None:
                solve_linear(s.operator, s.rhs, terms, initial=initial)

            rows.append([f"CG forward, {name}", *timed(forward, device, repeats), f"{int(report.iterations.max())} steps"])
    for name, with_maps in (("images and lambdas", False), ("coil maps too", True)):
        maps = s.maps.clone().requires_grad_(with_maps)
        operator = BatchedSense(maps, s.operator.weights) if with_maps else s.operator
        leaves = [(w.clone().requires_grad_(), x.clone().requires_grad_()) for w, x in terms]
        x, report = solve_linear(operator, s.rhs.clone().requires_grad_(), leaves)

        def backward(x: Tensor = x) -> None:
            x.backward(s.images, retain_graph=True)

        times = timed(backward, device, repeats)
        assert report.gradient_iterations is not None
        rows.append([f"CG backward, {name}", *times, f"{int(report.gradient_iterations.max())} steps"])
    return rows


def nonlinear_rows(s: Scene, repeats: int) -> list[list[Any]]:
    """The fit per pixel, both solvers, and its gradient."""
    rows: list[list[Any]] = []
    device = s.images.device.type
    generator = torch.Generator().manual_seed(5)
    data = s.images + 0.02 * torch.randn(s.images.shape, dtype=s.images.dtype, generator=generator).to(s.images.device)
    far = torch.tensor(START, device=data.device).reshape(1, 3, 1, 1).expand_as(s.prior).contiguous()
    double = (data.to(torch.complex128), s.prior.double())
    tight = NonlinearSettings(tolerance=1e-10, max_iterations=300)
    for weight in (3.0, 0.05):
        exact, _ = solve_nonlinear(MODEL, *double, weight, bounds=BOUNDS, settings=tight)
        for name, start in (("prior", s.prior), ("far", far)):
            for solver in ("lm", "lbfgs"):
                settings = NonlinearSettings(solver=solver)
                leaves = [t.clone().requires_grad_() for t in (data, s.prior, torch.tensor(weight, device=data.device))]

                def forward(
                    start: Tensor = start, settings: NonlinearSettings = settings, leaves: list[Tensor] = leaves
                ) -> Any:
                    return solve_nonlinear(MODEL, *leaves, initial=start, bounds=BOUNDS, settings=settings)

                p, report = forward()
                forwards = timed(forward, device, repeats)
                backwards = timed(lambda p=p: p.backward(s.parameters, retain_graph=True), device, repeats)  # type: ignore[misc]
                error = (p.detach() - exact).square().mean().sqrt()
                counts = (int(report.iterations.max()), report.n_unconverged, report.n_singular)
                rows.append([weight, name, solver, *forwards, *backwards, *counts, float(error)])
    return rows


def tolerance_rows(s: Scene) -> list[list[Any]]:
    """How the error of solution and gradient follows CG's tolerance, in single precision, against double precision."""

    def solved(tolerance: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
        operator = BatchedSense(s.maps.to(dtype), s.operator.weights)
        (w1, x1), (w2, x2) = linear_terms(s)
        leaf = x1.to(dtype).requires_grad_()
        terms = [(w1.to(leaf.real.dtype), leaf), (w2.to(leaf.real.dtype), x2.to(dtype))]
        settings = LinearSettings(tolerance=tolerance)
        x, report = solve_linear(operator, s.rhs.to(dtype), terms, settings=settings)
        x.backward((x - s.images).detach())
        assert leaf.grad is not None
        return x.detach(), leaf.grad, int(report.iterations.max())

    x, gradient, _ = solved(1e-12, torch.complex128)
    rows: list[list[Any]] = []
    for tolerance in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        found, of_image, steps = solved(tolerance, torch.complex64)
        errors = [
            float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))
            for a, b in ((found, x), (of_image, gradient))
        ]
        rows.append([tolerance, steps, *errors])
    return rows


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    s = scene(options.batch, options.size, 8, options.device)
    what = f"{options.batch} x {options.size} x {options.size} x 5 states x 8 coils, {options.device}, {options.threads} thread(s)"
    tables: dict[str, tuple[str, list[str], list[list[Any]]]] = {
        "linear": (f"Linear layer, {what}", ["part", "wall s", "processor s", "remark"], linear_rows(s, options.repeats)),
        "nonlinear": (
            f"Nonlinear layer, {what}",
            [
                "lambda",
                "start",
                "solver",
                "forward s",
                "processor s",
                "backward s",
                "processor s ",
                "steps",
                "unfinished",
                "no gradient",
                "RMS error",
            ],
            nonlinear_rows(s, options.repeats),
        ),
        "tolerance": (
            "CG in single precision against double",
            ["tolerance", "steps", "solution nRMSE", "gradient nRMSE"],
            tolerance_rows(s),
        ),
    }
    document: dict[str, Any] = {"settings": vars(options)}
    for name, (title, columns, rows) in tables.items():
        print_table(title, columns, rows)
        document[name] = [dict(zip(columns, row, strict=True)) for row in rows]
    write_result("pinqi_layers" if options.device == "cpu" else f"pinqi_layers_{options.device.partition(':')[0]}", document)


if __name__ == "__main__":
    main()
