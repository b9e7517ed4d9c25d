"""All metadata is in settings.ini, which nbdev reads, too."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
EXTRAS = ("viz", "pose", "physics", "datasets", "xray", "view", "mesh", "data", "cluster", "train")

config = ConfigParser(delimiters=["="])
with open(ROOT / "settings.ini", encoding="utf-8") as file:
    config.read_file(file)
settings = config["DEFAULT"]

extras = {name: settings[f"{name}_requirements"].split() for name in (*EXTRAS, "dev")}
extras["all"] = [requirement for name in EXTRAS for requirement in extras[name]]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    license="MIT",
    url=settings["git_url"],
    project_urls={
        "Documentation": settings["doc_host"] + settings["doc_baseurl"],
        "Changelog": f"{settings['git_url']}/blob/{settings['branch']}/CHANGELOG.md",
    },
    keywords=settings["keywords"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["diffdrr", "diffdrr.*"]),
    package_data={"diffdrr": ["py.typed"]},
    python_requires=">=" + settings["min_python"],
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": [settings["console_scripts"]],
        "nbdev": [f"{settings['lib_name']}={settings['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
