"""Packaging of sglang-relay. Tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="sglang-relay",
    version="0.7.0",
    description="Reuse the KV cache of decoded text at new prompt positions, on stock SGLang",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["sglang_relay", "sglang_relay.*"]), "sglang_relay_kernels"],
    # The folder has no __init__.py: from the repository's root it would shadow PyPI's `kernels`, which SGLang imports.
    package_dir={"sglang_relay_kernels": "kernels"},
    package_data={"sglang_relay": ["py.typed", "measure/*.json"]},
    install_requires=["sglang==0.5.23"],
    extras_require={
        # gguf: reads and independently unpacks the GGUF weights that `fetch-model` converts.
        "models": ["gguf>=0.19"],
        # Pictures of `sglang-relay profile` and of the benches.
        "plot": ["matplotlib>=3.9"],
        "dev": [
            "gguf>=0.19",
            "hypothesis>=6.150",
            "matplotlib>=3.9",
            "pyright==1.1.414",
            "pytest>=9",
            "pytest-xdist>=3.6",
            "ruff==0.17.6",
        ],
    },
    entry_points={
        "sglang.srt.plugins": ["relay = sglang_relay.engine.plugin:load"],
        "console_scripts": ["sglang-relay = sglang_relay.cli:main"],
    },
)
