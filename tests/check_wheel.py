"""Build the wheel, install it in an environment of its own, and run its demo from there.

Not a test module: ``make check`` runs it, since it takes a minute. Dependencies are taken from the environment
that runs it, so nothing is downloaded; klkit itself must come from the wheel.
"""

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(*command: str, **options) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(here), str(ROOT))
        wheel = next(here.glob("klkit-*.whl"))
        names = zipfile.ZipFile(wheel).namelist()
        data = ("report/templates/template.html", "report/schemas/result-1.json", "zoo/weights/docs/model.safetensors")
        for needed in ("py.typed", *data):
            assert f"klkit/{needed}" in names, f"the wheel lacks {needed}"
        run(sys.executable, "-m", "venv", str(here / "venv"))
        python = here / "venv" / "bin" / "python"
        site = Path(run(str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
        run(str(python), "-m", "pip", "install", "--quiet", "--no-deps", str(wheel))
        # Dependencies of the outer environment, without its editable klkit: a .pth line would bring that too.
        outer = run(sys.executable, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip()
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        (site / "outer.pth").write_text(f"import site, sys; sys.path.append({outer!r})\n")
        where = run(str(python), "-c", "import klkit; print(klkit.__file__)", cwd=here, env=clean).strip()
        assert str(site) in where, f"klkit came from {where}, not from the wheel"
        text = run(str(here / "venv" / "bin" / "klkit"), "demo", "--out", "run", "--json", "-", cwd=here, env=clean)
        result = json.loads(text)
        assert result["audit"]["passed"], result["audit"]
        assert (here / "run" / "report.html").stat().st_size > 10_000
        print(f"{wheel.name}: installed elsewhere, demo says: {result['sentence']}")


if __name__ == "__main__":
    main()
