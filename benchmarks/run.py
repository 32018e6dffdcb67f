"""Run all benchmarks, one after the other, and gather their results in one file.

python benchmarks/run.py                 about an hour, on an idle machine
python benchmarks/run.py --quick         what CI runs: that they run at all
"""

import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    quick = ["--quick"] if "--quick" in sys.argv[1:] else []
    results = HERE / "results.json"
    results.unlink(missing_ok=True)
    for path in sorted(HERE.glob("bench_*.py")):
        print(f"\n# {path.name}", flush=True)
        command = [sys.executable, "-W", "ignore", str(path), *quick]
        start = time.perf_counter()
        subprocess.run([*command, "--json", str(results)], check=True)
        print(f"\n{path.name} took {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
