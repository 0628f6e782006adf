"""The wheel contains the templates: pages are rendered from an installation that knows nothing of the source tree."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.support import reports
from tests.support.page_tree import tree_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, sys
from pathlib import Path
import mmbert_core
from mmbert_core.report.build import render_again
print(Path(mmbert_core.__file__).parents[1])
print(render_again(Path(sys.argv[1])))
"""


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)


def test_a_page_is_rendered_from_an_installed_wheel(tmp_path):
    source, target, folder = tmp_path / "source", tmp_path / "target", tmp_path / "report"
    ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT / "mmbert_core", source / "mmbert_core", ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source))
    [wheel] = tmp_path.glob("*.whl")
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mmbert_core").rglob("templates/*")}
    assert len(templates) >= 6 and templates <= set(zipfile.ZipFile(wheel).namelist())

    pip("install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(reports.binary_report()))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.splitlines() == [str(target), str(folder / "report.html")], done.stderr
    page = tree_of((folder / "report.html").read_text(encoding="utf-8"))
    assert len(list(page.all("section"))) == len(reports.SECTIONS)
