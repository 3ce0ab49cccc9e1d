"""A user's packages with the names of ours (`models`, `tools`, `wire`) do not clash with ours."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAP = "raise SystemExit('the package of the user was imported')\n"


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("edge_agent.main", ("models", "tools", "wire")),
        ("orchestrator.main", ("models", "tools", "wire")),
        ("orchestrator.datasets", ("models", "tools", "wire")),
        ("tools.export", ("models", "wire")),
    ],
)
def test_packages_in_the_current_folder_are_not_taken_for_ours(tmp_path, module, names):
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(TRAP)
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


def test_an_installation_writes_to_no_folder_of_the_names_that_others_install():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"][
        "targets"
    ]["wheel"]
    assert wheel["sources"] == {name: f"stillhouse/{name}" for name in wheel["only-include"]}
    assert wheel["force-include"] == {"stillhouse.pth": "stillhouse.pth"}
    assert (ROOT / "stillhouse.pth").read_text() == "stillhouse\n"
