"""Writes docs/licences.md. With --check: fails if it is out of date, or a licence is not one of those allowed."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageMetadata, PackageNotFoundError, metadata

from scripts import pins

PAGE = pins.ROOT / "docs" / "licences.md"
#: Permissive, or (MPL) asking for nothing beyond the source of their own files.
ALLOWED = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "ISC",
    "MIT", "MIT-0", "MPL-2.0", "PSF-2.0", "Unlicense", "Zlib",
}  # fmt: skip
#: What metadata calls them that is older than SPDX expressions there.
SPDX = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
}
#: Told by their licence files alone, which were read.
READ = {
    "jinja2": "BSD-3-Clause",
    "mpmath": "BSD-3-Clause",
    "pyasn1-modules": "BSD-2-Clause",
    "python-dateutil": "Apache-2.0 OR BSD-3-Clause",
    "scipy": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
}
#: Of other platforms, so that they are not installed where this page is written: licence and home page.
ELSEWHERE = {
    "colorama": ("BSD-3-Clause", "https://github.com/tartley/colorama"),
}


def only_with_cuda(name: str) -> bool:
    return name == "triton" or name.startswith(("cuda-", "nvidia-"))


def licence(name: str, of: PackageMetadata) -> str:
    told = of["License-Expression"] or READ.get(name) or of["License"] or ""
    return SPDX.get(told, told)


def home(of: PackageMetadata) -> str:
    urls = dict(each.split(", ", 1) for each in of.get_all("Project-URL") or [])
    by_label = {re.sub(r"\W", "", label.lower()): url for label, url in urls.items()}
    labels = ("homepage", "home", "source", "sourcecode", "repository", "code", "github")
    return of["Home-page"] or next((by_label[each] for each in labels if each in by_label), "")


def allowed(expression: str) -> bool:
    """Whether one alternative of an SPDX expression has allowed licences only; with brackets, whether all have."""
    alternatives = expression.split(" OR ")
    if "(" in expression:
        alternatives = [re.sub(r"[()]", "", expression).replace(" OR ", " AND ")]
    return any(all(part in ALLOWED for part in each.split(" AND ")) for each in alternatives)


def rows() -> list[tuple[str, str, str, str, str]]:
    """Name, version, licence, home page and what it comes with, of every shipped package that may be installed."""
    locked = pins.read()
    parts = {part: pins.closure(pins.wanted(*part.split()), locked) for part in ("", *pins.SHIPPED)}
    found = []
    for name in sorted(set().union(*parts.values())):
        if only_with_cuda(name):
            continue
        comes = "the client" if name in parts[""] else ", ".join(part for part in pins.SHIPPED if name in parts[part])
        if name in ELSEWHERE:
            found.append((name, locked[name].version, *ELSEWHERE[name], comes))
            continue
        try:
            of = metadata(name)
        except PackageNotFoundError:
            sys.exit(f"{name} is pinned and not installed: make .venv/.dev")
        found.append((name, locked[name].version, licence(name, of), home(of), comes))
    return found


def page() -> str:
    table = "\n".join(
        f"| [{name}]({url}) | {version} | {told} | {comes} |" if url else f"| {name} | {version} | {told} | {comes} |"
        for name, version, told, url, comes in rows()
    )
    cuda = ", ".join(name for name in sorted(pins.read()) if only_with_cuda(name))
    return f"""# Licences

QuerySelect is under the Apache License 2.0. What it is installed with, as pinned in `constraints.txt`; written by
`make licences` from the packages' own metadata.

| Package | Version | Licence | Comes with |
| --- | --- | --- | --- |
{table}

Wheels for Linux carry libraries of GCC's beside (libgfortran and libquadmath in numpy's and scipy's, libgomp in torch's
and scikit-learn's): GPL-3.0 with the GCC Runtime Library Exception, which asks nothing of programs that use them, and
LGPL-2.1 (libquadmath).

The package index's build of torch for Linux also asks for NVIDIA's CUDA libraries, most of them under NVIDIA's own
licence, and for triton (MIT): {cuda}. Nothing of ours asks for them, and torch's builds without CUDA do without.
"""


def main() -> None:
    if "--check" not in sys.argv:
        PAGE.write_text(page())
        return
    if wrong := [f"{row[0]}: {row[2] or 'no licence told'}" for row in rows() if not allowed(row[2])]:
        sys.exit("licences that are not allowed (see scripts/licences.py):\n" + "\n".join(wrong))
    if PAGE.read_text() != page():
        sys.exit("docs/licences.md is out of date: run make licences")


if __name__ == "__main__":
    main()
