"""Asks an advisory service for known vulnerabilities of every pinned version. That none could be asked is a failure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = ("constraints.txt", "proto/generator.txt")
#: Without pip: files with hashes are complete, and markers of other platforms are left out.
COMMAND = (
    Path(sys.executable).with_name("pip-audit"),
    "--disable-pip",
    "--require-hashes",
    "-f",
    "json",
    "--desc",
    "off",
)


def ask(service: str, file: str) -> list[dict]:
    """What the service says of every pin; nothing where it can't be reached."""
    command = [*COMMAND, "--progress-spinner", "off", "-s", service, "-r", file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    try:
        return json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        lines = done.stderr.strip().splitlines()
        print(f"{service}: {lines[-1] if lines else 'no answer'}", file=sys.stderr)
        return []


def judge(file: str, answers: list[dict]) -> str:
    """What is wrong, if anything: pins that nobody looked up count as much as those known to be vulnerable."""
    asked = [each for each in answers if "skip_reason" not in each]
    if not asked:
        return f"{file}: no advisory service could be reached or knew any of its packages: nothing was audited"
    skipped = [each["name"] for each in answers if "skip_reason" in each]
    wrong = [f"{file}: not looked up: {', '.join(skipped)}"] if skipped else []
    wrong += [
        f"{file}: {each['name']} {each['version']}: {vulnerability['id']}, "
        f"fixed in {', '.join(vulnerability['fix_versions']) or 'no version'}"
        for each in asked
        for vulnerability in each["vulns"]
    ]
    return "\n".join(wrong) or f"{file}: no known vulnerability in {len(asked)} packages"


def audit(file: str) -> bool:
    """Whether the file is known to be well."""
    for service in ("pypi", "osv"):
        answers = ask(service, file)
        if any("skip_reason" not in each for each in answers):
            break
    told = judge(file, answers)
    print(told)
    return "no known vulnerability in" in told


if __name__ == "__main__":
    well = [audit(file) for file in FILES]
    sys.exit(0 if all(well) else 1)
