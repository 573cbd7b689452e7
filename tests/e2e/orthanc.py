"""A real archive for the tests: Orthanc on loopback, on free ports, with its storage in the test's folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ports import free_ports
from tests.waiting import PATIENCE

AET = "TESTARCHIVE"
READY = "Orthanc has started"


@dataclass
class Orthanc:
    """A running archive. ``said`` are the lines of its log."""

    http_port: int
    dicom_port: int
    said: list[str]

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}{path}", timeout=PATIENCE) as answer:
            found: bytes = answer.read()
        return found

    def json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def uids(self) -> dict[str, set[str]]:
        """SOP instance UIDs by series instance UID: everything that is in it."""
        found: dict[str, set[str]] = {}
        for instance in self.json("/instances?expand"):
            tags = self.json(f"/instances/{instance['ID']}/simplified-tags")
            found.setdefault(tags["SeriesInstanceUID"], set()).add(tags["SOPInstanceUID"])
        return found


@contextmanager
def orthanc(folder: Path, ports: list[int] | None = None, **settings: Any) -> Iterator[Orthanc]:
    """Start an archive, and end it by its process id."""
    program = shutil.which("Orthanc")
    assert program, "Orthanc is missing: apt-get install orthanc"
    http, dicom = ports or free_ports(2)
    folder.mkdir(parents=True, exist_ok=True)
    configuration = {
        "Name": "test", "StorageDirectory": str(folder / "storage"), "IndexDirectory": str(folder / "storage"),
        "HttpPort": http, "DicomPort": dicom, "DicomAet": AET, "DicomCheckCalledAet": True, "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False, "HttpServerEnabled": True, "DicomServerEnabled": True, "Plugins": [],
        "DicomModalities": {}, "SslEnabled": False, **settings,
    }  # fmt: skip
    (folder / "orthanc.json").write_text(json.dumps(configuration))
    said: list[str] = []
    process = subprocess.Popen(
        [program, str(folder / "orthanc.json")], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=folder
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            said.append(line.rstrip())
            if READY in line:
                break
        else:
            raise AssertionError("Orthanc did not start:\n" + "\n".join(said[-20:]))
        rest = process.stderr
        reader = threading.Thread(target=lambda: said.extend(line.rstrip() for line in rest), daemon=True)
        reader.start()
        yield Orthanc(http, dicom, said)
        process.terminate()
        process.wait(PATIENCE)
        reader.join(PATIENCE)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(PATIENCE)
        process.stderr.close()
