#!/usr/bin/env bash
# Makes the root file system of an image: programs, exactly the shared libraries that they need, and the few files that a C library
# looks for. No shell, no package manager, nothing that a break-in could use. The Dockerfiles call it in their build stage and copy
# the result into an empty image; tests/chart/images_test.py runs the programs in it.
#
#   rootfs.sh DEST PROGRAM... [--opened LIBRARY...]
#
# --opened: libraries that are opened by name while running (dlopen), with all that they need.
set -euo pipefail

[ $# -ge 2 ] || { sed -n '2,9p' "${BASH_SOURCE[0]}"; exit 64; }
dest=$1; shift
programs=() opened=()
into=programs
for argument in "$@"; do
  if [ "$argument" = --opened ]; then into=opened; continue; fi
  [ -f "$argument" ] || { echo "rootfs.sh: $argument is not there" >&2; exit 66; }
  if [ $into = programs ]; then programs+=("$argument"); else opened+=("$argument"); fi
done
libraries=$dest/usr/lib/$(dpkg-architecture -qDEB_HOST_MULTIARCH 2>/dev/null || gcc -dumpmachine)

# usr/lib and usr/bin are what lib, lib64 and bin point to, as in Debian.
mkdir -p "$libraries" "$dest"/usr/{bin,lib64,local/bin} "$dest"/{etc/ssl/certs,tmp,usr/lib/ssl,proc,sys,dev}
for name in lib lib64; do ln -sfn usr/$name "$dest/$name"; done
chmod 1777 "$dest/tmp"

copy_library() { # under the name that others ask for
  local to; to=$libraries/$(basename "$1")
  [ -e "$to" ] || { cp -L --preserve=mode,timestamps "$1" "$to"; chmod 0755 "$to"; }
}
# What ldd finds for a file. libcuda is the driver's: the container runtime brings the host's.
copy_needed() {
  local missing
  missing=$(ldd "$1" | awk '/not found/ && !/libcuda\.so/ && !/libnvidia-/ {print $1}')
  [ -z "$missing" ] || { echo "rootfs.sh: $1 needs $missing" >&2; exit 69; }
  local path
  while read -r path; do
    case $path in
      */ld-linux*|*/ld-*.so.*) cp -L "$path" "$dest/usr/lib64/" ;;
      *) copy_library "$path" ;;
    esac
  done < <(ldd "$1" | awk '$2 == "=>" && $3 ~ /^\// {print $3} $1 ~ /^\/.*ld-/ {print $1}')
}

for program in "${programs[@]}"; do
  copy_needed "$program"
  strip --strip-unneeded -o "$dest/usr/local/bin/$(basename "$program")" "$program"
  chmod 0755 "$dest/usr/local/bin/$(basename "$program")"
done
for library in ${opened[@]+"${opened[@]}"}; do
  copy_needed "$library"
  copy_library "$library"
done

# The user is known by a name; names are looked up by files and DNS; https trusts what Debian trusts.
printf 'root:x:0:0:root:/:/nonexistent\nnonroot:x:65532:65532:nonroot:/tmp:/nonexistent\n' >"$dest/etc/passwd"
printf 'root:x:0:\nnonroot:x:65532:\n' >"$dest/etc/group"
printf 'passwd: files\ngroup: files\nhosts: files dns\n' >"$dest/etc/nsswitch.conf"
cp -L /etc/ssl/certs/ca-certificates.crt "$dest/etc/ssl/certs/"
ln -sfn /etc/ssl/certs "$dest/usr/lib/ssl/certs"
ln -sfn /etc/ssl/certs/ca-certificates.crt "$dest/usr/lib/ssl/cert.pem"
