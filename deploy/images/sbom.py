"""Writes a CycloneDX 1.5 document of what is in an image: our package, the crates that it is built of, the files of other packages.

usage: sbom.py PACKAGE TARGET VERSION [NAME=VERSION=LICENCE ...] > sbom.cdx.json
The crates are those of the lock file that cargo would build for this target; the others are given.
"""

import json
import subprocess
import sys


def crates(package, target):
    """Name, version, licence and source of each, ours first."""
    tree = ["cargo", "tree", "--locked", "--edges", "normal", "--prefix", "none", "--target", target]
    lines = subprocess.run(
        [*tree, "--package", package, "--format", "{p}\t{l}"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    found = {}
    for line in lines:
        named, _, licence = line.partition("\t")
        name, version, *source = named.split(" ")
        ours = bool(source) and source[0].startswith("(/")
        found[(name, version.removeprefix("v"))] = (licence.removesuffix(" (*)"), ours)
    return found


def component(kind, name, version, licence, purl):
    licences = [{"expression": licence}] if licence else []
    it = {"type": kind, "bom-ref": purl or f"{name}@{version}", "name": name, "version": version, "licenses": licences}
    return it | ({"purl": purl} if purl else {})


def main(package, target, version, *others):
    components = [
        component("library", name, of, licence, None if ours else f"pkg:cargo/{name}@{of}")
        for (name, of), (licence, ours) in sorted(crates(package, target).items())
        if name != package
    ]
    for other in others:
        name, of, licence = other.split("=", 2)
        components.append(component("library", name, of, licence, None))
    bom = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": component("application", package, version, "Apache-2.0", None)},
        "components": components,
    }
    json.dump(bom, sys.stdout, indent=1, sort_keys=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
