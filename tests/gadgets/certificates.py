"""Certificates for tests, made by OpenSSL's own command: an authority, and keys with certificates of it."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]


@dataclass(frozen=True)
class Authority:
    """A certificate authority in a folder."""

    folder: Path

    @property
    def certificate(self) -> str:
        return str(self.folder / "ca.pem")

    def issue(self, name: str, alternative: str = "IP:127.0.0.1") -> tuple[str, str]:
        """Certificate and key files for ``name``."""
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        signing = [
            "-CA",
            self.certificate,
            "-CAkey",
            str(self.folder / "ca.key"),
            "-addext",
            f"subjectAltName={alternative}",
        ]
        extra = ["-addext", "basicConstraints=CA:FALSE"]
        _run([*KEY, "-keyout", str(key), "-out", str(certificate), "-subj", f"/CN={name}", *signing, *extra])
        return str(certificate), str(key)


def authority(folder: Path, name: str = "authority") -> Authority:
    """A fresh one in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    _run([*KEY, "-keyout", str(folder / "ca.key"), "-out", str(folder / "ca.pem"), "-subj", f"/CN={name}"])
    return Authority(folder)


def _run(arguments: list[str]) -> None:
    subprocess.run(["openssl", "req", "-x509", "-days", "2", *arguments], check=True, capture_output=True)
