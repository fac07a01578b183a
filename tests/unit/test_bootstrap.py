"""`scripts/bootstrap` builds the engine with and without Intel's library, and again when that changes; it installs what
is missing, and makes a virtual environment anew that does not work."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Checkout:
    """As much of a checkout as the script looks at, with programs that only note how they were called."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        for file in ("engine/src/lib.rs", "engine/Cargo.toml", "ipsec-mb/build.rs"):
            self._write(file, "")
        for file in ("Cargo.toml", "Cargo.lock", "pyproject.toml"):
            self._write(file, "")
        (folder / "scripts").mkdir()
        shutil.copy(ROOT / "scripts" / "bootstrap", folder / "scripts")
        self._program(".venv/bin/maturin", "cat target/ipsec-mb-found >>built")
        self._program(".venv/bin/tidegate", "")
        self.archive = folder / "archive.a"
        self._program("bin/cc", f"echo {self.archive}")

    def build(self, **environment: str) -> None:
        path = f"{self.root / 'bin'}:{os.environ['PATH']}"
        subprocess.run(
            [self.root / "scripts" / "bootstrap", "engine"],
            env={**os.environ, "PATH": path, "TIDEGATE_WITHOUT_IPSEC_MB": "", **environment},
            check=True,
        )

    def built(self) -> list[str]:
        """What each build was told about the library."""
        return (self.root / "built").read_text().splitlines()

    def _write(self, file: str, text: str) -> Path:
        path = self.root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def _program(self, file: str, line: str) -> None:
        self._write(file, f"#!/bin/sh\n{line}\n").chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_the_engine_is_built_where_the_library_is_not(checkout: Checkout) -> None:
    checkout.build()
    assert len(checkout.built()) == 1


def test_the_engine_is_built_anew_only_when_the_library_has_come_or_changed(checkout: Checkout) -> None:
    for text in ("", "a version", "another"):
        if text:
            checkout.archive.write_text(text)
        checkout.build()
        checkout.build()
    assert len(set(checkout.built())) == len(checkout.built()) == 3


def test_the_engine_is_built_anew_where_the_library_is_no_longer_wanted(checkout: Checkout) -> None:
    checkout.archive.write_text("a version")
    checkout.build()
    checkout.build(TIDEGATE_WITHOUT_IPSEC_MB="1")
    assert len(set(checkout.built())) == 2


PYTHON = """#!/bin/bash
# As much of Python as makes an environment, whose own Python has pip; the version is in a file.
case "$*" in
    *sys.version_info*) cat {root}/version ;;
    "-m venv "*)
        [ "$3" != --clear ] || {{ rm -rf "$4"; shift; }}
        mkdir -p "$3/bin"
        cat >"$3/bin/python" <<'END'
#!/bin/sh
case "$*" in
    "-m pip --version") [ -e "$0.has-pip" ] && echo "pip 23.0.1 from /somewhere (python $(cat "$0.has-pip"))" ;;
    "-m pip install "*) [ -e "$0.has-pip" ] && echo pip >>{root}/calls ;;
esac
END
        chmod 755 "$3/bin/python"
        cp {root}/version "$3/bin/python.has-pip"
        echo venv >>{root}/calls ;;
esac
"""


class Environment:
    """A checkout of which only `.venv` matters."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self.venv = folder / ".venv"
        self.python = self.venv / "bin" / "python"
        (folder / "scripts").mkdir()
        shutil.copy(ROOT / "scripts" / "bootstrap", folder / "scripts")
        (folder / "requirements.lock").touch()
        (folder / "version").write_text("3.11\n")
        (folder / "bin").mkdir()
        (folder / "bin" / "python3").write_text(PYTHON.format(root=folder))
        (folder / "bin" / "python3").chmod(0o755)

    def bootstrap(self) -> list[str]:
        """What was done: environments made, packages installed."""
        calls = self.root / "calls"
        calls.write_text("")
        done = subprocess.run(
            [self.root / "scripts" / "bootstrap", "python"],
            env={**os.environ, "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return calls.read_text().splitlines()


def test_an_environment_is_made_once(tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    (environment.venv / ".stamps").mkdir(parents=True)
    note = environment.venv / ".stamps" / "no-libipsec-mb-dev"
    note.touch()
    assert environment.bootstrap() == ["venv", "pip"]
    assert environment.bootstrap() == []
    assert note.exists(), "what was tried in vain is not tried anew at once"


@pytest.mark.parametrize("trouble", ["it was interrupted", "its python has moved"])
def test_an_environment_that_does_not_work_is_made_anew(tmp_path: Path, trouble: str) -> None:
    environment = Environment(tmp_path)
    environment.bootstrap()
    environment.python.unlink()
    if trouble == "it was interrupted":
        (environment.venv / ".stamps" / "python").unlink()
        environment.python.write_text("#!/bin/sh\necho No module named pip >&2; exit 1\n")
        environment.python.chmod(0o755)
    else:
        environment.python.symlink_to("/nonexistent/python3.11")
    left = environment.venv / "bin" / "left"
    left.touch()
    assert environment.bootstrap() == ["venv", "pip"]
    assert not left.exists()
    assert environment.bootstrap() == []


def test_another_version_of_python_gets_an_environment_of_its_own(tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    environment.bootstrap()
    (tmp_path / "version").write_text("3.13\n")
    assert environment.bootstrap() == ["venv", "pip"]
    (tmp_path / "requirements.lock").write_text("# other packages\n")
    assert environment.bootstrap() == ["pip"]


@pytest.mark.parametrize("script", ["bootstrap", "install"])
def test_a_script_helps_also_where_nothing_is_set(script: str) -> None:
    done = subprocess.run(
        [ROOT / "scripts" / script, "--help"],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"scripts/{script}" in done.stdout


@pytest.mark.parametrize("is_set", [False, True])
def test_cargo_is_found_in_the_callers_home_also_where_home_is_not_set(tmp_path: Path, is_set: bool) -> None:
    # As under cloud-init, or in a unit of systemd's.
    (tmp_path / "make").write_text('#!/bin/sh\necho "$PATH"\n')
    (tmp_path / "make").chmod(0o755)
    home = "/home/alice" if is_set else pwd.getpwuid(os.geteuid()).pw_dir
    path = f"{tmp_path}:{os.environ['PATH']}"
    commands = (
        [ROOT / ".ci" / "run"],
        [shutil.which("make") or "make", "--silent", "--eval", 'path: ; @echo "$$PATH"', "path"],
    )
    for command in commands:
        said = subprocess.run(
            command,
            cwd=ROOT,
            env={"PATH": path, **({"HOME": home} if is_set else {})},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert said.splitlines()[-1].split(":")[-1] == f"{home}/.cargo/bin"


class Debian:
    """As much of a Debian machine as the script looks at when it installs packages: every program is there but Rust."""

    PRESENT = (
        "bash",
        "sed",
        "cut",
        "sort",
        "head",
        "cat",
        "grep",
        "dirname",
        "env",
        "find",
        "rm",
        "mkdir",
        "chown",
    )

    def __init__(self, folder: Path, rust: dict[str, str]) -> None:
        """`rust` maps the names of packages to the versions that they have here."""
        self.root = folder
        (folder / "scripts").mkdir()
        shutil.copy(ROOT / "scripts" / "bootstrap", folder / "scripts")
        self.programs = folder / "bin"
        self.programs.mkdir()
        for name in self.PRESENT:
            (self.programs / name).symlink_to(shutil.which(name) or name)
        self._program("id", "echo 0")
        self._program("python3", "exit 0")
        for name in ("cc", "ip", "ping", "sysctl", "curl", "dig", "traceroute", "tcpdump", "ethtool"):
            self._program(name, "exit 0")
        for name in ("nft", "iperf3", "dnsmasq", "wg", "wireguard-go", "valgrind"):
            self._program(name, "exit 0")
        self._program("rustc", f"cat {folder}/rustc-says")
        self._program("cargo", "exit 0")
        self._program("apt-cache", f'cat {folder}/lists/"$2"')
        # Installing any compiler makes it the one that runs; a refresh brings what `publish` has put aside.
        self._program(
            "apt-get",
            f'echo "$*" >>{folder}/calls; case "$*" in *update*) cp -r {folder}/new/. {folder}/lists;; '
            f"*install*rustc*) echo 'rustc 1.85.0' >{folder}/rustc-says;; esac",
        )
        (self.programs / "cp").symlink_to(shutil.which("cp") or "cp")
        self.lists, self.new = folder / "lists", folder / "new"
        self.lists.mkdir()
        self.new.mkdir()
        self.publish(self.lists, rust)

    def publish(self, lists: Path, rust: dict[str, str]) -> None:
        for package, version in rust.items():
            text = f"{package}:\n  Installed: (none)\n  Candidate: {version}\n  Version table:\n     {version} 500\n"
            (lists / package).write_text(text)

    def _program(self, name: str, line: str) -> None:
        (self.programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (self.programs / name).chmod(0o755)

    def bootstrap(self, stage: str = "packages") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", self.root / "scripts" / "bootstrap", stage],
            env={
                "PATH": str(self.programs),
                "PYTHON": str(self.programs / "python3"),
                "CARGO_HOME": "/nonexistent",
                "TIDEGATE_WITHOUT_IPSEC_MB": "1",
            },
            capture_output=True,
            text=True,
            check=False,
        )

    def installed(self) -> set[str]:
        """The packages that were asked for."""
        calls = self.root / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        words = {word for line in lines if " install " in f" {line} " for word in line.split()}
        return {word for word in words if not word.startswith("-") and word != "install"}


DEBIAN_12 = {"rustc": "1.63.0+dfsg1-2", "rustc-web": "1.85.0+dfsg3-1~deb12u3"}
DEBIAN_13 = {"rustc": "1.85.0+dfsg3-1"}
WEB_RUST = {"cargo-web", "rustc-web", "rustfmt-web", "rust-web-clippy"}
PLAIN_RUST = {"cargo", "rustc", "rustfmt", "rust-clippy"}


@pytest.mark.parametrize(
    ("rust", "packages"), [(DEBIAN_12, WEB_RUST), (DEBIAN_13, PLAIN_RUST)], ids=["Debian 12", "Debian 13"]
)
def test_rust_comes_from_those_packages_that_are_new_enough(
    tmp_path: Path, rust: dict[str, str], packages: set[str]
) -> None:
    debian = Debian(tmp_path, rust)
    done = debian.bootstrap()
    assert done.returncode == 0, done.stderr
    assert debian.installed() == packages


def test_rust_is_looked_for_again_once_the_package_lists_are_there(tmp_path: Path) -> None:
    debian = Debian(tmp_path, {})
    debian.publish(debian.new, DEBIAN_13)
    done = debian.bootstrap()
    assert done.returncode == 0, done.stderr
    assert debian.installed() == PLAIN_RUST


def test_where_no_package_of_rust_is_new_enough_rustup_is_named_and_nothing_installed(tmp_path: Path) -> None:
    debian = Debian(tmp_path, {"rustc": "1.75.0+dfsg0ubuntu1-0ubuntu7"})
    done = debian.bootstrap()
    assert done.returncode == 1
    assert "https://rustup.rs" in done.stderr and "1.75.0" in done.stderr
    assert debian.installed() == set()


def test_for_an_installation_only_what_the_build_needs_is_installed(tmp_path: Path) -> None:
    debian = Debian(tmp_path, DEBIAN_13)
    for tool in ("nft", "iperf3", "dnsmasq", "valgrind", "tcpdump", "cc"):
        (debian.programs / tool).unlink()
    done = debian.bootstrap("build-packages")
    assert done.returncode == 0, done.stderr
    assert debian.installed() == {"build-essential", *PLAIN_RUST}
