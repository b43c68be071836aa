"""Salt's compiler over this checkout, without a minion, for any distribution and pillar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import salt.config
import salt.state

CHECKOUT = Path(__file__).resolve().parents[2]
CODENAMES = {
    "Debian-12": "bookworm",
    "Debian-13": "trixie",
    "Ubuntu-22.04": "jammy",
    "Ubuntu-24.04": "noble",
}


def names() -> list[str]:
    """Every SLS of the formula, as `state.apply` calls it."""
    found = []
    for path in (CHECKOUT / "slm_database").rglob("*.sls"):
        parts = path.relative_to(CHECKOUT).with_suffix("").parts
        found.append(".".join(parts[:-1] if parts[-1] == "init" else parts))
    return sorted(found)


class Compiler:
    """Making one is slow; giving it another distribution or pillar is not."""

    def __init__(self, directory: Path, *roots: Path):
        config = {
            "id": "slm.19",
            "file_client": "local",
            "root_dir": str(directory),
            "cachedir": str(directory / "cache"),
            "pki_dir": str(directory / "pki"),
            "log_file": str(directory / "minion.log"),
            "file_roots": {"base": [str(CHECKOUT), *map(str, roots)]},
            "pillar_roots": {"base": [str(directory / "pillar")]},
            "module_dirs": [str(CHECKOUT / "_modules")],
            "states_dirs": [str(CHECKOUT / "_states")],
        }
        path = directory / "minion"
        path.write_text(json.dumps(config))
        opts = salt.config.minion_config(str(path), cache_minion_id=False)
        opts["grains"] = {"os": "Debian", "os_family": "Debian", "id": "slm.19"}
        self.high = salt.state.HighState(opts, initial_pillar={})
        self.state = self.high.state
        self.told: Any = None

    def tell(self, release: str, pillar: Any) -> None:
        """Load Salt's modules with another distribution and pillar."""
        if self.told == (release, repr(pillar)):
            return
        self.told = (release, repr(pillar))
        opts = self.state.opts
        opts["grains"].update(osfinger=release, oscodename=CODENAMES[release])
        opts["pillar"] = {} if pillar is None else {"slm_database": pillar}
        self.state.load_modules()
        # The formula's modules are there already; a sync for each SLS would cost a minute.
        for name in ("modules", "states"):
            self.state.functions[f"saltutil.sync_{name}"] = lambda **_: []

    def low(self, name: str, release: str, pillar: Any = None) -> list[dict]:
        """Compile one SLS to what the minion would do; fail with Salt's own words."""
        self.tell(release, pillar)
        self.high.building_highstate.clear()
        high, errors = self.high.render_highstate({"base": [name]})
        assert not errors, errors
        for step in (self.state.reconcile_extend, self.state.requisite_in):
            high, errors = step(high)
            assert not errors, errors
        assert not self.state.verify_high(high)
        chunks = self.state.compile_high_data(high)
        if isinstance(chunks, tuple):
            chunks, errors = chunks
            assert not errors, errors
        return chunks
