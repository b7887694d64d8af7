"""Run `upstream_cases.py` three times and compare: what passes unpatched must pass patched. See `upstream_tests.sh`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

CASES = Path(__file__).with_name("upstream_cases.py")
KEEP_RATIOS = ("1.0", "0.5")

_MASK = "a mask over all tokens of a clip is refused: the patched model runs its own selection"
_WITH_MASK = [
    f"{4 * (2 * number + (side == 'right')) + kernels:02}_{dtype}_pad_{side}{'' if kernels else '_sdpa_kernels'}"
    for number, dtype in enumerate(("fp16", "fp32", "bf16"))
    for side in ("left", "right")
    for kernels in (0, 1)
]
# What patching must change: (class or "*", test, keep ratio or "*") → why. One that is listed and passes is an error.
EXPECTED: dict[tuple[str, str, str], str] = {
    ("VivitModel", f"test_eager_matches_sdpa_inference_{name}", "*"): _MASK
    for name in [*_WITH_MASK, "24_fp32_pad_left_output_attentions"]
}


def run(tests: str, keep_ratio: str, arguments: list[str]) -> dict[tuple[str, str], tuple[str, str]]:
    """Give (class, test) → (outcome, first line of its message)."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        # No configuration and no conftest.py of ours, and nothing that needs a hub.
        command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", folder, "--noconftest"]
        command += ["-p", "no:cacheprovider", f"--junitxml={report}", str(CASES), *arguments]
        environment = {**os.environ, "UPSTREAM_TESTS": tests, "KEEP_RATIO": keep_ratio, "HF_HUB_OFFLINE": "1"}
        finished = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
        if not report.exists():
            sys.exit(f"pytest ended with {finished.returncode}:\n{finished.stdout}{finished.stderr}")
        outcomes: dict[tuple[str, str], tuple[str, str]] = {}
        for test in ElementTree.parse(report).iter("testcase"):
            key = (test.get("classname") or "").rpartition(".Test")[2], test.get("name") or ""
            outcome, message = "passed", ""
            for child in test:
                if child.tag in ("failure", "error", "skipped"):
                    outcome = "skipped" if child.tag == "skipped" else "failed"
                    message = (child.get("message") or child.text or "").strip().partition("\n")[0]
            if outcomes.get(key, ("passed",))[0] != "failed":  # a subtest that failed before counts
                outcomes[key] = outcome, message
        return outcomes


def expected(key: tuple[str, str], keep_ratio: str) -> str | None:
    """Say why a test may fail, or None."""
    model, test = key
    reasons = [EXPECTED.get((m, test, k)) for m in (model, "*") for k in (keep_ratio, "*")]
    return next((reason for reason in reasons if reason), None)


def summary(outcomes: dict[tuple[str, str], tuple[str, str]]) -> str:
    counts = Counter(outcome for outcome, _ in outcomes.values())
    return ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped"))


def main() -> int:
    tests, *arguments = sys.argv[1:]
    unpatched = run(tests, "", arguments)
    print(f"unpatched: {summary(unpatched)}", flush=True)
    must_pass = [key for key, (outcome, _) in unpatched.items() if outcome == "passed"]
    if not must_pass:
        print("nothing passes unpatched, so that there is nothing to compare")
        return 1
    wrong = 0
    for keep_ratio in KEEP_RATIOS:
        patched = run(tests, keep_ratio, arguments)
        print(f"keep ratio {keep_ratio}: {summary(patched)}; {len(must_pass)} passed unpatched", flush=True)
        for key in must_pass:
            outcome, message = patched.get(key, ("missing", ""))
            reason = expected(key, keep_ratio)
            if outcome == "passed" and reason is None:
                continue
            wrong += outcome == "passed" or reason is None
            comment = message[:200] if reason is None else f"expected: {reason}"
            print(f"  {key[0]:32} {key[1]:60} {outcome:8} {comment}")
    print(f"{wrong} differences that are not expected")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
