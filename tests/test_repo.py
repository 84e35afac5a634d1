"""The repository holds its own rules: one notebook a module, layers, documentation, size, metadata."""
import ast
import importlib.metadata as metadata
import io
import json
import os
import re
import subprocess
import sys
import time
import tokenize
import tomllib
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, NOTEBOOKS = ROOT / "fvlm", ROOT / "nbs"

# A module may import modules of a lower number, and earlier notebooks of its own layer.
LAYERS = {
    "ground": 0, "data": 10, "encoders": 20, "blocks": 30, "objectives": 40, "models": 50,
    "training": 60, "recipes": 65, "evidence": 70, "instruments": 80, "app": 90,
}
# The layer of data has more notebooks than ten numbers: generated worlds have their own folder, and come first.
OWN_FOLDER = {"data.sprites": "05_worlds", "data.worlds": "05_worlds", "data.moving_mnist": "05_worlds",
              "app.frame_demo": "99_frame_app", "app.frame_arms": "99_frame_app", "app.frame_study": "99_frame_app"}
EXPORTING_NOTHING = {"studies", "lessons"}
MODEL_LIBRARIES = {"timm", "diffusers", "transformers"}
NOTEBOOK_BYTES, FILE_BYTES, STATIC_BYTES = 300_000, 1_000_000, 2_000_000


def told(offenders):
    "One offender a line, for the message of an assertion."
    return "\n  " + "\n  ".join(map(str, offenders))


def fresh(code, *arguments, cwd=None, timeout=120):
    "What a new Python prints when it runs `code`."
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd or ROOT, capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@cache
def tracked():
    "Every file git tracks or would track."
    done = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    return [ROOT / name for name in done.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


@cache
def notebooks():
    "Path -> parsed notebook."
    return {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(NOTEBOOKS.rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts}


@cache
def exported():
    "[(module as default_exp says it, notebook path)]."
    pairs = []
    for path, notebook in notebooks().items():
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code" and (found := re.search(r"^#\|\s*default_exp\s+(\S+)", "".join(cell["source"]), re.MULTILINE)):
                pairs.append((found[1], path))
    return pairs


@cache
def modules():
    "Dotted name without the package -> path, of every generated module."
    return {
        path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name not in ("__init__.py", "_modidx.py") and "static" not in path.parts and "__pycache__" not in path.parts
    }


def layer_of(module):
    "The name of a module's layer: the modules at the top of the package are the ground."
    return module.split(".")[0] if "." in module else "ground"


@cache
def place():
    "Module -> (layer number, notebook number)."
    return {module: (LAYERS[layer_of(module)], int(re.match(r"\d+", path.name)[0])) for module, path in exported()}


# --- notebooks and modules -------------------------------------------------------------------------------------------

def test_one_notebook_a_module():
    seen = {}
    for module, path in exported():
        seen.setdefault(module, []).append(str(path.relative_to(ROOT)))
    twice = [f"{module}: {', '.join(paths)}" for module, paths in seen.items() if len(paths) > 1]
    assert not twice, "two notebooks export one module, the second overwrites the first:" + told(twice)


def test_no_orphan_module():
    orphans = sorted(set(modules()) - {module for module, _ in exported()})
    assert not orphans, "modules that no notebook exports:" + told(orphans)
    missing = sorted({module for module, _ in exported()} - set(modules()))
    assert not missing, "notebooks whose module is not there (run: make notebooks):" + told(missing)


def test_a_notebook_lies_in_the_folder_of_its_layer():
    wrong = []
    for module, path in exported():
        folder, name = path.relative_to(NOTEBOOKS).parts[0], path.stem
        expected = f"{LAYERS[layer_of(module)]:02d}_{layer_of(module)}" if layer_of(module) in LAYERS else "no such layer"
        expected = OWN_FOLDER.get(module, expected)
        if folder != expected or re.sub(r"^\d+_", "", name) != module.split(".")[-1]:
            wrong.append(f"{path.relative_to(ROOT)} exports {module}: expected in {expected}/, named after its module")
    for path in notebooks():
        if path.relative_to(NOTEBOOKS).parts[0] in EXPORTING_NOTHING and any(path == other for _, other in exported()):
            wrong.append(f"{path.relative_to(ROOT)} exports a module: studies and lessons export nothing")
    assert not wrong, told(wrong)


def test_notebook_numbers_in_a_layer_are_unique_and_belong_to_it():
    seen, wrong = {}, []
    for module, path in exported():
        number = place()[module]
        if number in seen:
            wrong.append(f"{path.relative_to(ROOT)} and {seen[number].relative_to(ROOT)} have one number")
        seen[number] = path
        first = int(path.parent.name[:2])
        if not first <= number[1] <= first + 19:  # a layer may outgrow its ten: the numbers order the notebooks of one layer and say nothing between layers
            wrong.append(f"{path.relative_to(ROOT)}: number outside {first}..{first + 19}")
    assert not wrong, told(wrong)


def imports_of(module, path):
    "(line, absolute dotted name) of everything a module imports, inside functions too."
    package = ["fvlm", *module.split(".")[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            if source.split(".")[0] == "fvlm":
                for alias in node.names:  # `from fvlm.data import video` names a module, `from fvlm.core import X` does not
                    whole = f"{source}.{alias.name}"
                    yield node.lineno, whole if whole.removeprefix("fvlm.") in modules() else source
            else:
                yield node.lineno, source


def test_imports_obey_the_layers():
    wrong = []
    for module, path in modules().items():
        for line, name in dict.fromkeys(imports_of(module, path)):
            if name.split(".")[0] != "fvlm" or name == "fvlm":  # the package itself holds only names and the version
                continue
            target = name.removeprefix("fvlm.")
            where = f"{path.relative_to(ROOT)}:{line} imports {name}"
            if target not in place():
                wrong.append(f"{where}: not a module; import from the module that defines it")
            elif place().get(module, (0, 0)) <= place()[target]:
                wrong.append(f"{where}: {place()[target]} is not below {place().get(module)}")
    assert not wrong, told(wrong)


def test_blocks_are_pure_torch():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for module, path in modules().items() if layer_of(module) == "blocks"
        for line, name in imports_of(module, path)
        if name.split(".")[0] in MODEL_LIBRARIES or name in ("fvlm.files", "pathlib", "os", "io")
    ]
    assert not wrong, "blocks know tensors, no model libraries and no files:" + told(wrong)


def test_every_notebook_has_a_title_and_one_line_on_what_it_is():
    wrong = []
    for path, notebook in notebooks().items():
        first = notebook["cells"][0] if notebook["cells"] else {"cell_type": "none", "source": ""}
        lines = "".join(first["source"]).splitlines() if first["cell_type"] == "markdown" else []
        quotes = [line for line in lines if line.startswith(">")]
        if not (len(lines) >= 3 and lines[0].startswith("# ") and not lines[1].strip() and lines[2].startswith("> ") and len(quotes) == 1):
            wrong.append(path.relative_to(ROOT))
    assert not wrong, "the first cell should be `# Title`, an empty line, `> one line`:" + told(wrong)


def test_notebooks_are_small_and_hold_no_widget_state():
    wrong = [f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e3:.0f} kB" for path in notebooks() if path.stat().st_size > NOTEBOOK_BYTES]
    wrong += [f"{path.relative_to(ROOT)}: metadata.widgets" for path, notebook in notebooks().items() if "widgets" in notebook["metadata"]]
    assert not wrong, f"at most {NOTEBOOK_BYTES / 1e3:.0f} kB and no widget state:" + told(wrong)


def test_notebooks_hold_no_errors():
    wrong = [
        f"{path.relative_to(ROOT)}: {output['ename']}"
        for path, notebook in notebooks().items() for cell in notebook["cells"] for output in cell.get("outputs", [])
        if output["output_type"] == "error"
    ]
    assert not wrong, "an error was stored as an output:" + told(wrong)


def test_no_file_is_large():
    wrong = [
        f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.2f} MB" for path in tracked()
        if path.stat().st_size > (STATIC_BYTES if path.is_relative_to(PACKAGE / "static") else FILE_BYTES)
    ]
    assert not wrong, told(wrong)


def test_nothing_names_a_machine():
    words = {
        # Ada is the user of our examples.
        "an absolute path of one machine": r"(?<![\w.~$}-])/(?:wo" r"rk|ro" r"ot|home/(?!ada\b)\w{3,}|Users/\w{3,})/\w",
        "a package registry's host": r"\b(?:py" r"pi\.org|pythonho" r"sted\.org)",
    }
    wrong = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture or a model
        for what, pattern in words.items():
            for found in re.finditer(pattern, text):
                wrong.append(f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, found.start()) + 1}: {what}: {text[found.start():found.end() + 20]!r}")
    for path, notebook in notebooks().items():
        for cell in notebook["cells"]:
            shown = "".join("".join(output.get("text", "")) + "".join(output.get("data", {}).get("text/plain", "")) for output in cell.get("outputs", []))
            if found := re.search(r"/tmp/\S+", shown):
                wrong.append(f"{path.relative_to(ROOT)}: a temporary folder in a stored output: {found[0]!r}")
    assert not wrong, told(wrong)


# --- documentation ---------------------------------------------------------------------------------------------------

def public_names(tree):
    "What `__all__` says."
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets):
            return set(ast.literal_eval(node.value))
    return set()


def is_dataclass(node):
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def undocumented(source, where):
    "What is missing in a module's public functions and classes: docstrings, and a comment on every parameter's own line."
    tree, wrong = ast.parse(source), []
    commented = {token.start[0] for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT}
    public = public_names(tree)

    def check_parameters(function, name):
        spec = function.args
        given = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, [spec.vararg, spec.kwarg])]
        given = [argument for argument in given if argument.arg not in ("self", "cls") and not argument.arg.startswith("_")]
        lines = [argument.lineno for argument in given]
        for argument in given:
            if lines.count(argument.lineno) > 1:
                wrong.append(f"{where}:{argument.lineno} {name}: {argument.arg} shares its line with another parameter")
            elif not commented & set(range(argument.lineno, next_line(argument.lineno, lines, function))):
                wrong.append(f"{where}:{argument.lineno} {name}: no comment on {argument.arg}")

    def next_line(line, lines, function):
        "The line on which the next parameter or the body begins: a long default may carry its comment on its last line."
        return min([other for other in lines if other > line] + [function.body[0].lineno])

    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name not in public:
            continue
        if not ast.get_docstring(node):
            wrong.append(f"{where}:{node.lineno} {node.name}: no docstring")
        if not isinstance(node, ast.ClassDef):
            check_parameters(node, node.name)
            continue
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name in ("__init__", "forward"):
                check_parameters(item, f"{node.name}.{item.name}")
            if isinstance(item, ast.AnnAssign) and is_dataclass(node) and "ClassVar" not in ast.unparse(item.annotation):
                field = item.target.id
                if not field.startswith("_") and not commented & set(range(item.lineno, item.end_lineno + 1)):
                    wrong.append(f"{where}:{item.lineno} {node.name}: no comment on field {field}")
    return wrong


def test_every_public_symbol_is_documented():
    wrong = [line for path in modules().values() for line in undocumented(path.read_text(encoding="utf-8"), path.relative_to(ROOT))]
    assert not wrong, f"{len(wrong)} gaps in the documentation:" + told(wrong)


def test_the_documentation_test_sees_gaps():
    source = '''
__all__ = ["f", "C", "K", "g"]
def f(a, b):
    pass
def g(
    a=(1,
       2),  # fine
    *rest,
):
    "Doc."
@dataclass(frozen=True)
class C:
    "Doc."
    x: int
    y: int = 0  # fine
    _z: int = 0
class K:
    "Doc."
    def __init__(self, a): pass
    def forward(
        self,
        x,  # fine
    ): pass
def hidden(a, b): pass
'''
    found = "\n".join(undocumented(source, "m"))
    assert [line.split(" ", 1)[1] for line in found.splitlines()] == [
        "f: no docstring", "f: a shares its line with another parameter", "f: b shares its line with another parameter",
        "g: no comment on rest", "C: no comment on field x", "K.__init__: no comment on a",
    ]


# --- imports in a fresh process --------------------------------------------------------------------------------------

def test_the_ground_and_the_command_line_import_no_torch():
    names = ["fvlm", *(f"fvlm.{module}" for module in modules() if layer_of(module) == "ground"), "fvlm.app.cli"]
    done = fresh("import sys, importlib\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n    print(name, 'torch' in sys.modules)", *names)
    assert done.returncode == 0, done.stderr
    heavy = [line.split()[0] for line in done.stdout.splitlines() if line.endswith("True")]
    assert not heavy, "the first of these imports torch:" + told(heavy)


def test_every_module_can_be_imported_alone():
    "Each in a process of its own, forked from one that holds only torch: an order of imports that happens to work is found."
    code = """
import os, sys, traceback
import torch
for name in sys.argv[1:]:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            __import__(name)
        except BaseException:
            print(f"{name}: {traceback.format_exc(limit=-2)}", flush=True)
            os._exit(1)
        os._exit(0)
    os.waitpid(child, 0)
print("done")
"""
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this platform")
    done = fresh(code, *(f"fvlm.{module}" for module in modules()), timeout=300)
    assert done.stdout.strip() == "done", done.stdout + done.stderr


def test_scmhsa_imports_no_model_library():
    done = fresh(f"import sys, fvlm.blocks.scmhsa; print(sorted({MODEL_LIBRARIES!r} & set(sys.modules)))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_help_is_quick_and_imports_no_torch():
    done = fresh("import sys\nfrom fvlm.app.cli import main\ncode = main(['--help'])\nprint('torch' in sys.modules, code)")
    assert done.returncode == 0 and done.stdout.strip().endswith("False 0"), done.stdout + done.stderr
    script, seconds = Path(sys.executable).parent / "fvlm", []
    for _ in range(5):  # the best of five: the machine may be busy
        start = time.perf_counter()
        shown = subprocess.run([script, "--help"], capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert shown.returncode == 0, shown.stderr
    assert min(seconds) < 1.0, f"fvlm --help took {min(seconds):.2f} s"


def test_public_names_are_there():
    code = """
import fvlm
for name, module in sorted(fvlm._NAMES.items()):
    try:
        value = getattr(fvlm, name)
        if name not in __import__(f"fvlm.{module}", fromlist=["__all__"]).__all__:
            print(f"fvlm.{name}: not in the __all__ of fvlm.{module}")
    except (ImportError, AttributeError) as error:
        print(f"fvlm.{name}: {error}")
assert set(fvlm._NAMES) <= set(dir(fvlm))
try:
    fvlm.nothing_of_this_name
except AttributeError as error:
    assert "nothing_of_this_name" in str(error)
else:
    print("an unknown name raised nothing")
print("done")
"""
    done = fresh(code)
    assert done.stdout.strip() == "done", done.stdout + done.stderr


# --- metadata --------------------------------------------------------------------------------------------------------

@cache
def settings_ini():
    config = ConfigParser(interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def requirements(*keys):
    return [line.strip() for key in keys for line in settings_ini()[key].splitlines() if line.strip()]


def test_settings_and_pyproject_agree():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    nbdev, settings = pyproject["tool"]["nbdev"], settings_ini()
    assert "project" not in pyproject, "metadata belongs into settings.ini; a [project] table would silently win"
    for key in ("lib_path", "nbs_path"):
        assert nbdev[key] == settings[key], key
    assert nbdev["update_pyproject"] is False and nbdev["put_version_in_init"] is False and nbdev["exec_profile"] is False
    version = re.search(r'^__version__ = "(.+)"$', (PACKAGE / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert version == settings["version"], "fvlm/__init__.py and settings.ini name different versions"
    least = settings["min_python"]
    assert f"sys.version_info >= ({least.replace('.', ', ')})" in (ROOT / "Makefile").read_text(encoding="utf-8"), "Makefile: another Python"
    assert f'python-version: "{least}"' in (ROOT / ".github/workflows/ci.yaml").read_text(encoding="utf-8"), "ci.yaml: another Python"
    assert sys.version_info >= tuple(map(int, least.split(".")))


def test_the_installed_package_is_the_one_under_test(tmp_path):
    done = fresh("import fvlm; print(fvlm.__file__)", cwd=tmp_path)  # not from the root: that would hide a broken install
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).resolve() == (PACKAGE / "__init__.py").resolve()
    assert metadata.version("fvlm") == settings_ini()["version"], "run: make clean && make test"


def test_installed_metadata_is_that_of_settings():
    def plain(line):
        return re.sub(r"""\s|["']|;.*extra.*$""", "", line).replace("_", "-").lower()

    def parts(line):  # the order of version bounds is setuptools' own
        name, *rest = re.split(r"(?=[<>=!~])", plain(line).replace(",", ""), maxsplit=1)
        return name, frozenset(re.findall(r"[<>=!~]+[\w.]+", "".join(rest)))

    known = {parts(line) for line in metadata.requires("fvlm") or [] if "bench" not in line}
    wanted = {parts(line) for line in requirements("requirements", "dev_requirements")}
    differ = sorted(f"{name} {' '.join(sorted(bounds))}" for name, bounds in known ^ wanted)
    assert not differ, "the install is older than settings.ini (run: make clean && make test):" + told(differ)
    scripts = {point.name: point.value for point in metadata.distribution("fvlm").entry_points if point.group == "console_scripts"}
    assert scripts == dict([line.strip().split("=") for line in settings_ini()["console_scripts"].splitlines() if line.strip()])


def test_every_requirement_is_installed_and_importable():
    from importlib.util import find_spec

    from packaging.requirements import Requirement

    provides = {}
    for module, owners in metadata.packages_distributions().items():
        for owner in owners:
            provides.setdefault(owner.lower().replace("_", "-"), []).append(module)
    wrong = []
    for line in requirements("requirements", "dev_requirements"):
        need = Requirement(line)
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{line}: not installed")
            continue
        if not need.specifier.contains(version, prereleases=True):
            wrong.append(f"{line}: version {version} is installed")
        if not any(find_spec(module) for module in provides.get(need.name.lower().replace("_", "-"), [])):
            wrong.append(f"{line}: brings no importable module")
    assert not wrong, told(wrong)


def test_what_the_package_imports_is_required():
    "A library that is imported but not in settings.ini works on the author's machine only."
    owners = metadata.packages_distributions()
    needed = {re.split(r"[<>=!~\[; ]", line)[0].lower().replace("_", "-") for line in requirements("requirements")}
    wrong = []
    for module, path in modules().items():
        for line, name in imports_of(module, path):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top == "fvlm":
                continue
            if not {owner.lower().replace("_", "-") for owner in owners.get(top, [])} & needed:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {top}")
    assert not wrong, "not among the requirements of settings.ini:" + told(wrong)
