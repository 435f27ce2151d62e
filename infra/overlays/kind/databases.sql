-- Run once, by the first start on an empty disk; POSTGRES_DB has made mlflow.
create database mlflow_auth;
