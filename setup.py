"""Package metadata comes from settings.ini, the one place people edit it."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]


def lines(key):
    return [line.strip() for line in settings[key].splitlines() if line.strip()]


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    license=settings["license"],
    keywords=settings["keywords"],
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=["fvlm", "fvlm.*"]) + ["fvlm.data_cards"],
    # In a wheel the cards live inside the package; a checkout reads them from its top level.
    package_dir={"fvlm": "fvlm", "fvlm.data_cards": "data_cards"},
    package_data={"fvlm": ["static/*", "static/**/*"], "fvlm.data_cards": ["*.md"]},
    install_requires=lines("requirements"),
    extras_require={"dev": lines("dev_requirements"), "bench": lines("bench_requirements")},
    entry_points={"console_scripts": lines("console_scripts")},
)
