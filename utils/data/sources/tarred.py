"""Images in tar archives: WebDataset's shards, or folders as they were packed by tar."""

import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from models.checks.errors import UserError, printable
from models.checks.file_kinds import what_is
from utils.data.labels import (
    AUTO,
    FOLDERS,
    ONE_CLASS,
    Labels,
    clean_path,
    label_of,
    number_labels,
    one_class,
)
from utils.data.listing import Ignored, Listing, list_names
from utils.data.sources.classes import Classes
from utils.data.sources.members import (
    Member,
    MembersSource,
    below,
    common_folder,
    read_member,
    require_no_archives,
)
from utils.data.sources.shards import (
    SPLITS,
    are_numbered,
    find_shards,
    notes_on_missing,
    short_name,
)

CLASS = ".cls"  # ending of the member that holds the class of a sample
MOST_TEXT = 1000  # bytes of such a member
LINK = "link{}"  # a kind of what is ignored


class TarSource(MembersSource):
    """The images in one tar, or in all tars below a folder. Members with one name up to the first
    dot are a sample (WebDataset); its member .cls is the class, a number or a name. Where no sample
    has one, the images count as if they were unpacked: class folders, or labels in a file.
    """

    root: Path
    splits = SPLITS

    def __init__(self, root: Path, resolution: int, split: str = "all") -> None:
        super().__init__(root, resolution)
        self._archives = find_shards(root, ".tar", split, self.words)
        links: list[str] = []
        found = [[*_members(file, i, links)] for i, file in enumerate(self._archives)]
        names = {name for each in found for name, _ in each}
        above = common_folder(list_names(root, names), names)
        found = [[(below(above, name), member) for name, member in each] for each in found]
        counts = Counter(name for each in found for name, _ in each)
        shards = [f"{short_name(file, root)}/" for file in self._archives]
        twice = any(num > 1 for num in counts.values()) and len(shards) > 1
        flat = all("/" not in name for name in counts)
        # names alone say too little where several archives use the same, or are the classes
        prefix = twice or (len(shards) > 1 and flat and self.labels_from == FOLDERS)
        members = {
            shard * prefix + name: member
            for shard, each in zip(shards, found)
            for name, member in each
        }
        listing = list_names(root, members)
        listing.ignored += [Ignored(LINK, name) for name in links]
        require_no_archives(listing)
        listing.require_images("give the archive of the images")
        names, (self.labels, self.classes, notes) = self._find(listing, members, flat, twice)
        self.notes = [*notes, *notes_on_missing(self._archives)]
        self._set_members(self._archives, names, members)

    def _find(
        self, listing: Listing, members: dict[str, Member], flat: bool, twice: bool
    ) -> tuple[list[str], Labels]:
        """The names of the images and their labels."""
        classes = {_sample(name): name for name in members if _ending(name) == CLASS}
        listing.ignored = [each for each in listing.ignored if _ending(each.path) != CLASS]
        _keep_one_picture_each(listing, bool(classes))
        if classes and self.labels_from == AUTO:
            kept = {*listing.flat}.union(*listing.per_class.values())
            names = [name for name in members if name in kept]  # as they are stored
            return names, self._of_samples(names, classes, members, listing.ignored_line())
        may_be_classes = flat and len(self._archives) > 1 and not are_numbered(self._archives)
        if may_be_classes and self.labels_from == AUTO:
            first, last = self._archives[0].name, self._archives[-1].name
            text = f"no image in {first} .. {last} has a class, and they may be classes themselves"
            give = [self.words.labels.format(value) for value in (FOLDERS, ONE_CLASS)]
            raise UserError(f"{text}; give {give[0]} if they are, else {give[1]}")
        if twice and self.labels_from == AUTO:
            if not flat:
                raise UserError(
                    f"archives in {self.root} hold files of the same names; unpack them into "
                    f"class folders, or give {self.words.labels.format('FILE')} with the labels"
                )
            names = [name for each in listing.per_class.values() for name in each]
            line = listing.ignored_line()
            return names, one_class(len(names))._replace(notes=[line] if line else [])

        def content(name: str) -> bytes | None:
            return self._read(members[name], name) if name in members else None

        find = Classes(listing, self.words, self.labels_from, content, is_archive=True).find
        names, labels = find()
        if self.labels_from == AUTO and len(labels.classes) == 1:
            labels = labels._replace(notes=[*labels.notes, *self._notes_on_members(listing, names)])
        return names, labels

    def _notes_on_members(self, listing: Listing, names: list[str]) -> Iterator[str]:
        """Of other members of the samples, which may hold their classes."""
        samples = {*map(_sample, names)}
        beside = [each.path for each in listing.ignored if _sample(each.path) in samples]
        if len(beside) >= len(names):
            path, give = printable(min(beside)), self.words.labels.format("FILE")
            text = f"{path} and members like it are not read; if they hold the classes, write these"
            yield f"{text} as members {CLASS} (a number or a name), or give {give}"

    def _of_samples(
        self, names: list[str], classes: dict[str, str], members: dict[str, Member], ignored: str
    ) -> Labels:
        """The labels in the members .cls of the samples of these images."""
        without = [name for name in names if _sample(name) not in classes]
        if without:
            text = (
                f"{printable(without[0])} in {self.root} has no {CLASS} beside it ({len(without)}"
            )
            text += f" such of {len(names)} images), but others have"
            raise UserError(f"{text}; make the archives again, or choose other labels")
        labels = []
        for name in names:
            member, what = members[classes[_sample(name)]], printable(classes[_sample(name)])
            if member.size > MOST_TEXT:
                raise UserError(f"{what} in {self.root} has {member.size} bytes, expected a class")
            text = self._read(member, what).decode("utf-8", "replace")
            labels.append(label_of(text, self.root, what))
        found = number_labels(labels, self.root)
        return found._replace(notes=[*found.notes, *([ignored] if ignored else [])])

    def _read(self, member: Member, name: str) -> bytes:
        archive = self._archives[member.file]
        with open(archive, "rb") as file:
            return read_member(file, member, f"{name} in {archive}")


def _members(archive: Path, number: int, links: list[str]) -> Iterator[tuple[str, Member]]:
    """Name and place of each file in a tar, which is archive number `number`; `UserError` if it is
    none, or is cut short. The names of links to no file before them are appended to `links`."""
    places: dict[str, tuple[int, int]] = {}  # of files that a hard link may name
    try:
        end = archive.stat().st_size
        with tarfile.open(archive, "r:") as file:
            for info in file:
                # else all of them are kept
                file.members = []  # pyright: ignore[reportAttributeAccessIssue]
                name = clean_path(info.name)
                start, size = info.offset_data, info.size
                if info.islnk() and (target := clean_path(info.linkname)) in places:
                    start, size = places[target]
                elif info.islnk() or info.issym():
                    links.append(name)
                    continue
                elif not info.isreg():
                    continue
                if start + size > end:
                    raise tarfile.ReadError(f"it ends within {printable(info.name)}")
                places[name] = start, size
                yield name, Member(number, start, size, size)
            last, raw = file.offset, file.fileobj
            assert raw is not None
            raw.seek(last)
            if raw.read(tarfile.BLOCKSIZE).strip(b"\0"):  # where tarfile takes damage for the end
                raise tarfile.ReadError(f"no member begins at byte {last:,}")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        found = what_is(archive)
        remedy = "unpack it to a plain tar" if "archive" in found and "tar" not in found else (
            "copy or make it again"
        )  # fmt: skip
        text = f"{archive} cannot be read as a tar archive ({error}): it is {found}"
        raise UserError(f"{text}; {remedy}") from None


def _sample(name: str) -> str:
    """What the members of a sample have in common: the path up to the first dot of its name."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _ending(name: str) -> str:
    """What follows: ".jpg", ".seg.png"."""
    return name.rpartition("/")[2][len(_sample(name).rpartition("/")[2]) :].lower()


def _keep_one_picture_each(listing: Listing, must: bool) -> None:
    """Of a sample with several pictures, keep the one whose ending has a single dot: .jpg beside
    .mask.png. `UserError` if there are two of these; if there is none, and one there `must` be."""
    samples = defaultdict(list)
    for name in (*listing.flat, *(n for each in listing.per_class.values() for n in each)):
        samples[_sample(name)].append(name)
    dropped = set()
    for sample, names in samples.items():
        if len(names) == 1:
            continue
        plain = [name for name in names if _ending(name).count(".") == 1]
        if len(plain) > 1 or (must and not plain):
            text = f"the sample {printable(sample)} in {listing.root} has several pictures:"
            endings = ", ".join(map(_ending, names))
            raise UserError(f"{text} {endings}; make the archives again with one of them")
        if plain:
            dropped |= {*names} - {*plain}
    listing.ignored += [Ignored(_ending(name), name) for name in sorted(dropped)]
    listing.flat = [name for name in listing.flat if name not in dropped]
    listing.per_class = {
        top: [name for name in names if name not in dropped]
        for top, names in listing.per_class.items()
    }
