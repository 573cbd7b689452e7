"""PINQI's unrolled network: two subproblems solved in turn, each pulled towards the prediction of a network.

    y_i = argmin |A y - k|^2 + lambda_y |y - Y(y_{i-1})|^2 + lambda_q |y - q(p_{i-1})|^2          (Eq. 12)
    p_i = argmin |q(p) - y_i|^2 + lambda_p |p - P(y_i)|^2                                         (Eq. 13)

for any signal model ``q`` and any linear acquisition ``A``. Both networks are the same in all iterations; the lambdas are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from recon_core.errors import DataError, SettingError
from recon_core.methods.pinqi.networks import (
    FITTED_RATES,
    PREDICTIONS,
    SOFTPLUS_BETA,
    ImageNet,
    ParameterNet,
    ParameterRange,
    new_embedding,
    ranges_of,
)
from recon_core.operators.linear import LinearOperator
from recon_core.signal_models import SignalModel
from recon_core.solvers.linear_layer import LinearReport, LinearSettings, solve_linear
from recon_core.solvers.nonlinear_layer import NonlinearReport, NonlinearSettings, solve_nonlinear

Tensor = torch.Tensor

HOW_OFTEN = ("each", "once", "none")
PARAMETER_SOLVERS = ("layer", "gradient", "network")
PRECISIONS = ("float32", "bfloat16")
STARTS = ("adjoint", "llr", "refined")
FIRST_STEPS = 2  # of CG, unregularised, before anything is learned
FIT_STEPS = 12  # of the fit to averaged images: enough wherever there is signal
LEAST_FITTED = 0.03  # RMS over states of averaged images of which a fit says something, where images are about 1
FIRST_STEP_SIZE = 0.05  # of ablation e, in the units of Eq. 13; below 1 / (largest curvature)

PUBLISHED_BOUNDS = {"m0_real": (-2.0, 2.0), "m0_imag": (-2.0, 2.0), "r1": (-1.0, 20.0)}
"""Section III-B; wider than anything plausible."""


@dataclass(frozen=True)
class PinqiSettings:
    """What the unrolled network consists of; the defaults are the proposed method, `ABLATIONS` its variants.

    Attributes
    ----------
    n_iterations
        T, alternations between the subproblems.
    image_network, parameter_network
        ``"each"`` iteration, ``"once"`` at the start, or ``"none"`` (then its lambda is zero).
    parameter_solver
        ``"layer"``: Eq. 13 solved, implicit gradient. ``"gradient"``: a few steps of gradient descent with learned sizes and
        ordinary automatic differentiation. ``"network"``: the network's prediction is taken as the solution.
    coupled
        Whether Eq. 12 knows the signal model. If not, lambda_q is zero and parameters are found once, from the last images.
    n_gradient_steps
        For ``parameter_solver="gradient"``, per alternation.
    start
        ``y_0``: ``"adjoint"``, two steps of conjugate gradients from ``A^H k`` as published; ``"llr"``, the images of the locally low
        rank reconstruction, or ``"refined"``, these filtered in turn with data consistency. With both the networks have only to find
        what is left, which takes far less training.
    prediction
        Of the parameter network: ``"direct"`` as published, or ``"kernel"``: it weights each pixel's neighbours, and the model is
        fitted to the weighted images. See `ParameterNet`.
    precision
        ``"bfloat16"`` lets the networks, and only them, compute in mixed precision.
    recompute
        Do not keep the networks' activations for the backward pass but compute them again: less memory, a third more time.
    """

    n_iterations: int = 5
    image_network: str = "each"
    parameter_network: str = "each"
    parameter_solver: str = "layer"
    coupled: bool = True
    n_gradient_steps: int = 5
    start: str = "adjoint"
    prediction: str = "direct"
    precision: str = "float32"
    recompute: bool = False

    def __post_init__(self) -> None:
        for name, known in (
            ("image_network", HOW_OFTEN),
            ("parameter_network", HOW_OFTEN),
            ("parameter_solver", PARAMETER_SOLVERS),
            ("start", STARTS),
            ("prediction", PREDICTIONS),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in known:
                raise SettingError(
                    "unknown choice", where=f"PINQI.{name}", got=getattr(self, name), expected=", ".join(known)
                )
        if self.n_iterations < 1 or self.n_gradient_steps < 1:
            raise SettingError("at least one iteration", where="PINQI", got=(self.n_iterations, self.n_gradient_steps))
        if self.parameter_solver == "network" and self.parameter_network == "none":
            raise SettingError(
                "nothing would find the parameters", where="PINQI", expected="a parameter network or a solver"
            )

    @property
    def image_tags(self) -> tuple[float, ...]:
        """What the image network is told in its calls, the first of which sees ``y_0``."""
        n = self.n_iterations
        calls = {"each": n, "once": 1, "none": 0}[self.image_network]
        return tuple((i + 1) / n for i in range(calls))

    @property
    def parameter_tags(self) -> tuple[float, ...]:
        """What the parameter network is told in its calls: 0 with ``y_0``, then 1 more than the image network of the iteration."""
        if self.parameter_network == "none":
            return ()
        if not self.coupled:
            return (2.0,)
        n = self.n_iterations
        return (0.0, *((i + 1) / n + 1 for i in range(n if self.parameter_network == "each" else 0)))


ABLATIONS: Mapping[str, PinqiSettings] = MappingProxyType(
    {
        "proposed": PinqiSettings(),
        "a": PinqiSettings(coupled=False, parameter_solver="network"),
        "b": PinqiSettings(image_network="none"),
        "c": PinqiSettings(parameter_network="none"),
        "d": PinqiSettings(parameter_solver="network"),
        "e": PinqiSettings(parameter_solver="gradient"),
        "f": PinqiSettings(image_network="once", parameter_network="once"),
        "g1": PinqiSettings(n_iterations=1),
        "g2": PinqiSettings(n_iterations=2),
        "h": PinqiSettings(coupled=False, parameter_network="none"),
        "i": PinqiSettings(coupled=False, parameter_network="none"),
    }
)
"""Section III-D: a no signal function, b no image-space, c no parameter-space regularisation, d no nonlinear solver, e gradient
descent, f networks applied once, g one or two iterations, h separate and i end-to-end regression (the same network, trained on
images and on parameters)."""


@dataclass(frozen=True)
class Strengths:
    """Factors on the learned lambdas: below 1 the data count for more than what was learned.

    Attributes
    ----------
    image, signal
        Of lambda_y and lambda_q (Eq. 12); numbers or scalars.
    parameter
        Of lambda_p (Eq. 13).
    noise
        Standard deviation of a complex sample where images are about 1, for a kernel to tell texture from noise; infinite: unknown.
    """

    image: float | Tensor = 1.0
    signal: float | Tensor = 1.0
    parameter: float | Tensor = 1.0
    noise: float = math.inf


AS_LEARNED = Strengths()


@dataclass(frozen=True)
class PinqiOutput:
    """What comes out, in the operator's image layout.

    Attributes
    ----------
    parameters
        real ``(batch, parameter, *plane)``: the last iteration's.
    images
        ``(batch, state, *plane)``: ``y_T``.
    predictions
        Everything deep supervision looks at, the last one being ``parameters``: the parameter network's first output, where
        there is one, then the result of every iteration.
    linear, nonlinear
        How well each subproblem was solved, per iteration; without a parameter network a first fit comes before them.
    image_predictions
        What the image network gave, in order of its calls.
    fits
        How the model was fitted to the averaged images of every prediction by ``"kernel"``: pixels with signal in one axis.
    """

    parameters: Tensor
    images: Tensor
    predictions: tuple[Tensor, ...]
    linear: tuple[LinearReport, ...] = ()
    nonlinear: tuple[NonlinearReport, ...] = ()
    image_predictions: tuple[Tensor, ...] = ()
    fits: tuple[NonlinearReport, ...] = ()


class PositiveValues(nn.Module):
    """Learned positive numbers ``softplus(5 raw) / 5``.

    Parameters
    ----------
    initial
        Their first values.
    """

    def __init__(self, initial: Sequence[float]) -> None:
        super().__init__()
        values = torch.tensor(initial, dtype=torch.float64)
        raw = values + torch.log(-torch.expm1(-SOFTPLUS_BETA * values)) / SOFTPLUS_BETA  # the softplus' inverse
        self.raw = nn.Parameter(raw.float())

    def forward(self) -> Tensor:
        return functional.softplus(self.raw, beta=SOFTPLUS_BETA)


class Pinqi(nn.Module):
    """The unrolled network.

    Parameters
    ----------
    model
        Signal model ``q``.
    settings
        The variant.
    ranges
        Where the parameter network looks for each parameter; those of `PUBLISHED_RANGES` if ``None``.
    bounds
        Lower and upper of each parameter; those of `PUBLISHED_BOUNDS`, else infinite, if ``None``.
    linear, nonlinear
        Tolerances of the two solvers.
    networks
        Keywords for `ParameterNet` and `ImageNet` under ``"parameter"`` and ``"image"``, for smaller ones.
    """

    def __init__(
        self,
        model: SignalModel,
        settings: PinqiSettings | None = None,
        *,
        ranges: Sequence[ParameterRange] | None = None,
        bounds: tuple[Sequence[float], Sequence[float]] | None = None,
        linear: LinearSettings | None = None,
        nonlinear: NonlinearSettings | None = None,
        networks: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.model, self.settings = model, settings or PinqiSettings()
        self.linear, self.nonlinear = linear or LinearSettings(), nonlinear or NonlinearSettings()
        names = model.parameter_names
        looked = tuple(ranges) if ranges is not None else ranges_of(names)
        infinite = (-torch.inf, torch.inf)
        lower, upper = zip(*(PUBLISHED_BOUNDS.get(n, infinite) for n in names), strict=True)
        self.bounds: tuple[Sequence[float], Sequence[float]] = bounds or (lower, upper)
        n = self.settings.n_iterations
        self.register_buffer("middle", torch.tensor([r.offset for r in looked]), persistent=False)
        self.parameter_net = self.embedding = self.image_net = None
        self.lambda_p = self.lambda_y = self.lambda_q = self.step_sizes = None
        # found once, at the end, parameters have one lambda
        n_solved = n if self.settings.coupled else 1
        if self.settings.parameter_network != "none":
            self.parameter_net = ParameterNet(
                model.n_states,
                looked,
                is_complex=model.is_complex,
                prediction=self.settings.prediction,
                **networks.get("parameter", {}),
            )
            self.embedding = new_embedding()
            if self.settings.parameter_solver != "network":
                self.lambda_p = PositiveValues([3.0] * n_solved)
        if self.settings.image_network != "none":
            self.image_net = ImageNet(is_complex=model.is_complex, **networks.get("image", {}))
            self.lambda_y = PositiveValues([0.1] * n)
        if self.settings.coupled:
            self.lambda_q = PositiveValues([0.1 + 0.05 * i for i in range(1, n + 1)])
        if self.settings.parameter_solver == "gradient":
            self.step_sizes = PositiveValues([FIRST_STEP_SIZE] * n_solved)

    middle: Tensor
    parameter_net: ParameterNet | None
    image_net: ImageNet | None

    def forward(
        self, operator: LinearOperator, rhs: Tensor, start: Tensor | None = None, strengths: Strengths = AS_LEARNED
    ) -> PinqiOutput:
        """Reconstruct.

        Parameters
        ----------
        operator
            ``A`` on images of the layout of ``rhs``.
        rhs
            ``A^H k``, ``(batch, state, *plane)`` with two axes in the plane, scaled so that images are about 1.
        start
            ``y_0`` like ``rhs``, see `first_images`.
        strengths
            Factors on the lambdas.

        Raises
        ------
        DataError
            Another number of states than the model's.
        """
        if rhs.ndim != 4 or rhs.shape[1] != self.model.n_states:
            raise DataError(
                "wrong images",
                where="PINQI",
                got=tuple(rhs.shape),
                expected=f"(batch, {self.model.n_states} states, *plane)",
                remedy="use weights trained for this number of states",
            )
        y = self.first_images(operator, rhs, start)
        solve = self._coupled if self.settings.coupled else self._decoupled
        return solve(operator, rhs, y, strengths)

    def first_images(self, operator: LinearOperator, rhs: Tensor, start: Tensor | None = None) -> Tensor:
        """``y_0``, no gradient: two steps of conjugate gradients from ``A^H k``, or what is given where the settings ask for it.

        Raises
        ------
        DataError
            ``start`` is missing, or of another shape.
        """
        if self.settings.start != "adjoint":
            if start is None or start.shape != rhs.shape:
                got = None if start is None else tuple(start.shape)
                raise DataError("these weights begin with given images", where="PINQI", got=got, expected=tuple(rhs.shape))
            return start.detach()
        steps = LinearSettings(tolerance=self.linear.tolerance, max_iterations=FIRST_STEPS)
        with torch.no_grad(), record_function("pinqi::linear"):
            return solve_linear(operator, rhs, initial=rhs, settings=steps)[0]

    def predict_parameters(
        self, images: Tensor, tag: float | Tensor, noise: float = math.inf, fits: list[NonlinearReport] | None = None
    ) -> Tensor:
        """``P(y, tag)``, ``(batch, parameter, *plane)``; ``tag`` a number or one per sample. ``fits`` gets what a fit reports."""
        assert self.parameter_net is not None and self.embedding is not None
        net, embedding = self.parameter_net, self.embedding
        tags = self._tags(images, tag)
        if self.settings.prediction == "direct":
            return self._network("parameter", lambda y, t: net(y, t, embedding(t)), images, tags)
        averages = self._network("parameter", lambda y, t: net.averaged(y, t, embedding(t), noise), images, tags)
        return self._fitted(averages, [] if fits is None else fits)

    def _fitted(self, images: Tensor, fits: list[NonlinearReport]) -> Tensor:
        """The model fitted to each pixel of averaged images, ``(batch, parameter, *plane)``, differentiable; see `no_signal`."""
        result = self.no_signal(images)
        where = images.detach().abs().square().mean(1) > LEAST_FITTED**2
        if not bool(where.any()):
            return result
        pixels = images.movedim(1, 0)[:, where][None]  # (1, state, pixel)
        start = self.middle[:, None].expand(-1, pixels.shape[-1])[None].contiguous()
        settings = NonlinearSettings(max_iterations=FIT_STEPS)
        with record_function("pinqi::nonlinear"):
            fitted, report = solve_nonlinear(
                self.model, pixels, torch.zeros_like(start), 0.0, initial=start, bounds=self.bounds, settings=settings
            )
        fits.append(report)
        planes = [
            plane.clamp(*FITTED_RATES) if is_rate else plane for is_rate, plane in zip(self._rates, fitted[0], strict=True)
        ]
        return result.movedim(1, 0).masked_scatter(where, torch.stack(planes)).movedim(0, 1).contiguous()

    @property
    def predicted_rates(self) -> tuple[float, float] | None:
        """Limits of a fitted prediction of R1 in 1/s; ``None`` where nothing holds it."""
        fitted = self.parameter_net is not None and self.settings.prediction == "kernel"
        return FITTED_RATES if fitted else None

    @property
    def _rates(self) -> list[bool]:
        return [name.startswith("r") for name in self.model.parameter_names]

    def no_signal(self, images: Tensor) -> Tensor:
        """Parameters like ``images`` ``(batch, state, *plane)`` where there is no signal: amplitudes of zero, rates as expected."""
        middle = torch.where(torch.tensor(self._rates, device=images.device), self.middle, 0.0)
        return middle[:, None, None].expand(len(images), -1, *images.shape[2:]).contiguous()

    def predict_images(self, images: Tensor, tag: float | Tensor) -> Tensor:
        """``y + Y(y, tag)``; ``tag`` a number or one per sample."""
        assert self.image_net is not None
        return self._network("image", self.image_net, images, self._tags(images, tag))

    def _tags(self, images: Tensor, tag: float | Tensor) -> Tensor:
        return torch.as_tensor(tag, dtype=self.middle.dtype, device=images.device).expand(len(images))

    def _network(self, name: str, net: Callable[[Tensor, Tensor], Tensor], images: Tensor, tags: Tensor) -> Tensor:
        mixed = self.settings.precision == "bfloat16"
        with (
            record_function(f"pinqi::{name}_net"),
            torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=mixed),
        ):
            if self.settings.recompute and torch.is_grad_enabled():
                return checkpoint(net, images, tags, use_reentrant=False)
            return net(images, tags)

    # ------------------------------------------------------------------------------------------------- the two loops

    def _coupled(self, operator: LinearOperator, rhs: Tensor, y: Tensor, strengths: Strengths) -> PinqiOutput:
        settings = self.settings
        image_tags, parameter_tags = settings.image_tags, settings.parameter_tags
        predictions, linear = [], []
        imagined: list[Tensor] = []
        nonlinear: list[NonlinearReport] = []
        fits: list[NonlinearReport] = []
        y_reg = self.predict_images(y, image_tags[0]) if settings.image_network == "once" else None
        imagined += [y_reg] if y_reg is not None else []
        if self.parameter_net is not None:
            p_reg = p = self.predict_parameters(y, parameter_tags[0], strengths.noise, fits)
            predictions.append(p)
        else:
            p_reg = None
            p, fitted = self._solve_parameters(y, None, None, 0, strengths)
            nonlinear += [fitted] if fitted is not None else []
        for i in range(settings.n_iterations):
            if settings.image_network == "each":
                y_reg = self.predict_images(y, image_tags[i])
                imagined.append(y_reg)
            y, solved = self._solve_images(operator, rhs, y, y_reg, self._signal(p), i, strengths)
            linear.append(solved)
            if settings.parameter_network == "each":
                p_reg = self.predict_parameters(y, parameter_tags[i + 1], strengths.noise, fits)
            p, fitted = self._solve_parameters(y, p_reg, p, i, strengths)
            predictions.append(p)
            nonlinear += [fitted] if fitted is not None else []
        return PinqiOutput(p, y, tuple(predictions), tuple(linear), tuple(nonlinear), tuple(imagined), tuple(fits))

    def _decoupled(self, operator: LinearOperator, rhs: Tensor, y: Tensor, strengths: Strengths) -> PinqiOutput:
        settings, image_tags = self.settings, self.settings.image_tags
        linear = []
        imagined: list[Tensor] = []
        fits: list[NonlinearReport] = []
        y_reg = self.predict_images(y, image_tags[0]) if settings.image_network == "once" else None
        imagined += [y_reg] if y_reg is not None else []
        for i in range(settings.n_iterations):
            if settings.image_network == "each":
                y_reg = self.predict_images(y, image_tags[i])
                imagined.append(y_reg)
            y, solved = self._solve_images(operator, rhs, y, y_reg, None, i, strengths)
            linear.append(solved)
        p_reg = (
            self.predict_parameters(y, settings.parameter_tags[0], strengths.noise, fits)
            if self.parameter_net is not None
            else None
        )
        p, fitted = self._solve_parameters(y, p_reg, None, 0, strengths)
        return PinqiOutput(p, y, (p,), tuple(linear), () if fitted is None else (fitted,), tuple(imagined), tuple(fits))

    def _signal(self, parameters: Tensor) -> Tensor:
        return self.model.signal(parameters.movedim(1, 0)).movedim(0, 1)

    # ------------------------------------------------------------------------------------------------ the subproblems

    def _solve_images(
        self,
        operator: LinearOperator,
        rhs: Tensor,
        y: Tensor,
        y_reg: Tensor | None,
        signal: Tensor | None,
        i: int,
        strengths: Strengths,
    ) -> tuple[Tensor, LinearReport]:
        """Eq. 12 from the previous images ``y``."""
        terms: list[tuple[Tensor | float, Tensor]] = []
        if signal is not None and self.lambda_q is not None:
            terms.append((strengths.signal * self.lambda_q()[i], signal))
        if y_reg is not None and self.lambda_y is not None:
            terms.append((strengths.image * self.lambda_y()[i], y_reg))
        with record_function("pinqi::linear"):
            return solve_linear(operator, rhs, terms, initial=y.detach(), settings=self.linear)

    def _solve_parameters(
        self, y: Tensor, p_reg: Tensor | None, previous: Tensor | None, i: int, strengths: Strengths
    ) -> tuple[Tensor, NonlinearReport | None]:
        """Eq. 13 from the previous parameters, else from the prediction, else from the middle of the expected range."""
        if p_reg is not None and self.settings.parameter_solver == "network":
            return p_reg, None
        start = previous if previous is not None else p_reg
        if start is None:
            start = self.middle[:, None, None].expand(len(y), -1, *y.shape[2:]).contiguous()
        # without a prediction there is nothing to be near to
        weight = strengths.parameter * self.lambda_p()[i] if p_reg is not None and self.lambda_p is not None else 0.0
        prior = p_reg if p_reg is not None else torch.zeros_like(start)
        with record_function("pinqi::nonlinear"):
            if self.settings.parameter_solver == "gradient":
                return self._descend(y, prior, weight, start, i), None
            return solve_nonlinear(
                self.model, y, prior, weight, initial=start.detach(), bounds=self.bounds, settings=self.nonlinear
            )

    def _descend(self, y: Tensor, prior: Tensor, weight: Tensor | float, p: Tensor, i: int) -> Tensor:
        """Ablation e: gradient descent on Eq. 13, differentiated step by step; parameters are kept within the bounds."""
        assert self.step_sizes is not None
        step = self.step_sizes()[i]
        lower, upper = (torch.as_tensor(b, dtype=p.dtype, device=p.device)[:, None, None] for b in self.bounds)
        for _ in range(self.settings.n_gradient_steps):
            signal, jacobian = self.model.signal_and_jacobian(p.movedim(1, 0))  # (state, ...), (state, parameter, ...)
            residual = (signal - y.movedim(1, 0))[:, None]
            pull = (jacobian.conj() * residual).real.sum(0).movedim(0, 1)
            p = torch.clamp(p - 2 * step * (pull + weight * (p - prior)), lower, upper)
        return p
