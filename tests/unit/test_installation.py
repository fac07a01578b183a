"""What `make install` installs and `make uninstall` takes away, and the units that are in the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNITS = sorted((ROOT / "packaging").glob("*.service"))
OPERATION = (ROOT / "docs" / "operation.md").read_text()

PYTHON = """#!/bin/bash
# As much of Python as scripts/install uses; its version is in a file.
case "$*" in
    *sys.version_info*) cat {version} ;;
    "-I -m venv "*)
        mkdir -p "$4/bin" "$4/lib/python$(cat {version})"
        ln -s lib "$4/lib64" || exit 1
        ln -s "$0" "$4/bin/python"
        ln -s "$0" "$4/bin/pip"
        echo "version = $(cat {version}).2" >"$4/pyvenv.cfg"
        echo venv >>{calls} ;;
    *--require-hashes*)
        echo "pip $* ${{PIP_CONFIG_FILE-}}" >>{calls}
        [ ! -e {offline} ] || exit 1
        echo locked >>{calls} ;;
    *.whl)
        echo "pip $* ${{PIP_CONFIG_FILE-}}" >>{calls}
        printf '#!/bin/sh\\necho tidegate 0.1.0\\n' >"${{0%/*}}/tidegate" && chmod 755 "${{0%/*}}/tidegate" ;;
esac
"""


class Machine:
    """A checkout with a wheel, a Python and a systemd that only notes how it was called."""

    def __init__(self, folder: Path) -> None:
        self.checkout = folder / "checkout"
        self.prefix, self.bin = folder / "opt" / "tidegate", folder / "local" / "bin"
        self.units = folder / "units"
        self.command = self.bin / "tidegate"
        self.calls, self.version, self.offline = folder / "calls", folder / "version", folder / "offline"
        self.environment: dict[str, str] = {}
        self.calls.touch()
        self.version.write_text("3.11\n")
        (self.checkout / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "scripts" / "install", self.checkout / "scripts")
        shutil.copytree(ROOT / "packaging", self.checkout / "packaging")
        wheel = self.checkout / "target" / "wheels" / "tidegate-0.1.0-py3-none-any.whl"
        wheel.parent.mkdir(parents=True)
        wheel.touch()
        self.programs = folder / "programs"
        self.programs.mkdir()
        self._program("python3", PYTHON.format(version=self.version, calls=self.calls, offline=self.offline))
        self._program("systemctl", f'#!/bin/sh\necho "systemctl $*" >>{self.calls}\n[ "$1" != is-active ]\n')

    def install(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.checkout / "scripts" / "install", *arguments],
            env={
                "PATH": f"{self.programs}:{os.environ['PATH']}",
                "PREFIX": str(self.prefix),
                "BINDIR": str(self.bin),
                "UNITDIR": str(self.units),
                "PYTHON": str(self.programs / "python3"),
                **self.environment,
            },
            capture_output=True,
            text=True,
            check=False,
        )

    def noted(self) -> list[str]:
        return self.calls.read_text().splitlines()

    def _program(self, name: str, text: str) -> None:
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_what_is_installed_runs_apart_from_the_checkout(machine: Machine) -> None:
    done = machine.install()
    assert done.returncode == 0, done.stderr
    shutil.rmtree(machine.checkout)
    said = subprocess.run([machine.command, "--version"], capture_output=True, text=True, check=True)
    assert said.stdout == "tidegate 0.1.0\n"
    assert machine.prefix.stat().st_mode & 0o777 == 0o755
    for unit in UNITS:
        text = (machine.units / unit.name).read_text()
        assert f"ExecStart={machine.prefix}/bin/tidegate " in text
        assert "/opt/tidegate/" not in text.replace(str(machine.prefix), "")
        assert (machine.units / unit.name).stat().st_mode & 0o777 == 0o644
    assert not any("enable" in call or " start" in call for call in machine.noted())


def test_installing_again_upgrades_in_place_and_a_new_python_gets_an_environment_of_its_own(
    machine: Machine,
) -> None:
    for version, environments in (("3.11", 1), ("3.11", 1), ("3.13", 2)):
        machine.version.write_text(f"{version}\n")
        done = machine.install()
        assert done.returncode == 0, done.stderr
        assert machine.noted().count("venv") == environments
        assert (machine.prefix / "pyvenv.cfg").read_text() == f"version = {version}.2\n"
    assert machine.noted().count("locked") == 3


@pytest.mark.parametrize("killed", [False, True])
def test_an_environment_for_a_new_python_takes_the_place_of_the_old_one_only_when_it_is_complete(
    machine: Machine, killed: bool
) -> None:
    assert machine.install().returncode == 0
    before = sorted(machine.prefix.rglob("*"))
    machine.version.write_text("3.13\n")
    machine.offline.touch()
    if killed:  # so that it cannot restore anything itself
        pip = (machine.programs / "python3").read_text().replace("|| exit 1", "|| kill -9 $PPID")
        (machine.programs / "python3").write_text(pip)
        assert machine.install().returncode == -9
        (machine.programs / "python3").write_text(pip.replace("|| kill -9 $PPID", "|| exit 1"))
    assert machine.install().returncode == 1
    assert sorted(machine.prefix.rglob("*")) == before
    assert (machine.prefix / "pyvenv.cfg").read_text() == "version = 3.11.2\n"
    said = subprocess.run([machine.command, "--version"], capture_output=True, text=True, check=True)
    assert said.stdout == "tidegate 0.1.0\n"

    machine.offline.unlink()
    assert machine.install().returncode == 0
    assert (machine.prefix / "pyvenv.cfg").read_text() == "version = 3.13.2\n"
    assert [entry.name for entry in (machine.prefix / "lib").iterdir()] == ["python3.13"]
    assert {entry.name for entry in machine.prefix.iterdir()} == {
        *(".installed-by-tidegate", "bin", "lib", "lib64", "pyvenv.cfg")
    }


def test_pip_runs_nothing_that_is_not_pinned_and_takes_from_the_caller_only_where_packages_are(
    machine: Machine,
) -> None:
    machine.environment = {
        "PIP_INDEX_URL": "https://mirror.example/simple",
        "PIP_CERT": "/etc/ssl/mirror.pem",
        "PIP_NO_BINARY": ":all:",
        "PIP_CONFIG_FILE": "/home/mallory/pip.conf",
    }
    assert machine.install().returncode == 0
    calls = [call.split() for call in machine.noted() if call.startswith("pip ")]
    assert len(calls) == 2
    for call in calls:
        assert "--isolated" in call
        assert call[call.index("--only-binary") + 1] == ":all:", "a source package runs what builds it"
        assert call[call.index("--index-url") + 1] == "https://mirror.example/simple"
        assert call[call.index("--cert") + 1] == "/etc/ssl/mirror.pem"
        assert not any("no-binary" in option or "mallory" in option for option in call)


def test_a_folder_of_somebody_else_is_neither_filled_nor_removed(machine: Machine) -> None:
    machine.prefix.mkdir(parents=True)
    (machine.prefix / "theirs").touch()
    for arguments in ((), ("--remove",)):
        done = machine.install(*arguments)
        assert done.returncode == 1
        assert f"{machine.prefix} has something in it" in done.stderr
    assert [entry.name for entry in machine.prefix.iterdir()] == ["theirs"]


def test_a_command_of_somebody_else_is_not_replaced(machine: Machine) -> None:
    machine.bin.mkdir(parents=True)
    machine.command.write_text("theirs")
    assert f"{machine.command} is there" in machine.install().stderr
    assert machine.command.read_text() == "theirs"


@pytest.mark.parametrize("theirs", ["/opt/pipx/venvs/tidegate/bin/tidegate", "/nowhere"])
def test_a_link_of_somebody_else_is_neither_replaced_nor_removed(machine: Machine, theirs: str) -> None:
    machine.bin.mkdir(parents=True)
    machine.command.symlink_to(theirs)
    done = machine.install()
    assert done.returncode == 1
    assert f"{machine.command} points to {theirs}" in done.stderr
    assert not machine.prefix.exists()

    machine.command.unlink()
    assert machine.install().returncode == 0
    machine.command.unlink()
    machine.command.symlink_to(theirs)
    assert machine.install("--remove").returncode == 0
    assert not machine.prefix.exists()
    assert machine.command.readlink() == Path(theirs)


def test_what_was_installed_elsewhere_is_not_said_to_be_removed(machine: Machine) -> None:
    assert machine.install().returncode == 0
    installed, machine.prefix = machine.prefix, machine.prefix.with_name("other")
    done = machine.install("--remove")
    assert done.returncode == 1
    assert f"points to {installed}/bin/tidegate" in done.stderr and "name its PREFIX" in done.stderr
    assert machine.command.exists()
    machine.command.unlink()
    done = machine.install("--remove")
    assert f"There is nothing in {machine.prefix}, {machine.bin} or" in done.stdout
    assert "removed" not in done.stdout
    assert (installed / "bin" / "tidegate").exists()


def test_services_are_disabled_also_where_systemd_does_not_run(machine: Machine) -> None:
    assert machine.install().returncode == 0
    assert machine.install("--remove").returncode == 0
    for unit in UNITS:
        assert f"systemctl disable --quiet {unit.name}" in machine.noted()


def test_what_was_installed_is_removed_and_nothing_else(machine: Machine) -> None:
    assert machine.install().returncode == 0
    theirs = [machine.bin / "other", machine.units / "other.service", machine.units / UNITS[0].name]
    for file in theirs:
        file.write_text("ExecStart=/usr/bin/true \n")
    done = machine.install("--remove")
    assert done.returncode == 0, done.stderr
    assert "/var/lib/tidegate" in done.stdout and "/etc/tidegate" in done.stdout
    assert not machine.prefix.exists()
    left = {file for folder in (machine.bin, machine.units) for file in folder.iterdir()}
    assert left == set(theirs)
    assert machine.install("--remove").returncode == 0, "there is nothing left to remove"


@pytest.mark.parametrize("written", ["{}/", "/{}//", "{}/../tidegate/."])
def test_a_place_is_the_same_however_it_is_written(machine: Machine, written: str) -> None:
    plainly: dict[str, str] = {}
    places = {"PREFIX": machine.prefix, "BINDIR": machine.bin, "UNITDIR": machine.units}
    otherwise = {
        name: written.replace("tidegate", place.name).format(place) for name, place in places.items()
    }
    for first, then in ((otherwise, plainly), (plainly, otherwise)):
        for environment, arguments in ((first, ()), (then, ()), (then, ("--remove",))):
            machine.environment = environment
            done = machine.install(*arguments)
            assert done.returncode == 0, done.stderr
            if not arguments:
                assert machine.command.readlink() == Path(f"{machine.prefix}/bin/tidegate")
                for unit in UNITS:
                    text = (machine.units / unit.name).read_text()
                    assert f"={machine.prefix}/bin/tidegate " in text
        assert not machine.prefix.exists()
        assert not any(machine.units.iterdir()) and not any(machine.bin.iterdir())


def test_a_path_that_no_unit_can_hold_is_refused(machine: Machine) -> None:
    machine.prefix = machine.prefix.with_name("tide gate")
    done = machine.install()
    assert done.returncode == 1
    assert "is not an absolute path" in done.stderr
    assert not machine.prefix.exists()


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None and not os.environ.get("CI"), reason="there is no systemd-analyze"
)
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_finds_no_fault_in_the_units(unit: Path, tmp_path: Path) -> None:
    # With a command that is there; of a template, an instance is checked.
    text = re.sub(r"/opt/tidegate/bin/tidegate", shutil.which("true") or "/bin/true", unit.read_text())
    checked = tmp_path / unit.name.replace("@.", "@alice.")
    checked.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", checked], capture_output=True, text=True, check=False
    )
    faults = [line for line in done.stderr.splitlines() if "tidegate" in line]
    assert (done.returncode, faults) == (0, [])


def test_the_units_are_those_that_the_documentation_names() -> None:
    named = set(re.findall(r"\.\./packaging/([^)]+)\)", OPERATION))
    assert named == {unit.name for unit in UNITS} != set()


def test_the_gateways_unit_has_the_capabilities_that_the_documentation_explains() -> None:
    text = (ROOT / "packaging" / "tidegate.service").read_text()
    granted = re.search(r"^CapabilityBoundingSet=(.*)$", text, re.MULTILINE)
    assert granted is not None
    section = OPERATION.partition("## As a systemd service")[2].partition("\n## ")[0]
    assert set(granted[1].split()) == set(re.findall(r"`(CAP_\w+)`", section)) != set()


def test_an_installation_has_the_versions_that_were_tested() -> None:
    def pins(file: str) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for block in re.split(r"\n(?=[a-z])", (ROOT / file).read_text()):
            if pinned := re.match(r"[a-z0-9-]+==\S+", block):
                found[pinned[0]] = set(re.findall(r"sha256:[0-9a-f]{64}", block))
        return found

    installed, tested = pins("requirements-runtime.lock"), pins("requirements.lock")
    assert installed.items() <= tested.items()
    assert all(installed.values())
    assert not any(pin.startswith(("pytest==", "scapy==", "mypy==", "maturin==")) for pin in installed)


def test_clean_removes_what_the_tests_left_as_root() -> None:
    commands = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "AS_ROOT=as-root", "clean"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert any("rm -rf" in command for command in commands)
    assert all(command.startswith("as-root ") for command in commands)
