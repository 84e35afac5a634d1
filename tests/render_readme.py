"""README.md, rendered from nbs/index.ipynb.

    python tests/render_readme.py --write     write README.md and its pictures
    python tests/render_readme.py --check     exit 1, with the difference, if README.md is not what the notebook says

The notebook is executed first, so no number on the front page can be stale. A cell that begins with `#| hide`,
`#| default_exp` or `#| export` is left out; `#| hide_input` shows only the output. GitHub shows no inlined pictures,
so they are written to nbs/images/readme_*.png and linked; the check compares text, and of pictures only that they exist.
"""
import argparse
import difflib
import posixpath
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INDEX, README, IMAGES = Path("nbs/index.ipynb"), Path("README.md"), Path("nbs/images")
FLAG = re.compile(r"^#\|\s*(\w+)", re.MULTILINE)
LEFT_OUT = {"hide", "default_exp", "export", "exporti"}
LINK = re.compile(r"(!?\[[^\]\n]*\]\()([^)\s]+)(\))|(<(?:img|a)\b[^>]*?\b(?:src|href)=\")([^\"]+)(\")")


def from_root(target):
    "A link of nbs/index.ipynb as README.md has to say it; web addresses and anchors stay."
    if re.match(r"^([a-zA-Z][a-zA-Z0-9+.-]*:|#|/)", target):
        return target
    return posixpath.normpath(posixpath.join(INDEX.parent.as_posix(), target))


def relink(markdown):
    "The text with every relative link fixed, code left alone."
    parts = re.split(r"(^```[\s\S]*?^```[^\S\n]*$|^(?: {4}[^\n]*\n?)+|`[^`\n]+`)", markdown, flags=re.MULTILINE)

    def fix(found):
        before, target, after = (found[1], found[2], found[3]) if found[2] else (found[4], found[5], found[6])
        return before + from_root(target) + after

    return "".join(part if index % 2 else LINK.sub(fix, part) for index, part in enumerate(parts))


def render(root):
    "(README text, {picture path: bytes}) from the executed notebook."
    import nbformat
    from nbclient import NotebookClient
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(root / INDEX, as_version=4)
    here = {"metadata": {"path": str(root / INDEX.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=here, extra_arguments=["--log-level=40"]).execute()
    cells = []
    for cell in notebook.cells:
        flags = set(FLAG.findall(cell.source)) if cell.cell_type == "code" else set()
        if flags & LEFT_OUT:
            continue
        if cell.cell_type == "code":
            cell.source = "" if "hide_input" in flags else re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE).strip()
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data = {"image/png": output.data["image/png"]}
                if output.output_type != "stream":
                    output.metadata = {}
        cells.append(cell)
    notebook.cells = cells
    exporter = MarkdownExporter()
    body, resources = exporter.from_notebook_node(notebook, resources={"unique_key": "readme", "output_files_dir": IMAGES.name})
    body = re.sub(r"^```python\n+```$", "", body, flags=re.MULTILINE)
    body = re.sub(r"!\[(?:png|jpeg)\]\(", "![](", body)
    body = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in relink(body).splitlines())).strip() + "\n"
    pictures = {IMAGES / Path(name).name: data for name, data in resources.get("outputs", {}).items()}
    return body, pictures


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true", help="write README.md and its pictures")
    mode.add_argument("--check", action="store_true", help="exit 1 if README.md differs")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    options = parser.parse_args(argv)
    root = options.root.resolve()
    if not (root / INDEX).is_file():
        print(f"{INDEX} is missing: README.md is rendered from it")
        return 1
    body, pictures = render(root)
    if options.write:
        for path in (root / IMAGES).glob("readme_*"):
            path.unlink()
        for path, data in pictures.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
        (root / README).write_text(body, encoding="utf-8")
        print(f"{README}: {len(body):,} characters, {len(pictures)} pictures, {sum(map(len, pictures.values())) / 1e3:.0f} kB")
        return 0
    came = (root / README).read_text(encoding="utf-8") if (root / README).is_file() else ""
    missing = [str(path) for path in pictures if not (root / path).is_file()]
    difference = list(difflib.unified_diff(came.splitlines(), body.splitlines(), str(README), str(INDEX), lineterm="", n=1))
    for line in difference[:60]:
        print(line)
    for path in missing:
        print(f"{path} is missing")
    return 1 if difference or missing else 0


if __name__ == "__main__":
    sys.exit(main())
