"""Everything the package declares comes from settings.ini; this file only translates it for setuptools."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

STATUS = {"1": "1 - Planning", "2": "2 - Pre-Alpha", "3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}
readme = here / "README.md"

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"],
    packages=find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]),
    include_package_data=True,
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={
        "all": cfg["optional_requirements"].split(),
        "dev": cfg["dev_requirements"].split() + cfg["optional_requirements"].split(),
        "docs": cfg["docs_requirements"].split(),
        "hub": [r for r in cfg["optional_requirements"].split() if r.startswith("huggingface_hub")],
        **{r.split(">")[0]: [r] for r in cfg["tracker_requirements"].split()},
        "demo": cfg["demo_requirements"].split(),
        "diffusers": [r for r in cfg["optional_requirements"].split() if r.startswith("diffusers")],
        "onnx": [r for r in cfg["optional_requirements"].split() if r.startswith("onnx")],
    },
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    classifiers=[
        f"Development Status :: {STATUS[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        "Intended Audience :: Science/Research",
        f"Natural Language :: {cfg['language']}",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
    options={
        "editable_wheel": {"mode": "compat"}
    },  # a path file: with setuptools' finder, a script beside the clone would import the clone's folder
)
