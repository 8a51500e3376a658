"""The manifest on disk: one file, and beside it the shards that were listed since it was written.

The manifest is written whole, and each time takes as long as everything it lists. A run lists its
shards one by one, so they go to a log, a line each, which the manifest takes over when it is next
written. A line names the manifest that it continues by a digest, so a manifest that has taken lines
over, and was not yet rid of them when its process died, does not count them twice; and a line that
was cut short was never written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from curate import atomic
from curate.errors import CurateError
from curate.manifest import Manifest, ShardEntry, parse_manifest

LOG = "shards.jsonl"

Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class _Known:
    """What was read, and how to tell that it still stands: the files, and the manifest's digest."""

    stamp: Stamp
    digest: str
    manifest: Manifest


class ManifestFile:
    """The manifest of one run directory, as it stands on disk and as it is changed.

    Attributes:
        path: `manifest.json`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._log = path.with_name(LOG)
        self._known: _Known | None = None

    @property
    def contents(self) -> Manifest:
        """The manifest; read again only where a file was changed."""
        return self._read().manifest

    def update(self, change: Callable[[Manifest], Manifest]) -> Manifest:
        """Replace the manifest by `change(manifest)`, where that differs.

        Shards that are added and nothing else are appended to the log.
        """
        known = self._read()
        changed = change(known.manifest)
        if changed == known.manifest:
            return changed
        if added := _added(known.manifest, changed):
            self._append(known.digest, added)
            self._known = _Known(self._stamp(), known.digest, changed)
        else:
            self.write(changed)
        return changed

    def write(self, manifest: Manifest) -> None:
        """Replace the manifest in one step; what the log held is in it or gone."""
        # Validated again, since model_copy does not.
        checked = Manifest.model_validate(manifest.model_dump(by_alias=True))
        atomic.write_text(self.path, checked.text())
        atomic.remove(self._log)

    def fold(self) -> None:
        """Take the log over into the manifest, so that one file holds everything."""
        if self._log.exists():
            self.write(self.contents)

    def _read(self) -> _Known:
        stamp = self._stamp()
        if self._known is None or self._known.stamp != stamp:
            # The log first: what it loses meanwhile the manifest has.
            lines = _lines(self._log)
            data = self.path.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            listed = _listed(lines, digest, self._log)
            manifest = _with_shards(parse_manifest(data, self.path), listed)
            self._known = _Known(stamp, digest, manifest)
        return self._known

    def _append(self, digest: str, shards: tuple[ShardEntry, ...]) -> None:
        line = {"after": digest, "shards": [shard.model_dump() for shard in shards]}
        atomic.append_line(self._log, json.dumps(line))

    def _stamp(self) -> Stamp:
        """Of both files; raises FileNotFoundError where there is no manifest."""
        found = [self.path.stat()]
        with suppress(FileNotFoundError):
            found.append(self._log.stat())
        return tuple((status.st_ino, status.st_mtime_ns, status.st_size) for status in found)


def _added(known: Manifest, changed: Manifest) -> tuple[ShardEntry, ...]:
    """The shards that `changed` has after all of `known`; none where anything else differs."""
    count = len(known.shards)
    if changed.shards[:count] != known.shards:
        return ()
    same = changed.model_copy(update={"shards": known.shards}) == known
    return changed.shards[count:] if same else ()


def _with_shards(manifest: Manifest, shards: tuple[ShardEntry, ...]) -> Manifest:
    return manifest.model_copy(update={"shards": manifest.shards + shards}) if shards else manifest


def _lines(path: Path) -> list[bytes]:
    """The whole lines of a file; none where it is not there."""
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []


def _listed(lines: list[bytes], digest: str, path: Path) -> tuple[ShardEntry, ...]:
    """The shards that lines add to the manifest of that digest.

    Raises:
        CurateError: a line that was written whole is not one of ours.
    """
    found: list[ShardEntry] = []
    for number, line in enumerate(lines, 1):
        try:
            said: dict[str, Any] = json.loads(line)
            if said["after"] == digest:
                found += map(ShardEntry.model_validate, said["shards"])
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            raise CurateError(
                f"{path} is damaged in line {number}: delete that line, and `curate sketch` makes "
                f"the sketches again that it lists"
            ) from error
    return tuple(found)
