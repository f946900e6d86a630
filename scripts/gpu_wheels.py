"""Collects the wheels that a bare GPU machine lacks, and checks that they install there: `make gpu-wheels` runs this.

    python scripts/gpu_wheels.py --out build/gpu-wheels

The machine has Python 3.12, the packages of gpu_machine.txt, and no network. What is carried has the versions of
constraints.txt. The wheel of bitsandbytes keeps its libraries for a CPU and for the machine's CUDA alone: all of them
are 150 MB.
"""

from __future__ import annotations

import argparse
import email
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

TOP = Path(__file__).resolve().parents[1]
PYTHON, LIMIT_MIB = "3.12", 55
CARRIED = """
sentence-transformers datasets dill multiprocess bitsandbytes filelock rich typer pydantic pydantic_core annotated-types
"""
MACHINE = TOP / "scripts" / "gpu_machine.txt"
#: Libraries of bitsandbytes that are kept.
KEPT = ("_cpu.so", "_cuda130.so")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64", "manylinux_2_17_x86_64")


def collect(out: Path) -> None:
    """Downloads the wheels into an empty folder, and builds the one of this checkout."""
    shutil.rmtree(out, ignore_errors=True)
    pinned = versions_in(TOP / "constraints.txt")
    names = [f"{name}=={pinned[canonicalize_name(name)]}" for name in CARRIED.split()]
    pip("download", "--no-deps", *for_the_machine(), "--dest", str(out), *names)
    pip("wheel", "--no-deps", "--wheel-dir", str(out), str(TOP))
    for wheel in out.glob("bitsandbytes-*.whl"):
        slim(wheel)


def versions_in(file: Path) -> dict[str, str]:
    """Returns name -> version of a file of requirements, "" where it names none."""
    lines = [line.split("#")[0].strip().partition("==") for line in file.read_text().splitlines()]
    return {canonicalize_name(name): version for name, _, version in lines if name}


def for_the_machine() -> list[str]:
    """Returns what makes pip choose wheels for the machine."""
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    return ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp", *platforms]


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments], check=True)


def slim(wheel: Path) -> None:
    """Leaves out the libraries that the machine does not load."""
    whole = wheel.rename(wheel.with_suffix(".whole"))
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as target:
        left_out = {name for name in source.namelist() if name.endswith((".so", ".dll")) and not name.endswith(KEPT)}
        for name in source.namelist():
            content = source.read(name)
            if name.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if line.split(",")[0] not in left_out).encode()
            if name not in left_out:
                target.writestr(source.getinfo(name), content, zipfile.ZIP_DEFLATED)
    whole.unlink()


def check(out: Path) -> str:
    """Returns one line on wheels that fit, whose requirements are met, and that install without a network.

    Raises:
        SystemExit: If they do not.
    """
    wheels = sorted(out.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels) / 2**20
    if size > LIMIT_MIB:
        raise SystemExit(f"{out} holds {size:.1f} MiB, and {LIMIT_MIB} can be carried")
    missing = unmet(wheels)
    if missing:
        raise SystemExit("the machine lacks: " + "; ".join(missing))
    with tempfile.TemporaryDirectory() as folder:
        offline = ["--no-index", "--no-deps", "--no-compile", *for_the_machine(), "--target", folder]
        pip("install", *offline, *map(str, wheels))
    return f"{len(wheels)} wheels, {size:.1f} MiB, install without a network"


def unmet(wheels: Iterable[Path]) -> list[str]:
    """Returns which requirements neither the wheels nor the machine meet; of our own wheel those of training too."""
    found = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as content:
            name = next(name for name in content.namelist() if name.endswith(".dist-info/METADATA"))
            found[canonicalize_name(wheel.name.split("-")[0])] = email.message_from_bytes(content.read(name))
    versions = versions_in(MACHINE) | {name: metadata["Version"] for name, metadata in found.items()}
    missing = []
    for name, metadata in found.items():
        extras = ("", "train") if name == "st-llmpool" else ("",)
        for requirement in map(Requirement, metadata.get_all("Requires-Dist", [])):
            environments = ({"extra": extra, "python_version": PYTHON} for extra in extras)
            if requirement.marker and not any(map(requirement.marker.evaluate, environments)):
                continue
            key = canonicalize_name(requirement.name)
            version = versions.get(key)
            if key not in versions or (version and not requirement.specifier.contains(Version(version))):
                missing.append(f"{requirement} of {name}, not {version}" if version else f"{requirement} of {name}")
    return missing


def main(argv: Sequence[str] | None = None) -> None:
    """Collects and checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TOP / "build" / "gpu-wheels")
    out = parser.parse_args(argv).out
    collect(out)
    print(check(out))


if __name__ == "__main__":
    main()
