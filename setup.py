import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
HUB = ["huggingface_hub>=0.24"]
QUANTIZE = ["bitsandbytes>=0.44"]
PLOT = ["matplotlib>=3.8"]
EVAL = ["lm_eval[hf]>=0.4.9"]
TENSORBOARD = ["tensorboard>=2.14"]
PARQUET = ["pyarrow>=14"]
TEST = [
    *PLOT,
    *TENSORBOARD,
    *PARQUET,
    "mypy>=1.11",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.6",
    "hypothesis>=6.100",
    "transformers>=4.46",
    "peft>=0.13",
]

setup(
    name="lit-llama",
    version=re.search(r'__version__ = "(.*)"', (HERE / "lit_llama/__init__.py").read_text(encoding="utf-8"))[1],
    description="A readable LLaMA and every finetuning method around LLaMA-Adapter",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["lit_llama", "lit_llama.*"]),
    package_data={"lit_llama": ["py.typed"]},
    install_requires=[
        "torch>=2.7,<2.14",  # bounded: a newer version may bring gigabytes of CUDA packages or change results
        "lightning>=2.4",
        "sentencepiece>=0.2",
        "jsonargparse[signatures]>=4.49",
        "tqdm>=4.66",
        "filelock>=3.13",
        "jinja2>=3.1.6",  # older versions have known ways out of the sandbox
        "safetensors>=0.4.5",
        "tokenizers>=0.20",
        "gguf>=0.16",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "numpy",
    ],
    extras_require={
        "hub": HUB,
        "plot": PLOT,
        "tensorboard": TENSORBOARD,
        "parquet": PARQUET,
        "quantize": QUANTIZE,
        "eval": EVAL,
        "test": TEST,
    },
)
