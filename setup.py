"""Packaging. The version is written nowhere else."""

from setuptools import find_packages, setup

setup(
    name="t2i-engine",
    version="0.1.0",
    description="Kernel-centric GRPO engine for autoregressive image generators",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(
        include=[
            f"{name}{dots}"
            for name in ("engine", "kernels", "bindings", "rewards", "bench")
            for dots in ("", ".*")
        ]
    ),
    package_data={
        "engine.prompts": ["*.txt"],
        "kernels.cpu": ["*.c", "*.h"],
        "engine.tiny": ["data/*.jsonl", "weights/*.json", "weights/*/*"],
    },
    install_requires=[
        # The ordinary build: it runs on CPU too, and torchvision imports beside it.
        "torch>=2.11,<2.15",
        "torchvision",
        "triton>=3.6; platform_system == 'Linux'",
        "transformers>=5.17,<6",
        "safetensors",
        "open_clip_torch",
        "nvtx",
        "tensorboard",
        "numpy",
        "pillow",
        "pyyaml",
        "tqdm",
    ],
    extras_require={
        "test": ["pytest", "peft>=0.21", "pyarrow", "rapidocr>=3.10", "onnxruntime"],
        "peft": ["peft>=0.21"],
        "torchao": ["torchao>=0.17"],
        "flash": ["flash-attn>=2.7"],
        "xformers": ["xformers>=0.0.32"],
        "parquet": ["pyarrow"],
        "ocr": ["rapidocr>=3.10", "onnxruntime"],
        "bench": ["matplotlib", "liger-kernel>=0.8.5", "trl>=1.16", "cut-cross-entropy>=25.1"],
        "dev": ["ruff", "mypy", "pre-commit"],
    },
)
