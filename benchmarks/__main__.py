"""`python -m benchmarks [NAME ...]`: run all benchmarks, or the named ones, print their tables and write results/benchmarks/NAME.json."""
import ast
import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
NOT_BENCHMARKS = {"__init__", "__main__", "timing", "step_products"}


def available() -> dict[str, str]:
    "Benchmarks by name, each with the one line that names its bar; nothing is imported."
    scripts = sorted(path for path in FOLDER.glob("*.py") if path.stem not in NOT_BENCHMARKS)
    return {path.stem: (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "no docstring").splitlines()[0] for path in scripts}


def main(
    names: list[str],  # benchmarks to run; empty means all
) -> int:
    "The exit code: 0 when every bar holds, 1 when one is missed, 2 for an unknown name."
    known = available()
    if "-h" in names or "--help" in names:
        print(__doc__, *(f"  {name:14} {line}" for name, line in known.items()), sep="\n")
        return 0
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"benchmark: got {', '.join(map(repr, unknown))}, expected some of {', '.join(known)}", file=sys.stderr)
        return 2
    missed = 0
    for name in names or known:
        print(f"== {name}: {known[name]}", flush=True)
        table = importlib.import_module(f"benchmarks.{name}").main()
        path = table.write()
        print(table.markdown(), f"written to {path.relative_to(FOLDER.parent)}", "", sep="\n", flush=True)
        missed += sum(row["verdict"] == "MISSES" for row in table.rows)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
