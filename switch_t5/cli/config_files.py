"""Where gin files are found: the working folder, the search paths, the files that ship with the package."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from switch_t5.errors import UserError, closest


def packaged_configs() -> Path:
    """Returns the folder of the packaged gin files.

    An installed package holds them as ``switch_t5/configs``; in a checkout they are the repository's
    ``configs``, beside the package.
    """
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def find(name: str, search_paths: Sequence[str], *, asked: str) -> Path:
    """Returns the file that ``name`` means.

    It is looked for in the working folder, then in ``search_paths`` in order, then among the packaged files.

    Args:
      name: an absolute path, or one relative to any of those folders.
      search_paths: the user's folders.
      asked: who asks, such as ``--gin_file`` or ``include in runs/a.gin, line 3``.

    Raises:
      UserError: no such file; with the nearest one there is.
    """
    folders = _folders(search_paths)
    for folder in folders:
        path = folder / name
        if path.is_file():
            return path
    if any((folder / name).is_dir() for folder in folders):
        raise UserError(f"{asked} names {name!r}, which is a folder, not a gin file.")
    if Path(name).is_absolute():
        parent = Path(name).parent
        near = closest(name, [str(path) for path in parent.glob("*.gin")])
        raise UserError(f"{asked} names {name!r}, which does not exist.{near}")
    places = ["the working folder", *map(str, search_paths), "the packaged configs"]
    searched = ", ".join(places[:-1]) + " and " + places[-1]
    near = closest(name, sorted(set(_available(name, folders))))
    raise UserError(f"{asked} names {name!r}, which is not in {searched}.{near}")


def _folders(search_paths: Sequence[str]) -> list[Path]:
    for folder in search_paths:
        if not Path(folder).is_dir():
            raise UserError(f"--gin_search_paths names {folder!r}, which is not a folder.")
    return [Path(), *map(Path, search_paths), packaged_configs()]


def _available(name: str, folders: Sequence[Path]) -> Iterator[str]:
    """Yields the gin files that ``name`` could have meant."""
    for path in folders[-1].rglob("*.gin"):
        yield path.relative_to(folders[-1]).as_posix()
    # The user's folders may be large: only the one that holds, or would hold, the file is listed.
    for folder in folders[:-1]:
        for path in (folder / name).parent.glob("*.gin"):
            yield path.relative_to(folder).as_posix()


def read(path: Path) -> str:
    """Returns a gin file's text.

    Raises:
      UserError: the file cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{shown(path)} is not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be read: {error.strerror}.") from None


def shown(path: Path) -> str:
    """Returns a path as a message shows it: relative to the working folder where it lies inside."""
    absolute, here = path.resolve(), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)
