from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist


class SourceArchive(sdist):
    """An archive with requirements.txt, without which setup.py cannot run."""

    def make_distribution(self) -> None:
        self.filelist.append("requirements.txt")
        super().make_distribution()


safetensors = ["safetensors>=0.5"]
test = ["pytest", "hypothesis", "transformers>=5.17,<6", "mistral-common>=1.8", "protobuf"]
triton = ["triton>=3.6; platform_system == 'Linux'"]  # its interpreter needs no GPU
setup(
    name="mixtral",
    version="0.1.0",
    description="Mistral's Mixtral from code that one person can read in an evening",
    python_requires=">=3.10",
    cmdclass={"sdist": SourceArchive},
    packages=find_packages(include=["mixtral"]),
    install_requires=Path(__file__).with_name("requirements.txt").read_text().split(),
    extras_require={"safetensors": safetensors, "test": safetensors + test + triton},
)
