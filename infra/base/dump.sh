#!/bin/sh
# Dump both databases into FOLDER, each as of one moment, and write down their sums.
set -eu
cd "$FOLDER"
for database in mlflow mlflow_auth; do
    pg_dump --format=custom --compress=6 --no-owner --no-privileges --file="$database.dump" "$database"
    pg_restore --list "$database.dump" >/dev/null # it can be read from end to end
done
sha256sum ./*.dump >SHA256SUMS
