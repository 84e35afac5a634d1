"""Everything that has to hold, in order, stopping at the first thing that does not.

    python tests/run_all.py                     all steps
    python tests/run_all.py --only export       one step (may be given several times)

Only the standard library is used here: the tools are found on PATH and beside the running interpreter.
"""
import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKERS = "2"


class Failed(Exception):
    "A step did not hold; the message says what to do."


def environment():
    "One thread a process (two workers share the cores), and the tools of this interpreter first on PATH."
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }


def run(*command, cwd=ROOT, quiet=False):
    "The exit code of a command whose output goes straight to the screen (or, if quiet, only when it fails)."
    if not quiet:
        return subprocess.run(command, cwd=cwd, env=environment()).returncode
    done = subprocess.run(command, cwd=cwd, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        print(done.stdout, flush=True)
    return done.returncode


def checkout_files():
    "Every file that git tracks or would track, relative to the root."
    done = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True)
    if done.returncode:
        raise Failed(f"git ls-files failed ({done.stderr.decode().strip()}); run the tests in a git checkout")
    names = [Path(name) for name in done.stdout.decode().split("\0") if name]
    return [name for name in names if (ROOT / name).is_file()]


def copy_checkout(folder):
    "A copy of the working tree, without what git ignores."
    for name in checkout_files():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)


def differences(copy, names):
    "Names that are missing, new or different in the copy."
    return [str(name) for name in sorted(names) if not (
        (ROOT / name).is_file() and (copy / name).is_file() and filecmp.cmp(ROOT / name, copy / name, shallow=False))]


def is_generated(name):
    "Whether nbdev writes this file: a module, or the `__init__` of a layer, but not the package's own `__init__`."
    return name.parts[0] == "fvlm" and name.suffix == ".py" and name != Path("fvlm/__init__.py") and "static" not in name.parts


def clean():
    "Notebooks are clean: nbdev-clean changes nothing."
    with tempfile.TemporaryDirectory(prefix="fvlm-clean-") as folder:
        copy = Path(folder)
        copy_checkout(copy)
        if run("nbdev-clean", cwd=copy, quiet=True):
            raise Failed("nbdev-clean failed")
        dirty = differences(copy, [name for name in checkout_files() if name.suffix == ".ipynb"])
    if dirty:
        raise Failed("not clean: " + ", ".join(dirty) + "\nrun: make notebooks")


def export():
    "The package is what the notebooks export: no hand edit, no stale module, no orphan."
    with tempfile.TemporaryDirectory(prefix="fvlm-export-") as folder:
        copy = Path(folder)
        copy_checkout(copy)
        before = {name for name in checkout_files() if name.parts[0] == "fvlm" or name == Path("nbs/llms.txt")}
        for name in before:
            if is_generated(name):
                (copy / name).unlink()
        if run("nbdev-export", cwd=copy, quiet=True):
            raise Failed("nbdev-export failed")
        after = {path.relative_to(copy) for path in (copy / "fvlm").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
        if (copy / "nbs/llms.txt").exists():
            after.add(Path("nbs/llms.txt"))
        orphans = sorted(str(name) for name in before if not (copy / name).exists())
        stale = [name for name in differences(copy, before | after) if name not in orphans]
    if orphans or stale:
        raise Failed("\n".join(
            [f"no notebook exports {name}: delete it, or restore its notebook" for name in orphans]
            + [f"{name} differs from what the notebooks export: edit the notebook, then run: make notebooks" for name in stale]))


def readme():
    "README.md is what nbs/index.ipynb says."
    if run(sys.executable, "tests/render_readme.py", "--check"):
        raise Failed("run: make readme")


def notebooks():
    "Every notebook runs top to bottom."
    if run("nbdev-test", "--n-workers", WORKERS, "--timing"):
        raise Failed("run the notebook named above in JupyterLab (make lab), or: nbdev-test nbs/FOLDER/NOTEBOOK.ipynb")


def pytest():
    "Contracts, matrices, bad input, regressions."
    if run(sys.executable, "-m", "pytest", "-n", WORKERS, "--dist", "loadfile", "-q", "--durations", "8", "tests"):
        raise Failed("run the failing test alone: .venv/bin/python -m pytest tests/test_x.py -k NAME")


STEPS = {step.__name__: step for step in (clean, export, readme, notebooks, pytest)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=STEPS, metavar="NAME", help=f"run this step only: {', '.join(STEPS)}")
    chosen = parser.parse_args(argv).only or list(STEPS)
    began = time.monotonic()
    for name, step in STEPS.items():
        if name not in chosen:
            continue
        print(f"\n=== {name}: {step.__doc__}", flush=True)
        start = time.monotonic()
        try:
            step()
        except Failed as failure:
            print(f"{failure}\n=== {name}: FAILED after {time.monotonic() - start:.1f} s", flush=True)
            return 1
        print(f"=== {name}: holds ({time.monotonic() - start:.1f} s)", flush=True)
    print(f"\nAll hold ({time.monotonic() - began:.0f} s).", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
