#!/usr/bin/env bash
# An authority of its own for a Dask cluster, and one certificate that server, scheduler and workers show each other.
#   docker/make-certificates.sh DIR
# DIR gets ca.pem, cert.pem and key.pem (readable by its owner only). Whoever has key.pem can run code on the workers. The authority's
# own key is thrown away: nobody can make another certificate for this cluster; after DAYS (365) make all three anew.
set -euo pipefail

directory="${1:?usage: make-certificates.sh DIR}"
days="${DAYS:-365}"
umask 077
mkdir -p "$directory"
for name in ca.pem cert.pem key.pem; do
  [ ! -e "$directory/$name" ] || { echo "$directory/$name is there already" >&2; exit 1; }
done
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
key=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes)
openssl req -x509 "${key[@]}" -days "$days" -subj "/CN=recon-gadgets cluster" \
  -keyout "$work/ca.key" -out "$directory/ca.pem" 2>/dev/null
openssl req "${key[@]}" -subj "/CN=recon-gadgets" -keyout "$directory/key.pem" -out "$work/request.pem" 2>/dev/null
openssl x509 -req -in "$work/request.pem" -CA "$directory/ca.pem" -CAkey "$work/ca.key" -set_serial 1 -days "$days" \
  -extfile <(echo "basicConstraints=CA:FALSE") -out "$directory/cert.pem" 2>/dev/null
openssl verify -CAfile "$directory/ca.pem" "$directory/cert.pem"
