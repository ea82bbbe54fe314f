"""The house rules that a machine can hold: one direction of imports, sizes, no global randomness."""

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import klkit

SOURCE = Path(klkit.__file__).parent

# A module may import from its own level and from the levels above it in this list.
LEVELS = [
    {"numerics", "rng", "stats", "files"},
    {"sequences", "results", "ranking", "frames"},
    {"divergences"},
    {"models", "objectives"},
    {"caches"},
    {"sampling", "estimators"},
    {"train", "report", "zoo"},
    {"api"},
    {"integrations"},
    {"cli"},
]


def level(name: str) -> int:
    return next(i for i, names in enumerate(LEVELS) if name in names)


def modules() -> list[Path]:
    return sorted(p for p in SOURCE.rglob("*.py") if "weights" not in p.parts)


def part_of(path: Path) -> str | None:
    """The folder or module below ``klkit`` that a file belongs to; None for the package itself."""
    relative = path.relative_to(SOURCE)
    name = relative.parts[0].removesuffix(".py")
    return None if name in ("__init__", "__main__") else name


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module] if node.module != "klkit" else [f"klkit.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("klkit.")}
    return {name for name in found if any(name in names for names in LEVELS)}


def test_imports_point_one_way():
    wrong = [
        f"{path.relative_to(SOURCE)} imports klkit.{other}"
        for path in modules()
        if (part := part_of(path)) is not None
        for other in imported(path)
        if level(other) > level(part)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_statistics_layer_needs_numpy_only():
    for path in (SOURCE / "stats").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {"torch", "scipy", "transformers"}, path


def test_module_sizes():
    sizes = {path: len(path.read_text().splitlines()) for path in modules()}
    assert not [(p.name, n) for p, n in sizes.items() if n > 400]
    real = [n for n in sizes.values() if n > 5]
    assert statistics.median(real) <= 200


def test_no_global_randomness():
    forbidden = ("torch.manual_seed", "np.random.seed", "np.random.rand", "np.random.choice", "random.seed")
    for path in modules():
        text = path.read_text()
        assert not [word for word in forbidden if word in text], path


def test_import_and_help_leave_torch_alone():
    code = "import klkit, sys; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    code = (
        "import sys\nfrom klkit.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_public_names_exist_and_are_documented():
    for name in klkit.__all__:
        assert getattr(klkit, name).__doc__, name
