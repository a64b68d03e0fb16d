"""Scripts of other projects that pages need: fetched from npm once, in fixed versions, checked, and kept; pages never
load anything from elsewhere."""
import base64
import hashlib
import shutil
import subprocess
import tarfile
from pathlib import Path

# package: version, sha512 of the archive as npm states it, {path in the archive: path below _static}
PACKAGES = {
    "mathjax": (
        "3.2.2",
        "Bt+SSVU8eBG27zChVewOicYs7Xsdt40qm4+UpHyX7k0/O9NliPc+x77k1/FEsPsjKPZGJvtRZM1vO+geW0OhGw==",
        {
            "es5/tex-chtml-full.js": "mathjax/tex-chtml-full.js",
            "es5/output/chtml/fonts/woff-v2": "mathjax/output/chtml/fonts/woff-v2",
            "LICENSE": "mathjax/LICENSE",
        },
    ),
    "@jupyter-widgets/html-manager": (
        "1.0.15",
        "5thBIV6ymNgmPVOHvzx+gGy8ZSKmSazhtGw4/c4xJDVzRhG9PTeQsRjF3FUTopvFi//SABeNz1yp47bCrJ3CQA==",
        {"dist/embed.js": "widgets/embed.js", "LICENSE": "widgets/LICENSE"},
    ),
}


class NotFetched(Exception):
    "An archive is neither in the cache nor to be had."


def archive(name, version, cache):
    "The package's archive in `cache`, fetched by `npm pack` if it isn't there."
    file = Path(cache)/f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if file.exists(): return file
    how = f"put the file that `npm pack {name}@{version}` writes into {file.parent}"
    if not shutil.which("npm"):
        raise NotFetched(
            f"{name} {version} is needed for pages that work without internet access, and npm is not installed: "
            f"install Node.js, or {how}"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["npm", "pack", f"{name}@{version}", "--silent", "--pack-destination", str(file.parent)],
        capture_output=True,
        text=True,
    )
    if done.returncode or not file.exists():
        raise NotFetched(
            f"{name} {version} is needed for pages that work without internet access, and the npm registry can't be "
            f"reached: {how}\n{done.stderr.strip()[-600:]}"
        )
    return file


def check(file, expected):
    "Raise if the archive is not the one that was meant."
    got = base64.b64encode(hashlib.sha512(file.read_bytes()).digest()).decode()
    if got != expected:
        file.unlink()
        raise NotFetched(f"{file.name} is not what was expected (sha512 {got}, not {expected}); it has been removed")


def vendor(static, cache, packages=None):
    "Put every needed file below `static`; all archives that are missing are named at once."
    packages, files, missing = PACKAGES if packages is None else packages, {}, []
    for name, (version, *_) in packages.items():
        try: files[name] = archive(name, version, cache)
        except NotFetched as e: missing.append(str(e))
    if missing: raise NotFetched("\n".join(missing))
    for name, (_, sha512, members) in packages.items():
        check(file := files[name], sha512)
        with tarfile.open(file) as t:
            for m in t:
                for source, target in members.items():
                    if not m.isfile() or not (m.name == f"package/{source}" or m.name.startswith(f"package/{source}/")):
                        continue
                    to = Path(static)/(target + m.name.removeprefix(f"package/{source}"))
                    to.parent.mkdir(parents=True, exist_ok=True)
                    to.write_bytes(t.extractfile(m).read())
