#!/bin/sh
# Put FOLDER's dumps in the place of what is in both databases: each whole, or not at all.
set -eu
cd "$FOLDER"
sha256sum --check --quiet SHA256SUMS
for database in mlflow mlflow_auth; do
    others=$(psql -d "$database" -Atc \
        "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()")
    if [ "$others" -gt 0 ]; then
        echo "$others sessions use $database. Stop the servers first: kubectl -n slimline scale deployment/mlflow --replicas=0" >&2
        exit 1
    fi
done
for database in mlflow mlflow_auth; do
    # Made in full before it is run: psql would take a text that was cut short for a whole one.
    { echo 'drop schema public cascade; create schema public;'; pg_restore --no-owner --no-privileges --file=- "$database.dump"; echo 'select 1 as whole;'; } >"$database.sql"
    tail -n 1 "$database.sql" | grep -q whole
    psql -d "$database" -q -o /dev/null -v ON_ERROR_STOP=1 --single-transaction -f "$database.sql"
    rm "$database.sql"
    echo "restored $database"
done
