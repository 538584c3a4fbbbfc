"""Look for known vulnerabilities in the packages of an environment: advisories.py PIP_AUDIT SITE_PACKAGES.

``pip-audit`` asks the package index of the network. Where that cannot be reached, or is a mirror that tells
nothing of vulnerabilities, pip-audit may say that none is known; here the last line says for how many
packages the index was really asked. Exit code 1 if a vulnerability is known.
"""

import json
import subprocess
import sys
from typing import Any


def verdict(report: dict[str, Any]) -> tuple[str, bool]:
    """What a report of pip-audit says, and whether nothing in it is known to be vulnerable."""
    packages = report["dependencies"]
    known = [package for package in packages if package.get("vulns")]
    lines = []
    for package in known:
        for hole in package["vulns"]:
            mended = " ".join(hole["fix_versions"]) or "none"
            lines.append(f"{package['name']} {package['version']}: {hole['id']}, mended in {mended}")
    asked = sum("skip_reason" not in package for package in packages)
    lines.append(
        f"{asked} of {len(packages)} packages looked up, {len(known)} with known vulnerabilities"
        if asked
        else f"Not looked for: the package index knows nothing of vulnerabilities ({len(packages)} packages)."
    )
    return "\n".join(lines), not known


def main() -> int:
    """The exit code."""
    program, site = sys.argv[1:]
    command = [program, "--path", site, "--format", "json", "--progress-spinner", "off"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        print("Not looked for: pip-audit is not installed.")
        return 0
    try:
        report = json.loads(done.stdout)
    except ValueError:
        last = done.stderr.strip().splitlines()[-1:] or [f"pip-audit ended with {done.returncode}"]
        print(f"Not looked for: {last[0][:200]}")
        return 0
    words, good = verdict(report)
    print(words)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
