"""The generic folders stay folders, and the packages import each other one way."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MAY_IMPORT = {
    "kernels/nlx_kernels": {"nlx_kernels"},
    "nlx": {"nlx", "nlx_kernels"},
    "experiments/nlx_experiments": {"nlx", "nlx_kernels", "nlx_experiments"},
}
OURS = {"nlx", "nlx_kernels", "nlx_experiments", "kernels", "experiments", "tests"}


def imports(path):
    """Dotted names imported by a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", ["kernels", "experiments", "tests"])
def test_generic_folders_are_no_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        for name in imports(path):
            top = name.split(".")[0]
            assert top not in OURS or top in MAY_IMPORT[package], f"{path} imports {name}"


def test_optim_and_nn_stand_apart():
    for here, other in (("optim", "nlx.nn"), ("nn", "nlx.optim")):
        for path in (ROOT / "nlx" / here).rglob("*.py"):
            assert not [name for name in imports(path) if name.startswith(other)], path


def test_wheel_holds_the_three_packages():
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {pathlib.Path(package).name for package in packages} == {
        "nlx",
        "nlx_kernels",
        "nlx_experiments",
    }


def test_what_was_measured_lies_in_the_package_and_is_kept_by_git():
    """So it is in the wheel, which takes all of a package but what git ignores."""
    import subprocess

    from nlx_kernels import _tuned

    files = [str(file) for file in _tuned.FOLDER.glob("*.json")]
    assert files
    assert pathlib.Path(files[0]).is_relative_to(ROOT / "kernels/nlx_kernels")
    ignored = subprocess.run(["git", "check-ignore", *files], cwd=ROOT, capture_output=True)
    assert ignored.stdout == b""


def test_nothing_names_this_machine():
    files = [p for p in ROOT.rglob("*") if p.suffix in {".md", ".py", ".toml", ".txt"}]
    for path in files:
        inside = path.relative_to(ROOT).parts
        if inside[0].startswith(".") or inside[0] in {"runs", "dist", "build"}:
            continue
        text = path.read_text()
        for word in ("/" + "work/", "/" + "root/", "extra-" + "index"):
            assert word not in text, f"{path} names {word}"
