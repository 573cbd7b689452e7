"""The representation G_theta(r, q) of Eq. 5-21: a background, K spatial experts, a residual branch, and how states mix them.

Every variant is one small matrix times a few images: ``x_q(r) = sum_n m_qn c_n(r)``, with the components c (background,
experts, residual basis) and the mixing matrix m = [1, alpha, gamma beta] (state x component). The fit uses exactly this form.
"""

from __future__ import annotations

import math

import torch

from recon_core.errors import DataError, SettingError
from recon_core.methods.moe_dqinr.configurations import Configuration, MlpShape
from recon_core.methods.moe_dqinr.encoding import HashGrid
from recon_core.methods.moe_dqinr.networks import Branches, state_features

Tensor = torch.Tensor

VARIANTS = ("full", "residual_only", "no_residual")
"""Table 4: MoE + residual, residual only (the residual branch replaces the experts; the background stays), MoE without it."""


class PixelGrid:
    """Which pixels of working images exist, and the way between their values and images.

    Parameters
    ----------
    shape
        ``(x, z, y)`` of the images.
    chosen
        int64 indices into the flattened image; all if ``None``.
    """

    def __init__(self, shape: tuple[int, ...], chosen: Tensor | None) -> None:
        self.shape, self.chosen = shape, chosen

    def as_images(self, values: Tensor) -> Tensor:
        """Real pairs ``(n, pixel, 2)`` to complex images ``(n, x, z, y)``, zero at the other pixels."""
        if self.chosen is not None:
            values = values.new_zeros(len(values), math.prod(self.shape), 2).index_copy(1, self.chosen, values)
        return torch.view_as_complex(values.contiguous()).reshape(len(values), *self.shape)

    def as_values(self, images: Tensor) -> Tensor:
        """Adjoint of ``as_images``."""
        values = torch.view_as_real(images).reshape(len(images), -1, 2)
        return values if self.chosen is None else values[:, self.chosen]

    def columns(self, first: int, step: int, device: torch.device) -> tuple[PixelGrid, Tensor]:
        """The grid of the x positions ``first, first + step, ...``, and its pixels as indices into the whole image."""
        n_x, n_z, n_y = self.shape
        every = torch.arange(n_x * n_y, device=device) if self.chosen is None else self.chosen
        column, row = torch.div(every, n_y, rounding_mode="floor"), every % n_y
        mine = column % step == first
        inside = torch.div(column[mine], step, rounding_mode="floor") * n_y + row[mine]
        return PixelGrid((len(range(first, n_x, step)), n_z, n_y), inside), every[mine]


class MoeField(torch.nn.Module):
    """MoE-dqINR on the fixed grid of one slice.

    Parameters
    ----------
    configuration
        Layer sizes; ``DYNAMIC`` and ``QUANTITATIVE`` are the published ones.
    n_states
        Q, in the order in which the paper wants them: frames in time, contrasts by inversion time.
    spatial_shape
        ``(x, z, y)`` of a working image (``CartesianSense.image_shape[1:]``), with z = 1.
    variant
        One of ``VARIANTS``. A configuration without residual branch is ``no_residual`` whatever ``full`` says.
    generator
        CPU generator of the initial parameters; torch's default one if ``None``.
    device, dtype
        Where and in which precision the parameters live.
    support
        bool ``(x, z, y)``, working order: the pixels that exist for the representation, the others are zero (air costs as much
        as tissue). All if ``None``, as in the paper.

    Raises
    ------
    DataError
        A slab (z > 1): the paper's coordinate is (x, y); reconstruct it slice by slice.
    SettingError
        Unknown variant, or ``residual_only`` of a configuration without residual branch.
    """

    def __init__(
        self,
        configuration: Configuration,
        n_states: int,
        spatial_shape: tuple[int, ...],
        variant: str = "full",
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        support: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_shape(n_states, spatial_shape)
        if support is not None and (tuple(support.shape) != tuple(spatial_shape) or not bool(support.any())):
            raise DataError(
                "not a support", where="moe_dqinr", got=tuple(support.shape), expected=f"some pixels of {spatial_shape}"
            )
        if variant not in VARIANTS:
            raise SettingError(
                "no such variant", where="moe_dqinr", got=repr(variant), expected="one of " + ", ".join(VARIANTS)
            )
        if variant == "residual_only" and configuration.residual is None:
            raise SettingError("this configuration has no residual branch", where="moe_dqinr", got=configuration.name)
        self.configuration, self.variant = configuration, variant
        self.n_states, self.spatial_shape = n_states, tuple(spatial_shape)
        width, _, height = spatial_shape
        pixels = None if support is None else support.flatten().nonzero()[:, 0].to(device)
        self.pixels = PixelGrid(self.spatial_shape, pixels)
        c = configuration
        self.encoder = HashGrid(c.grid, height, width, generator, device, dtype, pixels)
        features = state_features(n_states, c.harmonics, device, dtype)
        self.state_features: Tensor
        self.register_buffer("state_features", features, persistent=False)

        def spatial(n_branches: int, shape: MlpShape) -> Branches:
            return Branches(n_branches, c.grid.width, shape, 2, generator, device, dtype)

        def head(shape: MlpShape, n_outputs: int) -> Branches:
            return Branches(1, int(features.shape[1]), shape, n_outputs, generator, device, dtype)

        self.background = spatial(1, c.background)
        self.experts: Branches | None = None
        self.router: Branches | None = None
        self.residual: Branches | None = None
        self.coefficients: Branches | None = None
        if variant != "residual_only":
            self.experts, self.router = spatial(c.n_experts, c.expert), head(c.router, c.n_experts)
        if variant != "no_residual" and c.residual is not None:
            self.residual = spatial(c.residual.rank, c.residual.branch)
            self.coefficients = head(c.residual.coefficients, c.residual.rank)

    @property
    def image_branches(self) -> list[Branches]:
        """Background, experts and residual basis, as far as they exist; the order of components."""
        return [b for b in (self.background, self.experts, self.residual) if b is not None]

    def image_parameters(self) -> list[torch.nn.Parameter]:
        """theta_img of Eq. 24: encoder, background, experts, residual basis functions."""
        return [self.encoder.table, *(p for branches in self.image_branches for p in branches.parameters())]

    def state_parameters(self) -> list[torch.nn.Parameter]:
        """Router and residual coefficients: trained at their own rate, never decayed."""
        heads = [head for head in (self.router, self.coefficients) if head is not None]
        return [p for head in heads for p in head.parameters()]

    def logits(self) -> Tensor:
        """z_q of Eq. 18, ``(state, expert)``."""
        if self.router is None:
            raise SettingError("there is no router", where="moe_dqinr", got=f"variant {self.variant}")
        logits: Tensor = self.router(self.state_features)[0]
        return logits

    def routing(self) -> Tensor:
        """alpha of Eq. 19, ``(state, expert)``: non-negative, rows sum to one. No columns without experts."""
        if self.router is None:
            return self.state_features.new_zeros(self.n_states, 0)
        return torch.softmax(self.logits(), dim=1)

    def residual_coefficients(self) -> Tensor:
        """beta of Eq. 21, ``(state, rank)``, free signed numbers. No columns without residual branch."""
        if self.coefficients is None:
            return self.state_features.new_zeros(self.n_states, 0)
        beta: Tensor = self.coefficients(self.state_features)[0]
        return beta

    def mixing(self) -> Tensor:
        """``[1, alpha, gamma beta]``, ``(state, component)``: Eq. 21 as a matrix."""
        columns = [self.state_features.new_ones(self.n_states, 1), self.routing()]
        if self.configuration.residual is not None:
            columns.append(self.configuration.residual.gamma * self.residual_coefficients())
        return torch.cat(columns, dim=1)

    def components(self, features: Tensor, precision: torch.dtype | None = None) -> Tensor:
        """b, e_k, r_l at some pixels: ``(pixel, feature)`` to real and imaginary parts ``(component, pixel, 2)``."""
        return torch.cat([branches(features, precision) for branches in self.image_branches])

    def component_images(self, chunk: int = 0, precision: torch.dtype | None = None) -> Tensor:
        """All components without gradient, complex ``(component, x, z, y)``, ``chunk`` pixels at a time (0: all)."""
        with torch.no_grad():
            features = self.encoder()
            step = chunk or len(features)
            return self.pixels.as_images(
                torch.cat([self.components(part, precision) for part in features.split(step)], dim=1)
            )

    def images(self, chunk: int = 0, precision: torch.dtype | None = None) -> Tensor:
        """The series (Eq. 21) without gradient, complex working images ``(state, x, z, y)``."""
        with torch.no_grad():
            parts = torch.view_as_real(self.component_images(chunk, precision))
            mixed = self.mixing() @ parts.flatten(1)
            return torch.view_as_complex(mixed.reshape(self.n_states, *parts.shape[1:]))

    def forward(self) -> Tensor:
        """The series with gradient and without chunks: what small tests differentiate."""
        values = self.components(self.encoder())
        return self.pixels.as_images((self.mixing() @ values.flatten(1)).reshape(self.n_states, -1, 2))


def check_shape(n_states: int, spatial_shape: tuple[int, ...]) -> None:
    """Raise ``DataError`` unless this is a series of 2D working images ``(x, 1, y)``."""
    if n_states < 1 or len(spatial_shape) != 3 or min(spatial_shape) < 1:
        raise DataError(
            "not a series",
            where="moe_dqinr",
            got=f"{n_states} states of {tuple(spatial_shape)}",
            expected="states of (x, z, y)",
        )
    if spatial_shape[1] != 1:
        raise DataError(
            "3D slabs are not supported: the coordinate of the representation is (x, y)",
            where="moe_dqinr",
            got=f"{spatial_shape[1]} partitions",
            expected="1",
            remedy="Transform a fully sampled slab along its partitions and reconstruct slice by slice, or choose llr",
        )
