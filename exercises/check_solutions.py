"""Proof that the exercises can be solved, and that as handed out they are not.

python exercises/check_solutions.py      # about 10 seconds; the repository's tests run it, too
"""

import doctest
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).parent


def run_pytest(*options: str) -> dict[str, str | None]:
    """{test: None if it passed, else its message} of `pytest exercises` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            str(HERE),
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
        ]
        done = subprocess.run([*command, *options], cwd=HERE.parent, capture_output=True, text=True)
        if not report.exists():
            raise AssertionError(f"pytest did not run:\n{done.stdout}{done.stderr}")
        results = {}
        for case in ElementTree.parse(report).iter("testcase"):
            problem = next(iter(case), None)  # <failure>, <error> or <skipped>
            name = f"{case.get('classname')}.{case.get('name')}"
            results[name] = None if problem is None else f"{problem.get('message')}\n{problem.text}"
        return results


def load(path: Path):
    """The module in this file, whatever else has its name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_solutions() -> None:
    """AssertionError unless all solutions pass, all blanks fail kindly, their examples are true."""
    solved = run_pytest("--solutions")
    failed = {name: message for name, message in solved.items() if message}
    assert not failed, "solutions fail:\n" + "\n".join(
        f"{name}: {message}" for name, message in failed.items()
    )

    blank = run_pytest()
    numbers = [path.stem.split("_")[1] for path in HERE.glob("test_*.py")]
    for number in numbers:
        assert any(f"test_{number}_" in name for name in blank), f"exercise {number} has no test"
        assert any(f"test_{number}_" in name for name in solved), (
            f"exercise {number} has no test of its solution"
        )
    for name, message in blank.items():
        assert message and "not solved yet" in message, (
            f"{name}: as handed out it should fail kindly, not: {message}"
        )
    bug = [message for name, message in blank.items() if "test_9_" in name]
    assert all("too flat" in message for message in bug), (
        "exercise 9: the planted bug does not show"
    )

    for path in sorted(HERE.glob("ex*.py")):
        names = vars(load(HERE / "solutions" / path.name))
        for example in doctest.DocTestFinder().find(load(path), path.stem):
            example.globs.update(names)
            lines: list[str] = []
            doctest.DocTestRunner().run(example, out=lines.append)
            assert not lines, "".join(lines)

    shipped, fixed = (
        path.read_text(encoding="utf-8").splitlines()
        for path in (HERE / "ex9_bug.py", HERE / "solutions" / "ex9_bug.py")
    )
    changed = [number for number, (a, b) in enumerate(zip(shipped, fixed), 1) if a != b]
    assert len(shipped) == len(fixed) and len(changed) == 1, (
        f"exercise 9 and its solution differ in lines {changed}"
    )


if __name__ == "__main__":
    check_solutions()
    print("all solutions pass, all blanks fail kindly, every wrong answer gets its hint")
