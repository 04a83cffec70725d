"""Packaging of iibalance: one distribution, two packages (tool settings live in pyproject.toml)."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="iibalance",
    version="0.1.0",
    description="Budget-aware multimodal training (IIBalance): "
    "calibrated, balanced fusion and the kernels under it",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["iib_kernels*", "iibalance*"]),
    package_data={"iibalance": ["*.pyi", "py.typed"], "iib_kernels": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=1.26",
        "scipy>=1.11",
        "pandas>=2.2",
        "scikit-learn>=1.6",
        "accelerate>=1.10",
        "filelock>=4",
        "lazy_loader>=0.4",
        "joblib>=1.5",
        "threadpoolctl",
        "jsonargparse[signatures]>=4.49",
        "PyYAML",
        "tqdm",
        "matplotlib>=3.8",
        "safetensors>=0.4",
    ],
    extras_require={
        "examples": ["lightning>=2.5", "transformers>=4.50"],
        "bench": ["pytest-benchmark>=4", "scikit-posthocs>=0.9"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "pytest-benchmark>=4",
            "hypothesis>=6",
            "scikit-posthocs>=0.9",
            "tensorboard",
            "ruff==0.17.6",
            "mypy",
            "types-PyYAML",
            "lightning>=2.5",
            "transformers>=4.50",
            "pyarrow>=15",
        ],
    },
    entry_points={"console_scripts": ["iibalance = iibalance.__main__:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
