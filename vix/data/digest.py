"""What distinguishes one folder of images from another, wherever they lie: a digest of names, classes, sizes and contents."""

import hashlib
import os
from collections.abc import Mapping, Sequence

# Contents are read of at most this many files per split, evenly spaced, and of each at most three pieces of this many bytes.
# Names, classes and sizes of all files count. So other images are noticed at the cost of a second even in a set of a million;
# only a few files of a large set that were replaced by others of exactly the same size are not, and they change no result much.
SAMPLED_FILES, PIECE = 1_000, 4_096

contents_seen: dict[bytes, str] = {}  # digests by names, sizes and times, so that a sweep in one process reads contents once


def files_digest(root: str, splits: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """Twelve hexadecimal digits that are equal for equal files, also after they were moved or copied to another folder.

    root: the folder that the paths lie in, which is not part of the digest.
    splits: for each split its files, (path, class) in the order of the set.
    """
    digest, with_times = hashlib.blake2b(digest_size=6), hashlib.blake2b(os.path.abspath(root).encode(errors="surrogateescape"))
    for split, files in splits.items():
        for path, label in files:
            size, changed = size_and_time(path)
            line = "\0".join((split, label, os.path.relpath(path, root), str(size))).encode(errors="surrogateescape") + b"\n"
            digest.update(line)
            with_times.update(line + str(changed).encode())
    known = with_times.digest()
    if known not in contents_seen:
        for files in splits.values():
            step = max(1, -(-len(files) // SAMPLED_FILES))
            for path, _ in files[::step]:
                digest.update(hashlib.blake2b(sample(path)).digest())
        contents_seen[known] = digest.hexdigest()
    return contents_seen[known]


def size_and_time(path: str) -> tuple[int, int]:
    """Bytes of a file and when it was changed; −1 where it cannot be looked at, which is refused when it is read."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def sample(path: str) -> bytes:
    """The whole of a small file, else its beginning, middle and end; nothing where it cannot be read."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= 3 * PIECE:
                return file.read()
            pieces = []
            for start in (0, (size - PIECE) // 2, size - PIECE):
                file.seek(start)
                pieces.append(file.read(PIECE))
            return b"".join(pieces)
    except OSError:
        return b""
