"""Bar viii: what an import costs, in fresh processes; `import fvlm` brings no torch, `import fvlm.blocks.scmhsa` little beside it."""
import subprocess
import sys

from benchmarks.timing import Table, compare


def fresh(
    code: str,  # Python run by a new interpreter
) -> str:
    "What a new interpreter printed; its failure is ours."
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def brings(
    statement: str,  # an import statement
    *modules: str,  # names looked for afterwards
) -> list[str]:
    "Those of `modules` that the statement imported."
    return fresh(f"import sys; {statement}; print(*[m for m in {modules!r} if m in sys.modules])").split()


def main() -> Table:
    "Two facts and one ratio."
    table = Table("imports")
    came = brings("import fvlm", "torch", "numpy")
    table.fact("`import fvlm` imports torch", "yes" if "torch" in came else "no", bar="no", holds="torch" not in came)
    came = brings("import fvlm.blocks.scmhsa", "timm", "diffusers", "transformers")
    table.fact("`import fvlm.blocks.scmhsa` imports timm, diffusers or transformers", ", ".join(came) or "no", bar="no", holds=not came)
    rows = compare("import", ours=lambda: fresh("import torch"), theirs=lambda: fresh("import fvlm.blocks.scmhsa"), check=None, rounds=9, threads=(1,))
    table.add("`import fvlm.blocks.scmhsa` over `import torch`, seconds", rows, bar=1.1, at_most=True)
    light = compare("bare", ours=lambda: fresh("pass"), theirs=lambda: fresh("import fvlm"), check=None, rounds=9, threads=(1,))
    return table.add("`import fvlm` over a bare interpreter, seconds", light)
