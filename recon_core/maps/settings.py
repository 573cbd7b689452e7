"""Which parametric maps are fitted to a chain's images, and how: the same settings for every method."""

from __future__ import annotations

from dataclasses import dataclass

from recon_core.errors import DataError, SettingError
from recon_core.maps.dipole_kernel import unit_vector
from recon_core.maps.t1 import T1Settings
from recon_core.settings import setting


@dataclass(frozen=True)
class MapSettings:
    """Maps that are fitted to the final images (partial Fourier completed, console's matrix), pixel by pixel."""

    maps: str = setting(
        "none",
        "Parametric maps fitted to the final images, whichever method made them: T1 of recoveries; of several gradient echoes R2*, or "
        "R2*, local field and susceptibility (3D).",
        choices=("none", "t1", "r2star", "qsm"),
    )
    map_failure: str = setting(
        "error",
        "When no map can be made (no inversion times, too few states): 'error' refuses the slice, 'warn' sends its images "
        "without a map and says why.",
        choices=("error", "warn"),
    )
    map_model: str = setting(
        "molli",
        "Recovery that is fitted: MOLLI (three parameters, Look-Locker correction), inversion recovery with one readout per "
        "inversion, or saturation recovery.",
        choices=("molli", "inversion_recovery", "saturation_recovery"),
    )
    map_sign: str = setting(
        "auto",
        "Sign of the signal: from the phase (all states must share it), by trying every zero crossing of the magnitudes, or 'auto': "
        "the phase where the states share it.",
        choices=("auto", "phase", "magnitude"),
    )
    map_delays: str = setting(
        "require",
        "Saturation recovery whose delays do not belong together, or an object that moved in one state, so that T1 would be more than a "
        "tenth wrong, or an inversion recovery that was none: 'require' makes no map, 'tell' makes it and says how wrong (tissue that "
        "does not recover by one exponential looks like wrong delays). An inversion that was to be a saturation never makes one.",
        choices=("require", "tell"),
    )
    map_t1_min: float = setting(T1Settings.t1_min, "Shortest plausible T1", unit="s", low=0.001, high=1.0)
    map_t1_max: float = setting(T1Settings.t1_max, "Longest plausible T1", unit="s", low=1.0, high=60.0)
    map_signal_floor: float = setting(
        T1Settings.signal_floor,
        "A pixel with less than this part of the series' 99.9th percentile has no signal and no T1",
        low=0.0,
        high=1.0,
    )
    map_echo_images: bool = setting(True, "R2* and susceptibility: send each echo, not only their combination")
    map_r2star_fit: str = setting(
        "nonlinear", "R2*: by nonlinear fit of the magnitudes, noise-aware, or ARLO", choices=("nonlinear", "arlo")
    )
    map_background: str = setting(
        "v_sharp", "Susceptibility: how the background field is removed", choices=("pdf", "v_sharp", "resharp", "none")
    )
    map_inversion: str = setting(
        "tv",
        "Susceptibility: total variation by ADMM, MEDI, MEDI with uniform fluid as its zero (MEDI+0), or thresholded division",
        choices=("tv", "medi", "medi0", "tkd"),
    )
    map_restore: int = setting(
        8,
        "Susceptibility: steps that give back to the phase what the regularisation of llr held back of the data (one Bregman "
        "iteration) before the field is fitted; 0: the phase of the images as they are sent",
        low=0,
        high=100,
    )
    map_reference: str = setting(
        "brain",
        "Region whose mean susceptibility is zero: the brain, or the ventricles' fluid, found by its R2* (MEDI+0: always)",
        choices=("brain", "csf"),
    )
    map_mask: str = setting(
        "brain",
        "Susceptibility: where it is mapped: the brain, or everything with signal (phantoms)",
        choices=("brain", "object"),
    )
    map_mask_file: str = setting(
        "",
        "Susceptibility: name of a mask on the server (recon mask install NAME.npy) in place of the one that map_mask finds; empty: none",
    )
    map_bipolar: str = setting(
        "auto",
        "Phase between readouts of alternating direction is corrected: where the readouts say so, always, or never",
        choices=("auto", "on", "off"),
    )
    map_direction: str = setting(
        "require",
        "R2* and susceptibility: echoes that look mirrored along the readout, brighter on one side and then on the other: 'require' makes "
        "no map, 'tell' makes it and says so (a phantom whose brighter side decays faster looks alike)",
        choices=("require", "tell"),
    )
    map_phase_sign: str = setting(
        "positive",
        "Sign of the phase that a higher frequency gives with time; the wrong one shows veins dark",
        choices=("positive", "negative"),
    )
    map_b0_direction: str = setting(
        "", "B0 in the image frame, 'z, y, x'; empty: the patient's head-feet axis by the readouts' directions"
    )
    map_max_relative_sd: float = setting(
        T1Settings.max_relative_sd, "Largest believable standard deviation of T1, as a part of T1", low=0.001, high=10.0
    )

    def __post_init__(self) -> None:
        _ = self.b0_direction  # a scan begins with it, or is refused

    @property
    def b0_direction(self) -> tuple[float, float, float] | None:
        """Unit vector of ``map_b0_direction``, ``(z, y, x)``; ``None`` where the readouts are to say.

        Raises
        ------
        SettingError
            It is no direction.
        """
        if not self.map_b0_direction:
            return None
        try:
            z, y, x = (float(part) for part in self.map_b0_direction.replace(";", ",").split(","))
            return unit_vector((z, y, x))
        except (ValueError, DataError):
            raise SettingError(
                "not a direction",
                where="maps.map_b0_direction",
                got=repr(self.map_b0_direction[:80]),
                expected="'z, y, x', not all zero",
            ) from None

    @property
    def t1(self) -> T1Settings:
        """The limits of the T1 fit."""
        return T1Settings(
            t1_min=self.map_t1_min,
            t1_max=self.map_t1_max,
            signal_floor=self.map_signal_floor,
            max_relative_sd=self.map_max_relative_sd,
        )
