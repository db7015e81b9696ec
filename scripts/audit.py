"""Ask for known vulnerabilities of the installed packages (pip-audit); say so where the advisories cannot be reached.

Exit code 1 if there is a known one that `IGNORED` does not name.
"""

from __future__ import annotations

import json
import subprocess
import sys

IGNORED: dict[str, str] = {}
"""Advisory -> why it does not apply here."""


def main() -> int:
    """Run pip-audit over this environment."""
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--local",
        "--skip-editable",
        "--format",
        "json",
        "--progress-spinner",
        "off",
    ]
    for name in IGNORED:
        command += ["--ignore-vuln", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        print("audit: the advisories could not be reached in time; NOT CHECKED")
        return 0
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (json.JSONDecodeError, KeyError):
        last = done.stderr.strip().splitlines()[-1:] or ["no answer"]
        print(f"audit: the advisories could not be read; NOT CHECKED ({last[0][:200]})")
        return 0
    asked = [entry for entry in found if "skip_reason" not in entry]
    if not asked:
        print(f"audit: this package index gives no advisories for any of {len(found)} packages; NOT CHECKED")
        return 0
    bad = [(entry["name"], entry["version"], flaw["id"]) for entry in found for flaw in entry.get("vulns", [])]
    for name, version, flaw in bad:
        print(f"audit: {name} {version} has {flaw}")
    print(f"audit: {len(asked)} of {len(found)} packages checked, {len(bad)} known vulnerabilities")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
