"""Arrays on disk in numbered shards: one resumable writer, and one reader.

folder/plan.json            what must not change between two commands that fill the folder
folder/ARRAY-00000.npy ...  the rows of shard 0, 1, ... of each array
folder/shard-00000.json ... written after the arrays of the shard: a shard with it is finished
folder/meta.json            written last: a folder with it is finished
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.typing import ArrayLike, DTypeLike

from models.checks.errors import UserError, shown
from models.checks.file_kinds import read_json, what_is
from utils.files import format_bytes, locked, read_lines, read_record, sync, write_json
from utils.records import Record, load_record

PLAN = "plan.json"
META = "meta.json"
KEYS = "keys.txt"  # of formats with keys: one a line, in the order of the rows
# names in plans of formats that are made of images: `utils.data.base.content_of` these
CONTENT = ("images_sha256", "labels_sha256")


@dataclass
class ShardedFolder:
    """A folder of numbered shards that one long command fills, and that the same command continues
    after a kill. Shards depend on nothing but their number, so ranks can share them.

    Shard k holds the items k * shard_size ... of `num_items`. `rows` maps the name of each array to
    the shape and dtype of one item's row. `plan` (JSON values) is what two commands must agree in
    to share the folder.
    """

    folder: Path
    _: KW_ONLY
    plan: dict
    num_items: int
    shard_size: int
    rows: Mapping[str, tuple[tuple[int, ...], DTypeLike]]

    def __post_init__(self) -> None:
        self.plan = json.loads(json.dumps(self.plan))
        self.rows = {name: (tuple(s), np.dtype(dtype)) for name, (s, dtype) in self.rows.items()}
        self._drafts: dict[int, dict[str, np.memmap]] = {}

    @property
    def num_shards(self) -> int:
        return -(-self.num_items // self.shard_size)

    def items(self, shard: int) -> range:
        """The items of one shard; the last one may hold fewer."""
        return range(self.num_items)[shard * self.shard_size : (shard + 1) * self.shard_size]

    def file(self, array: str, shard: int) -> Path:
        """Where one shard of an array lies when it is finished."""
        return shard_file(self.folder, array, shard)

    def record_file(self, shard: int) -> Path:
        """Where the record lies that marks a shard as finished."""
        return self.folder / f"shard-{shard:05d}.json"

    def check_plan(self, names: Sequence[str] | None = None) -> None:
        """`UserError` if the folder holds something else, or was begun with another plan; `names`:
        those of the plan that are known so far, None = all."""
        path, remedy = self.folder / PLAN, f"delete {self.folder}, or choose another folder"
        if os.path.lexists(path):
            begun = read_json(path, remedy)
            if not isinstance(begun, dict):
                raise UserError(f"{path} holds {shown(begun)}, expected an object; {remedy}")
            if CONTENT[0] in self.plan and CONTENT[0] not in begun:
                text = f"{self.folder} was begun by an earlier version, without a hash of its"
                raise UserError(f"{text} images: whether they are the same is not known; {remedy}")
            plans = [begun, self.plan]
            if names is not None:
                plans = [{k: v for k, v in plan.items() if k in names} for plan in plans]
            if changed := plan_differences(*plans):
                text = f"{self.folder} was begun with {', '.join(changed)}"
                raise UserError(f"{text}; use the same input and settings, or {remedy}")
        elif os.path.lexists(self.folder) and not os.path.isdir(self.folder):
            text = f"{self.folder} is a file" if os.path.isfile(self.folder) else (
                f"{self.folder} is {what_is(self.folder)}")  # fmt: skip
            raise UserError(f"{text}; choose another folder")
        elif self.folder.exists():
            with self._writes():
                names = sorted(os.listdir(self.folder))
            if foreign := [n for n in names if n != ".lock" and not n.endswith(".tmp")]:
                text = f"{self.folder} holds other files ({foreign[0]}); choose an empty folder"
                raise UserError(text)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and hold it; `UserError` if that fails or another command holds it."""
        self._make()
        with ExitStack() as stack:
            with self._writes():
                stack.enter_context(locked(self.folder))
            yield

    def begin(self) -> None:
        """Make the folder, compare the plan with the one that is there, and write it. The folder
        counts as unfinished from here on, unless all shards are there."""
        self._make()
        self.check_plan()
        with self._writes():
            if self.unfinished():
                (self.folder / META).unlink(missing_ok=True)
            write_json(self.folder / PLAN, self.plan)

    def require_unchanged(self, content: dict[str, str]) -> None:
        """`UserError` unless what the folder was made of is still what its plan says."""
        if plan_differences({name: self.plan[name] for name in content}, content):
            text = f"the data have changed while {self.folder} was made from them"
            raise UserError(f"{text}: delete it, and run the same command again")

    def _make(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            text = f"cannot make the folder {self.folder}: {error.strerror}; choose another folder"
            raise UserError(text) from error

    @contextmanager
    def _writes(self) -> Iterator[None]:
        """What the file system refuses, as a `UserError`."""
        try:
            yield
        except OSError as error:
            text = f"cannot write {error.filename or self.folder}: {error.strerror or error}"
            raise UserError(f"{text}; free some disk, or choose another folder") from error

    def unfinished(self) -> list[int]:
        """The shards still to be written; a damaged one is among them."""
        return [shard for shard in range(self.num_shards) if not self._is_finished(shard)]

    def _is_finished(self, shard: int) -> bool:
        """The record is written after the arrays, so where it is whole, they are; unless somebody
        cut, replaced or removed a file."""
        if read_record(self.record_file(shard)) is None:
            return False
        lengths = set()
        for array, (shape, dtype) in zip(self.rows, map(self.row, self.rows)):
            try:
                lengths.add(read_header(self.file(array, shard))[0][0])
                check_rows(self.file(array, shard), (max(lengths), *shape), dtype)
            except (OSError, ValueError, IndexError):  # IndexError: no rows, but a number
                return False
        return len(lengths) == 1 and lengths.pop() <= len(self.items(shard))

    def row(self, array: str) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype of one item in one array."""
        shape, dtype = self.rows[array]
        return shape, np.dtype(dtype)

    def row_bytes(self, array: str) -> int:
        """Bytes of one item in one array."""
        shape, dtype = self.row(array)
        return math.prod(shape) * dtype.itemsize

    def describe(self) -> str:
        """A line for each array: its shape and the bytes of all rows."""
        return "\n".join(
            f"{array}: {self.num_items:,} x {' x '.join(map(str, shape))} in {dtype}, "
            + format_bytes(self.num_items * self.row_bytes(array))
            for array, (shape, dtype) in self.rows.items()
        )

    def bytes_to_write(self) -> int:
        """Bytes of all shards that are not finished."""
        items = sum(len(self.items(shard)) for shard in self.unfinished())
        return items * sum(map(self.row_bytes, self.rows))

    def draft(self, shard: int) -> dict[str, np.memmap]:
        """Arrays for all items of a shard, to be filled, in files of temporary names (`.filename`
        of each: other processes may open it). `seal` gives them their own."""
        with self._writes():
            self.record_file(shard).unlink(missing_ok=True)
            self._drafts[shard] = {array: self._new_array(array, shard) for array in self.rows}
        return self._drafts[shard]

    def _new_array(self, array: str, shard: int) -> np.memmap:
        shape, dtype = self.rows[array]
        path = self.file(array, shard).with_suffix(".tmp")
        path.unlink(missing_ok=True)  # a new file, which no left-over worker has open
        rows = npy.open_memmap(path, "w+", dtype, (len(self.items(shard)), *shape))
        if hasattr(os, "posix_fallocate"):  # else a full disk kills who writes to the map
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, rows.offset + rows.nbytes)
        return rows

    def seal(self, shard: int, record: dict, kept: Sequence[int] | None = None) -> None:
        """Make a draft final: drop the rows that are not in `kept` (ascending; None = keep all),
        make the files durable, give them their names, then write the record."""
        with self._writes():
            for array, rows in self._drafts.pop(shard).items():
                if kept is not None and len(kept) < len(rows):
                    _compact(rows, kept)
                rows.flush()
                path = Path(str(rows.filename))
                sync(path)
                path.replace(self.file(array, shard))
            write_json(self.record_file(shard), record)

    def finish(self, meta: dict) -> None:
        """Write meta.json: the folder is finished."""
        with self._writes():
            write_json(self.folder / META, meta)

    def read(self, shard: int, array: str) -> np.memmap:
        """(n, ...) rows of a finished shard, memory-mapped."""
        return npy.open_memmap(self.file(array, shard), "r")

    def record(self, shard: int, kind: type[Record]) -> Record:
        """What `seal` wrote beside a finished shard, as a record of the dataclass `kind`."""
        path = self.record_file(shard)
        return load_record(path, kind, f"delete {path.name} and run the same command again")

    def records(self, kind: type[Record]) -> list[Record]:
        """What `seal` wrote beside each shard; all of them are finished."""
        return [self.record(shard, kind) for shard in range(self.num_shards)]

    def remove(self) -> None:
        """Delete the files of the folder, if it was begun with this plan, and then the folder, if
        that is empty."""
        plan = self.folder / PLAN
        with suppress(OSError):
            if read_record(plan) == self.plan:
                # the plan last: it tells whose folder this is
                for file in sorted(self.folder.iterdir(), key=lambda path: path == plan):
                    file.unlink()
            self.folder.rmdir()


def shard_file(folder: Path, array: str, shard: int) -> Path:
    return folder / f"{array}-{shard:05d}.npy"


def remedy_for_meta(folder: Path, kind: str, again: str, other: str) -> str:
    """What to do about a META that is absent or does not fit: `again`, where the command that makes
    folders of the format `kind` has begun this one, else `other`."""
    if (read_record(folder / PLAN) or {}).get("format") != kind:
        return other
    return again if os.path.lexists(folder / META) else f"the folder is unfinished: {again}"


def plan_differences(begun: dict, plan: dict) -> list[str]:
    """A phrase such as "seed=1, now 2", or "other images", for each name that differs."""
    return [
        f"other {name.partition('_')[0]}"
        if name in CONTENT
        else f"{name}={_short(begun.get(name))}, now {_short(plan.get(name))}"
        for name in plan | begun  # in the order of `plan`
        if begun.get(name) != plan.get(name)
    ]


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _compact(rows: np.memmap, kept: Sequence[int]) -> None:
    """Close the gaps between the rows `kept` and cut the file behind the last one."""
    for new, old in enumerate(kept):
        if new != old:
            rows[new] = rows[old]
    rows.flush()
    header = npy.header_data_from_array_1_0(rows) | {"shape": (len(kept), *rows.shape[1:])}
    with open(str(rows.filename), "r+b") as file:
        npy.write_array_header_1_0(file, header)
        assert file.tell() == rows.offset  # numpy pads headers so that the first axis can change
        file.truncate(rows.offset + len(kept) * rows[0].nbytes)


def check_rows(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """`ValueError` unless a file holds a whole array of this shape and dtype, in C order."""
    held, found, fortran, start = read_header(path)
    if (held, found) != (shape, dtype) or (fortran and len(shape) > 1):
        order = ", Fortran order" if fortran else ""
        raise ValueError(f"holds {found} {held}{order}, expected {dtype} {shape}")
    expected = start + math.prod(shape) * dtype.itemsize
    if path.stat().st_size != expected:
        raise ValueError(f"is cut short: {path.stat().st_size} bytes, expected {expected}")


def read_header(path: Path) -> tuple[tuple[int, ...], np.dtype, bool, int]:
    """Shape, dtype, whether in Fortran order, and length of the header of an .npy; `ValueError` if
    it is none."""
    if not os.path.isfile(path):
        found = what_is(path)
        raise ValueError("is missing" if found == "absent" else f"is {found}, expected an .npy")
    try:
        with path.open("rb") as file:
            first = npy.read_magic(file) == (1, 0)
            shape, fortran, dtype = (
                npy.read_array_header_1_0(file) if first else npy.read_array_header_2_0(file)
            )
            return shape, dtype, fortran, file.tell()
    except Exception as error:  # numpy's parser of headers raises what Python's parser does
        raise ValueError(f"is no whole .npy: it is {what_is(path)} ({error})") from error


def load_column(path: Path, length: int, dtype: type, remedy: str) -> np.ndarray:
    """(length,) of `dtype` from an .npy file; `UserError` ending in `remedy` if it holds something
    else, which is found before memory is taken."""
    try:
        check_rows(path, (length,), np.dtype(dtype))
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} {error}; {remedy}") from None


def load_keys(folder: Path, length: int, remedy: str) -> list[str]:
    """The keys of the rows; `UserError` ending in `remedy` if there are not `length` different
    ones."""
    path = folder / KEYS
    if not os.path.isfile(path):
        raise UserError(f"{path} is {what_is(path)}, expected a text file; {remedy}")
    keys = read_lines(path)
    if len(keys) != length or len(set(keys)) != length:
        text = f"{path} holds {len(keys)} lines, {len(set(keys))} different ones"
        raise UserError(f"{text}, expected {length}; {remedy}")
    return keys


@dataclass
class ShardedRows:
    """The rows of one array in all its shards, by the number of the item. Files are mapped when
    they are first read, at most `open_files` at a time: each map holds a file descriptor.

    `UserError`, ending in `remedy`, if a file is missing, or does not hold as many rows as
    `lengths` says, of this shape and dtype.
    """

    files: Sequence[Path]
    lengths: Sequence[int]
    row: tuple[tuple[int, ...], DTypeLike]
    remedy: str
    open_files: int = 256

    def __post_init__(self) -> None:
        (shape, dtype), self._maps = self.row, dict[int, np.ndarray]()
        for path, length in zip(self.files, self.lengths):
            try:
                check_rows(path, (length, *shape), np.dtype(dtype))
            except (OSError, ValueError, EOFError) as error:
                raise UserError(f"{path} {error}; {self.remedy}") from None
        self._ends = np.cumsum(self.lengths, dtype=np.int64)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_maps": {}}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> np.ndarray:
        """Row i, a read-only view of the mapped file."""
        shards, within = self._places(np.array([i]))
        return self._map(int(shards[0]))[within[0]]

    def gather(self, indices: ArrayLike, out: np.ndarray) -> None:
        """Copy the rows at `indices` (n,) into `out` (n, ...), read in their order on disk."""
        shards, within = self._places(np.asarray(indices))
        assert out.shape == (len(within), *self.row[0]) and out.dtype == self.row[1]
        order = np.lexsort((within, shards)).tolist()
        for k, shard, row in zip(order, shards[order].tolist(), within[order].tolist()):
            out[k] = self._map(shard)[row]

    def _places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each row (n,), its shard, and its number in it, counted from the end: negative."""
        if len(wrong := indices[(indices < 0) | (indices >= len(self))]):
            raise IndexError(int(wrong[0]))
        shards = np.searchsorted(self._ends, indices, side="right")
        return shards, indices - self._ends[shards]

    def _map(self, shard: int) -> np.ndarray:
        rows = self._maps.get(shard)
        if rows is None:
            if len(self._maps) >= self.open_files:
                self._maps.pop(next(iter(self._maps)), None)  # another thread may be faster
            try:
                # a plain array over the map: its rows are taken without numpy.memmap's overhead
                rows = np.asarray(npy.open_memmap(self.files[shard], "r"))
            except (OSError, ValueError) as error:  # since the start, it went away
                raise UserError(f"{self.files[shard]} {error}; {self.remedy}") from error
            self._maps[shard] = rows
        return rows
