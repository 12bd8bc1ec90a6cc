"""What is checked before anything heavy is imported: the Python and the processor.

`python -m coterie.startup` checks these and what a virtual environment needs; `make` calls it
before it downloads anything. It must therefore start on any Python 3 and import nothing large.
"""

import platform
import sys

from coterie.errors import CoterieError, UnitError, UsageError

PYTHON_FIRST = (3, 11)  # numba, pyarrow
PYTHON_END = (3, 15)  # Ray has no later wheels; pyproject.toml says the same to pip

# What the kernels are compiled for at least, by the words of /proc/cpuinfo.
CPU_NEEDS = {
    "x86_64": {"avx2": "AVX2", "fma": "FMA", "f16c": "F16C"},
    "aarch64": {"asimddp": "dot product instructions (ARMv8.2 dotprod)"},
}


def check_machine() -> None:
    """Raise an error that names what this Python or this processor lacks."""
    check_python(sys.version_info[:2])
    check_cpu(sys.platform, platform.machine(), read_cpuinfo())


def check_python(version: tuple[int, ...]) -> None:
    """Raise UsageError unless `version` (major, minor) is one that numba and Ray support."""
    if not PYTHON_FIRST <= version < PYTHON_END:
        raise UsageError(
            f"Python {version[0]}.{version[1]} ({sys.executable}) cannot run Coterie: "
            f"it needs Python 3.{PYTHON_FIRST[1]} to 3.{PYTHON_END[1] - 1}; "
            f"from a checkout: make PYTHON=python3.{PYTHON_FIRST[1] + 1} demo"
        )


def check_cpu(system: str, machine: str, cpuinfo: str) -> None:
    """Raise UnitError unless `cpuinfo` (the text of /proc/cpuinfo) lists what the kernels need.

    A text without a list of features, as some containers show, is given the benefit of the doubt.
    """
    if system != "linux" or machine not in CPU_NEEDS:
        raise UnitError(f"Coterie runs on Linux on x86-64 and aarch64; this is {system} on {machine}")
    features = cpu_features(cpuinfo)
    missing = [label for word, label in CPU_NEEDS[machine].items() if features and word not in features]
    if missing:
        raise UnitError(
            f"this {machine} processor has no {', '.join(missing)}: Coterie's kernels need it; use another machine"
        )


def cpu_features(cpuinfo: str) -> frozenset[str]:
    """The features that every processor in the text has (cores of a phone may differ)."""
    lines = [line.partition(":") for line in cpuinfo.splitlines()]
    lists = [frozenset(words.split()) for key, _, words in lines if key.strip() in ("flags", "Features")]
    return frozenset.intersection(*lists) if lists else frozenset()


def read_cpuinfo() -> str:
    """The text of /proc/cpuinfo, or nothing where it cannot be read."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def check_venv() -> None:
    """Raise UsageError where this Python cannot make a virtual environment with pip in it."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        raise UsageError(
            f"{sys.executable} has no module {error.name}; install it "
            f"(Debian, Ubuntu: apt install {package}) or name another: make PYTHON=/path/to/python demo"
        ) from None


def main() -> int:
    """Check everything that setting up needs; print the first thing missing."""
    try:
        check_machine()
        check_venv()
    except CoterieError as error:
        print(f"coterie: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
