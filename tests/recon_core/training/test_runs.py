"""What the programs that train have in common: the limits of a call, and the recipe on disk."""

from __future__ import annotations

import math

import pytest

from recon_core.errors import SettingError
from recon_core.training import laro, pinqi
from recon_core.training.loop import Progress, Validation
from recon_core.training.runs import CarryOut, PlainReport


@pytest.mark.parametrize("settings", [CarryOut, pinqi.RunSettings, laro.RunSettings])
@pytest.mark.parametrize("minutes", [0.0, -1.0, math.nan])
def test_no_time_to_train_is_refused(settings: type[CarryOut], minutes: float) -> None:
    with pytest.raises(SettingError, match="max_minutes: no time"):
        settings(max_minutes=minutes)
    assert settings(max_minutes=0.01).max_minutes == 0.01


@pytest.mark.parametrize("name", ["validate_every", "checkpoint_minutes", "log_every"])
def test_negative_frequencies_are_refused(name: str) -> None:
    with pytest.raises(SettingError, match=f"{name}: not a frequency"):
        CarryOut(**{name: -1})
    assert CarryOut(**{name: 0})


def test_reports_may_be_of_validations_alone(capsys: pytest.CaptureFixture[str]) -> None:
    report = PlainReport(0)
    report("training", Progress(1, 4, 0.5, 0.1, {}))
    report("training", Progress(2, 4, 0.5, 0.1, {}, Validation({"nrmse": 0.25})))
    assert capsys.readouterr().out.splitlines() == ["training 2/4 0.1 min loss=0.50000 nrmse=0.25"]
