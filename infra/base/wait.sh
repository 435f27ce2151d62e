#!/bin/sh
# Wait until the migrations have been here: both databases have tables. Gives up after WAIT_S seconds.
set -eu
left=${WAIT_S:-300}
for database in mlflow mlflow_auth; do
    until [ "$(psql -d "$database" -Atc "select count(*) > 0 from pg_tables where tablename like 'alembic_version%'" 2>/tmp/why)" = t ]; do
        if [ "$left" -le 0 ]; then
            echo "the database $database has no tables yet: see the job mlflow-migrate. $(cat /tmp/why)" >&2
            exit 1
        fi
        sleep 2
        left=$((left - 2))
    done
done
