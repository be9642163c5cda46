"""Bring Airflow's metadata database to the installed version, with the administrator and the pools of the JSON files.

Prints what it changed and, last, 'changed' or 'unchanged'. The cheap questions come first: a database that is
ready costs three queries and no import of Airflow itself. Runs as the airflow account with the daemons' environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from sqlalchemy import create_engine, text
from sqlalchemy.exc import ProgrammingError
from werkzeug.security import check_password_hash

HERE = Path(__file__).parent
MARKER = Path(os.environ["AIRFLOW_HOME"]) / "bootstrap.json"
# The environment's folder is named after version and lock, so that an upgrade or a rollback is seen.
RELEASE = str(Path(sys.prefix).resolve().name)


def schema_version() -> str | None:
    """Alembic's version of the database, None where there is no schema yet."""
    try:
        with ENGINE.connect() as connection:
            version: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
            return version
    except ProgrammingError:
        return None


def admin_is_right(admin: dict[str, str]) -> bool:
    """Whether the administrator exists, is active and has this password."""
    query = text("SELECT password FROM ab_user WHERE username = :username AND active")
    with ENGINE.connect() as connection:
        stored = connection.execute(query, {"username": admin["username"]}).scalar()
    return stored is not None and check_password_hash(stored, admin["password"])


def write_admin(admin: dict[str, str]) -> None:
    """Make the administrator or set its password, without a password on any command line."""
    from airflow.providers.fab.auth_manager.cli_commands.utils import get_application_builder

    with get_application_builder() as builder:
        manager = builder.sm
        user = manager.find_user(username=admin["username"])
        if user:
            done = manager.reset_password(user.id, admin["password"])
        else:
            role = manager.find_role("Admin")
            done = manager.add_user(admin["username"], "Platform", "Admin", admin["email"], role, admin["password"])
        if done is False:
            sys.exit(f"the administrator {admin['username']} could not be written; see the lines above")


def write_pools(pools: dict[str, int]) -> bool:
    """Make the pools have these slots; whether that changed anything. Other pools are somebody else's."""
    query = text(
        "INSERT INTO slot_pool AS p (pool, slots, description, include_deferred) "
        "VALUES (:pool, :slots, 'of the inventory', false) ON CONFLICT (pool) DO UPDATE SET slots = excluded.slots "
        "WHERE p.slots <> excluded.slots"
    )
    with ENGINE.begin() as connection:
        counts = [connection.execute(query, {"pool": name, "slots": slots}).rowcount for name, slots in pools.items()]
    return any(count > 0 for count in counts)


ENGINE = create_engine(os.environ["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"])
changed = False
found = schema_version()
marker = json.loads(MARKER.read_text()) if MARKER.exists() else {}
if found is None or marker != {"release": RELEASE, "schema": found}:
    subprocess.run([f"{sys.prefix}/bin/airflow", "db", "migrate"], check=True)
    migrated = schema_version()
    if migrated != found:
        changed = True
        print(f"schema: {found or 'none'} -> {migrated}")
    MARKER.write_text(json.dumps({"release": RELEASE, "schema": migrated}))
admin = json.loads((HERE / "admin.json").read_text())
if not admin_is_right(admin):
    write_admin(admin)
    changed = True
    print(f"administrator: {admin['username']} written")
if write_pools(json.loads((HERE / "pools.json").read_text())):
    changed = True
    print("pools: written")
print("changed" if changed else "unchanged")
