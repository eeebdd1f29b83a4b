#!/usr/bin/env python3
"""What a package says of where it comes from: copyright, licences of everything that is in it, changelog, and a software bill of
materials (CycloneDX 1.5, JSON). From Cargo's metadata and from what Go wrote into its binary; the same input gives the same bytes."""

import argparse
import datetime
import json
import os
import pathlib
import re
import subprocess
import sys
import uuid

LICENCE_FILE = re.compile(r"^(licen[cs]e|copying|notice|unlicense)", re.IGNORECASE)
PROJECT = "Workload Onboarding"
ROOT = pathlib.Path(__file__).parent.parent


def run(*command):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def texts(directory):
    """Texts of the licences in a package's own directory."""
    found = []
    for path in sorted(pathlib.Path(directory).iterdir()):
        if path.is_file() and LICENCE_FILE.match(path.name):
            found.append(path.read_text(encoding="utf-8", errors="replace").strip())
    return found


def crates(target):
    """Every crate that is linked into the agent: what Cargo knows of it, and its checksum."""
    metadata = json.loads(run("cargo", "metadata", "--locked", "--format-version=1", "--filter-platform", target))
    known = {(package["name"], package["version"]): package for package in metadata["packages"]}
    tree = run(
        "cargo", "tree", "--locked", "--package", "onboarding-agent", "--edges", "normal,no-proc-macro", "--target", target,
        "--prefix", "none", "--format", "{p}", "--no-dedupe",
    )
    names = sorted({tuple(line.split()[:2]) for line in tree.splitlines() if line.strip()})
    locked = re.findall(r'name = "([^"]+)"\nversion = "([^"]+)"\nsource = .*\nchecksum = "([0-9a-f]{64})"',
                        pathlib.Path("Cargo.lock").read_text())
    checksums = {(name, version): checksum for name, version, checksum in locked}
    for name, version in names:
        package = known[(name, version.removeprefix("v"))]
        if package["source"] is not None:
            yield package, checksums.get((package["name"], package["version"]))


def go_modules(binary):
    """Path, version and directory in the module cache of every module of a Go binary."""
    cache = run("go", "env", "GOMODCACHE").strip()
    lines = [line.split("\t") for line in run("go", "version", "-m", binary).splitlines()]
    modules = []
    for fields in lines:
        if len(fields) > 3 and fields[1] in ("mod", "dep"):
            modules.append((fields[2], fields[3]))
        elif len(fields) > 3 and fields[1] == "=>":
            modules[-1] = (fields[2], fields[3])
    for path, version in sorted(set(modules)):
        escaped = re.sub("[A-Z]", lambda letter: "!" + letter.group().lower(), path)
        yield path, version, pathlib.Path(cache) / f"{escaped}@{version}"


class Licences:
    """What is in a package and under which licence, and then each distinct text once."""

    def __init__(self, version):
        self.listed, self.holders = [], {}
        self.add(f"{PROJECT} {version}", "Apache-2.0", "", ROOT)

    def add(self, name, licence, where, directory):
        self.listed.append(f"{name}: {licence or 'see below'}{where and ' ' + where}")
        for text in texts(directory) if directory.is_dir() else []:
            self.holders.setdefault(text, []).append(name)

    def __str__(self):
        parts = ["\n".join(self.listed)]
        parts += [f"{'=' * 78}\n{', '.join(names)}\n\n{text}" for text, names in self.holders.items()]
        return "\n\n".join(parts) + "\n"


def bill(name, version, components, unknown=()):
    """The bill of materials; of those that are `unknown` it isn't known what they are made of. Its serial number is made of its content."""
    if not components:
        sys.exit(f"inventory.py: {name} is made of nothing?")
    body = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "timestamp": datetime.datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": {"type": "application", "name": name, "version": version, "bom-ref": name,
                          "licenses": [{"license": {"id": "Apache-2.0"}}]},
        },
        "components": components,
        "dependencies": [{"ref": name, "dependsOn": [component["bom-ref"] for component in components]}],
    }
    if unknown:
        body["compositions"] = [{"aggregate": "unknown", "dependencies": list(unknown)}]
    body["serialNumber"] = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(body, sort_keys=True)).urn
    return json.dumps(body, indent=1, sort_keys=True) + "\n"


def copyright_file(name, more, others=()):
    """`others`: the paths, the holders and the origin of what isn't this project's."""
    stanzas = "".join(f"""
Files: {files}
Copyright: {holders}
License: Apache-2.0
Comment: {origin}
""" for files, holders, origin in others)
    return f"""Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: {name}
Source: {PROJECT}

Files: *
Copyright: 2026, the authors of {PROJECT}
License: Apache-2.0
Comment: {more}
{stanzas}
License: Apache-2.0
 The text of the Apache License, Version 2.0, is in
 third-party-licences.txt.gz beside this file, on Debian in
 /usr/share/common-licenses/Apache-2.0 too, and where packages are RPMs in
 /usr/share/licenses/{name}/LICENSE.
"""


def changelog(name, version):
    date = datetime.datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), datetime.timezone.utc)
    return f"""{name} ({version}) stable; urgency=medium

  * Release {version}.

 -- {PROJECT} <maintainers@workload-onboarding.invalid>  {date.strftime("%a, %d %b %Y %H:%M:%S +0000")}
"""


def agent(arguments):
    components, licences = [], Licences(arguments.version)
    for package, checksum in crates(arguments.target):
        name, version = package["name"], package["version"]
        licence = (package["license"] or "").replace("/", " OR ")
        purl = f"pkg:cargo/{name}@{version}"
        component = {"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl}
        if licence:
            component["licenses"] = [{"expression": licence}]
        if checksum:
            component["hashes"] = [{"alg": "SHA-256", "content": checksum}]
        components.append(component)
        licences.add(f"{name} {version}", licence, package["repository"] or "", pathlib.Path(package["manifest_path"]).parent)
    more = "the licences of the libraries that are linked in are in\n third-party-licences.txt.gz beside this file"
    return "onboarding-agent", copyright_file("onboarding-agent", more), licences, bill("onboarding-agent", arguments.version, components)


def sidecar(arguments):
    # What Envoy links is in none of its bytes: its sources say so, at this tag.
    locations = f"https://github.com/envoyproxy/envoy/blob/v{arguments.envoy}/bazel/repository_locations.bzl"
    components = [{"type": "application", "name": "envoy", "version": arguments.envoy, "bom-ref": "envoy",
                   "purl": f"pkg:github/envoyproxy/envoy@v{arguments.envoy}", "licenses": [{"license": {"id": "Apache-2.0"}}],
                   "description": f"The libraries that it links are not listed here; {locations} has them.",
                   "externalReferences": [{"type": "bom", "url": locations}]}]
    licences = Licences(arguments.version)
    # The same licence as ours, to the letter.
    licences.add(f"Envoy {arguments.envoy}", "Apache-2.0", "https://github.com/envoyproxy/envoy", ROOT)
    for path, version, directory in go_modules(arguments.pilot_agent):
        purl = f"pkg:golang/{path}@{version}"
        components.append({"type": "library", "name": path, "version": version, "purl": purl, "bom-ref": purl})
        licences.add(f"{path} {version}", "", "", directory)
    more = "what puts the programs of others into a package"
    others = [
        ("usr/local/bin/envoy", "2016-2026, Envoy Project Authors",
         f"https://github.com/envoyproxy/envoy, version {arguments.envoy}. The libraries that it\n links are not listed in this package: bazel/repository_locations.bzl of that\n version has them, with their licences."),
        ("usr/local/bin/pilot-agent\n usr/local/bin/istio-start.sh\n usr/lib/systemd/system/istio.service\n var/lib/istio/envoy/*",
         "2017-2026, Istio Authors",
         "https://github.com/istio/istio. The modules that pilot-agent is made of, with\n their holders and licences, are in third-party-licences.txt.gz beside this file."),
    ]
    inventory = bill("istio-sidecar", arguments.version, components, unknown=["envoy"])
    return "istio-sidecar", copyright_file("istio-sidecar", more, others), licences, inventory


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["agent", "sidecar"])
    parser.add_argument("--target")
    parser.add_argument("--envoy")
    parser.add_argument("--pilot-agent")
    parser.add_argument("--version", required=True)
    parser.add_argument("--into", required=True, type=pathlib.Path)
    arguments = parser.parse_args()
    name, copyrights, licences, inventory = {"agent": agent, "sidecar": sidecar}[arguments.what](arguments)
    for ending, text in [
        ("cdx.json", inventory),
        ("licences", str(licences)),
        ("copyright", copyrights),
        ("changelog", changelog(name, arguments.version)),
    ]:
        (arguments.into / f"{name}.{ending}").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
