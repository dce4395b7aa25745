"""Reading and writing safetensors checkpoints one tensor at a time: sizes come from headers, so nothing is loaded whole.

A checkpoint directory holds config.json (or hf_config.json, the name in exported stages) and either model.safetensors or
several files with model.safetensors.index.json. The format: 8 bytes little-endian header length, JSON header, raw bytes.
"""
import json
import struct
from dataclasses import dataclass
from pathlib import Path

INDEX = "model.safetensors.index.json"
HEADER_BYTES_MAX = 100 << 20  # the safetensors crate's own limit

# name in the header -> bytes per element
DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
          "F8_E4M3": 1, "F8_E5M2": 1}


class CheckpointError(Exception):
    """What is wrong with a checkpoint, in words that name the file and the tensor."""


@dataclass(frozen=True)
class TensorEntry:
    key: str
    dtype: str          # the header's name: "BF16"
    shape: tuple
    file: Path
    offset: int         # of the first data byte in the file
    bytes: int

    def chunks(self, chunk_bytes: int = 16 << 20):
        """The raw bytes, at most `chunk_bytes` in memory at a time."""
        with open(self.file, "rb") as f:
            f.seek(self.offset)
            left = self.bytes
            while left:
                piece = f.read(min(left, chunk_bytes))
                if not piece:
                    raise CheckpointError(f"{self.file.name}: ends inside '{self.key}'")
                left -= len(piece)
                yield piece


def read_header(file: Path) -> list[TensorEntry]:
    size = file.stat().st_size
    with open(file, "rb") as f:
        head = f.read(8)
        if len(head) < 8:
            raise CheckpointError(f"{file.name}: shorter than a safetensors header")
        length = struct.unpack("<Q", head)[0]
        if length > min(HEADER_BYTES_MAX, size - 8):
            raise CheckpointError(f"{file.name}: header of {length} bytes does not fit the file's {size}")
        try:
            header = json.loads(f.read(length))
        except ValueError as e:
            raise CheckpointError(f"{file.name}: header is not JSON: {e}") from e
    entries = []
    for key, info in header.items():
        if key == "__metadata__":
            continue
        begin, end = info["data_offsets"]
        if info["dtype"] not in DTYPES:
            raise CheckpointError(f"{file.name}: '{key}' has unknown dtype {info['dtype']}")
        want = DTYPES[info["dtype"]]
        for d in info["shape"]:
            want *= d
        if not 0 <= begin <= end <= size - 8 - length or end - begin != want:
            raise CheckpointError(f"{file.name}: '{key}' spans [{begin},{end}) but its shape needs {want} bytes "
                                  f"and the file holds {size - 8 - length}")
        entries.append(TensorEntry(key, info["dtype"], tuple(info["shape"]), file, 8 + length + begin, end - begin))
    return entries


def load_config(directory: Path) -> dict:
    for name in ("config.json", "hf_config.json"):
        if (directory / name).is_file():
            return json.loads((directory / name).read_text())
    raise CheckpointError(f"{directory}: neither config.json nor hf_config.json")


def open_checkpoint(directory: Path) -> dict[str, TensorEntry]:
    """{key: entry} over all files that the index (or, without one, the folder) names; a key in two files is an error."""
    if (directory / INDEX).is_file():
        weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
    else:
        weight_map = None
        files = sorted(p.name for p in directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory}: no safetensors files")
    out = {}
    for name in files:
        path = directory / name
        if path.parent != directory or not path.is_file():
            raise CheckpointError(f"{directory}: the index names '{name}', which is not there")
        for entry in read_header(path):
            if entry.key in out:
                raise CheckpointError(f"'{entry.key}' is in both {out[entry.key].file.name} and {name}")
            out[entry.key] = entry
    if weight_map is not None:
        for key, name in weight_map.items():
            if key not in out or out[key].file.name != name:
                raise CheckpointError(f"the index says that '{key}' is in {name}, but it is not")
    return out


def write_safetensors(path: Path, tensors: list, progress=None) -> dict:
    """Streams `tensors` into `path`: items (key, dtype name, shape, bytes, iterable of chunks). Returns {key: sha256 hex}."""
    import hashlib
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for key, dtype, shape, count, _ in tensors:
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + count]}
        offset += count
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts 8-byte aligned, as the safetensors crate writes it
    digests = {}
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as f:
        f.write(struct.pack("<Q", len(text)))
        f.write(text)
        for key, _, _, count, chunks in tensors:
            digest, written = hashlib.sha256(), 0
            for chunk in chunks:
                f.write(chunk)
                digest.update(chunk)
                written += len(chunk)
            if written != count:
                raise CheckpointError(f"'{key}': {written} bytes came, {count} were announced")
            digests[key] = digest.hexdigest()
            if progress:
                progress(key, count)
    partial.rename(path)  # a half-written shard never carries the final name
    return digests


def split_files(entries: list, bytes_max: int) -> list[list]:
    """Consecutive groups of at most `bytes_max` (one tensor larger than that stands alone). Items have .bytes."""
    groups, size = [[]], 0
    for e in entries:
        if groups[-1] and size + e.bytes > bytes_max:
            groups.append([])
            size = 0
        groups[-1].append(e)
        size += e.bytes
    return groups


def file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]


def write_index(directory: Path, weight_map: dict, total_bytes: int) -> None:
    (directory / INDEX).write_text(
        json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, indent=2) + "\n")
