"""Images in a zip archive, read in place: what EDM's and StyleGAN's dataset tools write."""

import zipfile
from pathlib import Path

from models.checks.errors import UserError, printable
from models.checks.file_kinds import what_is
from utils.data.labels import clean_path
from utils.data.listing import list_names
from utils.data.sources.classes import Classes
from utils.data.sources.members import (
    DEFLATED,
    STORED,
    Member,
    MembersSource,
    below,
    common_folder,
    read_member,
    require_no_archives,
)

ENCRYPTED = 1  # bit of a member's flags
AGAIN = "make it again with `zip -r -0`"


class ZipSource(MembersSource):
    """The images in a zip archive, with the classes that they would have in a folder. The folder in
    which all class folders lie is left out of the names."""

    root: Path

    def __init__(self, root: Path, resolution: int, split: str = "all") -> None:
        super().__init__(root, resolution)
        if not root.is_file():
            raise UserError(f"{root} is {what_is(root)}, expected a zip archive")
        members = _members(root)
        listing = list_names(root, members)
        if above := common_folder(listing, members):
            members = {below(above, name): member for name, member in members.items()}
            listing = list_names(root, members)
        require_no_archives(listing)

        def content(name: str) -> bytes | None:
            if name not in members:
                return None
            with open(root, "rb") as file:
                return read_member(file, members[name], f"{name} in {root}")

        classes = Classes(listing, self.words, self.labels_from, content, is_archive=True)
        names, (self.labels, self.classes, self.notes) = classes.find()
        self._set_members([root], names, members)


def _members(root: Path) -> dict[str, Member]:
    """The files and folders in a zip, by their names with forward slashes; of two with one name the
    last counts, as where it is unpacked. `UserError` if the archive is damaged, or a file in it is
    encrypted or compressed in an unusual way."""
    try:
        with zipfile.ZipFile(root) as archive:
            infos = {clean_path(i.filename): i for i in archive.infolist()}
    # on damaged archives zipfile raises what its parser does
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        found = what_is(root)
        why = "cut short or damaged" if "zip" in found else "expected a zip archive"
        text = f"{root} cannot be opened ({error}): it is {found}, {why}; copy or make it again"
        raise UserError(text) from None
    for name, info in infos.items():
        if info.flag_bits & ENCRYPTED:
            raise UserError(f"{printable(name)} in {root} is encrypted; {AGAIN}, without password")
        if info.compress_type not in (STORED, DEFLATED):
            kind = f"method {info.compress_type}, no deflate"
            raise UserError(f"{printable(name)} in {root} is compressed by {kind}; {AGAIN}")
    return {
        name: Member(0, i.header_offset, i.compress_size, i.file_size, i.compress_type, i.CRC)
        for name, i in infos.items()
    }
