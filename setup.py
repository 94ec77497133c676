"""Where the packages are; the rest of the package's description is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    # The gin files ship inside the package, as switch_t5/configs.
    packages=[*find_packages(include=["switch_t5", "switch_t5.*"]), "switch_t5.configs"],
    package_dir={"switch_t5.configs": "configs"},
)
