#!/bin/sh
# Bring the tracking and the sign-in database to the schema of this image. Safe to repeat; empty databases are filled.
set -eu
mlflow db upgrade "$MLFLOW_BACKEND_STORE_URI"
python3 -m mlflow.server.auth db upgrade --url postgresql+psycopg:///mlflow_auth
