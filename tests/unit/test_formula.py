"""What Salt makes of the formula as a whole: a package, and modules that cost little to load."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import salt.loader
import yaml
from salt.loader.context import NamedLoaderContext

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


@pytest.fixture
def loader(tmp_path):
    """Our execution modules, as Salt loads them."""
    opts = {"extension_modules": str(tmp_path), "optimization_order": [0], "grains": {}}
    return salt.loader.LazyLoader([str(CHECKOUT / "_modules")], opts, tag="module")


def test_the_example_of_a_function_shows_that_function(loader):
    """Or says that nobody types it."""
    for name in loader:
        said = inspect.getdoc(loader._dict[name])
        shown = re.findall(r"^ {4}salt.*? (slmdb\w*\.\w+)", said, re.MULTILINE)
        assert set(shown) == {name} or (not shown and "For callers in Python" in said), name


def test_no_module_is_given_a_copy_of_the_options(loader):
    """Salt would make one for each, which takes longer than all else that it does to load it."""
    for path in (CHECKOUT / "_modules").glob("*.py"):
        functions = [name for name in loader if name.startswith(f"{path.stem}.")]
        assert functions, path.stem
        module = sys.modules[loader._dict[functions[0]].__module__]
        assert isinstance(module.__opts__, NamedLoaderContext), path.stem
