"""A folder as an image archive that containerd and Docker read: one layer, no builder, no registry, the same bytes every time.

  image.py OUT.tar NAME:TAG ROOTFS [--user UID:GID] [--env NAME=VALUE]... [--entrypoint PROGRAM]
"""
import argparse
import hashlib
import io
import json
import os
import tarfile


class Hashing:
    """Writes through and knows the digest."""

    def __init__(self, file):
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data):
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)


def write_layer(root, out):
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as layer:
        for folder, names, files in os.walk(root):
            names.sort()
            for name in sorted(files + names):
                path = os.path.join(folder, name)
                entry = layer.gettarinfo(path, os.path.relpath(path, root))
                entry.uid = entry.gid = entry.mtime = 0
                entry.uname = entry.gname = ""
                if entry.isreg():
                    with open(path, "rb") as content:
                        layer.addfile(entry, content)
                else:
                    layer.addfile(entry)


def archive(out, names, root, *, user="", env=("PATH=/usr/local/bin",), entrypoint=()):
    """Writes the archive OUT of an image, under each NAME:TAG of `names`, with what lies in `root`."""
    part = f"{out}.layer"
    with open(part, "wb") as file:
        layer = Hashing(file)
        write_layer(root, layer)
    digest = layer.digest.hexdigest()
    config = json.dumps({"architecture": "amd64", "os": "linux", "created": "1970-01-01T00:00:00Z",
                         "config": {"User": user, "Env": list(env), "Entrypoint": list(entrypoint)},
                         "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]}}, sort_keys=True).encode()
    config_name = hashlib.sha256(config).hexdigest() + ".json"
    manifest = json.dumps([{"Config": config_name, "RepoTags": list(names), "Layers": [f"{digest}/layer.tar"]}]).encode()
    with tarfile.open(out, "w") as tar:
        for member, data in ((config_name, config), ("manifest.json", manifest)):
            entry = tarfile.TarInfo(member)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        entry = tarfile.TarInfo(f"{digest}/layer.tar")
        entry.size = layer.size
        with open(part, "rb") as content:
            tar.addfile(entry, content)
    os.unlink(part)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("name")
    parser.add_argument("root")
    parser.add_argument("--user", default="")
    parser.add_argument("--env", action="append", default=[])
    parser.add_argument("--entrypoint", action="append", default=[])
    args = parser.parse_args()
    archive(args.out, [args.name], args.root, user=args.user, env=args.env or ("PATH=/usr/local/bin",), entrypoint=args.entrypoint)


if __name__ == "__main__":
    main()
