"""FORMULA is what Salt's package manager needs."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import yaml

CHECKOUT = Path(__file__).resolve().parents[2]


def test_spm_builds_the_package(tmp_path):
    """The package holds states, modules and the example pillar, where SPM looks for them."""
    (tmp_path / "spm").write_text(
        yaml.safe_dump(
            {
                "spm_build_dir": str(tmp_path / "built"),
                "spm_logfile": str(tmp_path / "log"),
                "cachedir": str(tmp_path / "cache"),
            }
        )
    )
    program = Path(sys.executable).with_name("spm")
    command = [str(program), "-c", str(tmp_path), "-y", "build", str(CHECKOUT)]
    subprocess.run(command, check=True, cwd=CHECKOUT, capture_output=True)
    formula = yaml.safe_load((CHECKOUT / "FORMULA").read_text())
    name = formula["name"]
    (package,) = (tmp_path / "built").glob("*.spm")
    assert package.name == f"{name}-{formula['version']}-{formula['release']}.spm"
    with tarfile.open(package) as archive:
        names = set(archive.getnames())
    top = f"{name}/{formula['top_level_dir']}"
    for wanted in (f"{top}/init.sls", f"{name}/_modules/slmdb.py", f"{name}/pillar.example"):
        assert wanted in names
